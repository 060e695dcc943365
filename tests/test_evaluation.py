"""Footprints, coverage, redundancy and overlap against brute force, simulation and scipy."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.stats import kendalltau, pearsonr, spearmanr

from qwen_scope_lens.bench import (
    Footprint,
    agreement,
    ceiling,
    correlate,
    correlate_pairs,
    coverage_curve,
    footprint,
    missed,
    overlap,
    overlap_matrix,
    redundancy,
    redundancy_at,
    similarity,
    spearman,
)
from qwen_scope_lens.bench.correlation import partial, split_control
from qwen_scope_lens.bench.coverage import expected_features
from qwen_scope_lens.bench.overlap import overlaps
from qwen_scope_lens.bench.panel import ranking_curve
from qwen_scope_lens.errors import BadFile, StoreMismatch, TooLittleData, UnknownName
from qwen_scope_lens.stats import pearson


def draw(
    n_items: int, d_sae: int = 40, seed: int = 0, name: str = "b", rate: float = 0.1
) -> Footprint:
    """Items that activate features at rates falling like those of real ones."""
    rng = np.random.default_rng(seed)
    rates = np.minimum(1.0, 4 * rate / (1 + np.arange(d_sae) * rate))
    fires = rng.random((n_items, d_sae)) < rates
    fires[0, 0] = True
    return footprint(name, fires, sae="x/y/0")


@st.composite
def matrices(draw_from: st.DrawFn) -> np.ndarray:
    rows = draw_from(st.integers(2, 7))
    columns = draw_from(st.integers(1, 9))
    cells = draw_from(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    matrix = np.array(cells).reshape(rows, columns)
    matrix[0, 0] = True
    return matrix


@settings(deadline=None, max_examples=60)
@given(matrices())
def test_closed_form_is_the_mean_over_all_subsets(matrix: np.ndarray) -> None:
    """Equations 7-9 by brute force over every subset of every size."""
    one = footprint("b", matrix)
    n_items = len(matrix)
    brute = [
        np.mean([matrix[list(s)].any(0).sum() for s in combinations(range(n_items), n)])
        for n in range(1, n_items + 1)
    ]
    sizes = np.arange(1, n_items + 1)
    np.testing.assert_allclose(expected_features(one.counts, n_items, sizes), brute, rtol=1e-12)
    c = np.array(brute) / matrix.any(0).sum()
    found = redundancy(one, draws=10)
    np.testing.assert_allclose(found.auc.value, c.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.r_hat.value, c.sum() / one.size, rtol=1e-12)
    np.testing.assert_allclose(coverage_curve(one, draws=5).coverage, c, rtol=1e-12)
    if n_items > 2:
        u = np.array(brute[: n_items - 1])
        expected = u.sum() / u[-1] ** 2
        np.testing.assert_allclose(redundancy_at(one, n_items - 1), expected, rtol=1e-12)


def test_closed_form_agrees_with_sampling() -> None:
    one = draw(300, d_sae=200)
    rng = np.random.default_rng(1)
    dense = one.items.toarray() > 0
    for n in (1, 7, 60, 250):
        sampled = [dense[rng.choice(300, n, replace=False)].any(0).sum() for _ in range(2000)]
        error = np.std(sampled) / np.sqrt(2000)
        exact = expected_features(one.counts, 300, [n])[0]
        assert abs(np.mean(sampled) - exact) < 4 * error + 1e-9


def test_log_gamma_is_exact_at_the_papers_largest_size() -> None:
    """Against whole-number binomials of Python, at N = 26,529."""
    n_items = 26_529
    counts, sizes = np.array([1, 2, 50, 3000, 26_528]), np.array([1, 2, 17, 400, 13_000, 26_529])
    found = missed(n_items, counts, sizes)
    for i, m in enumerate(counts):
        for j, n in enumerate(sizes):
            # Python's int / int is correctly rounded, also where both overflow a float
            exact = comb(int(n_items - m), int(n)) / comb(n_items, int(n)) if i < 3 else None
            if exact is None:
                product = np.sum(np.log1p(-m / (n_items - np.arange(n)))) if m + n <= n_items else 0
                exact = np.exp(product) if m + n <= n_items else 0.0
            assert found[i, j] == pytest.approx(exact, rel=1e-8, abs=1e-300)
    total = (1 - missed(n_items, np.array([7]), np.arange(1, n_items + 1))).sum()
    assert total == pytest.approx((n_items + 1) * 7 / 8, rel=1e-10)


def test_a_redundant_benchmark_has_the_larger_index() -> None:
    """Planted: 10 different items, each 20 times, against 200 different ones."""
    rng = np.random.default_rng(0)
    few = rng.random((10, 500)) < 0.03
    copies = redundancy(footprint("copies", np.tile(few, (20, 1))))
    different = redundancy(footprint("different", rng.random((200, 500)) < 0.03))
    assert copies.auc.low > different.auc.high
    assert copies.r_hat.low > different.r_hat.high
    assert copies.new_per_item == 0
    assert copies.half < different.half


def test_intervals_contain_the_expectation() -> None:
    """Over many draws of a benchmark from one source: the mean figure, nearly always."""
    sources = [draw(80, d_sae=120, seed=seed, rate=0.05) for seed in range(80)]
    found = [redundancy(one, draws=100) for one in sources]
    other = draw(80, d_sae=120, seed=999, rate=0.05)
    directed = [overlap(one, other, draws=100).overlap for one in sources]
    for values in ([f.auc for f in found], [f.r_hat for f in found], directed):
        truth = np.mean([v.value for v in values])
        inside = np.mean([v.low <= truth <= v.high for v in values])
        assert inside >= 0.85


def test_tau_curve_against_scipy_on_all_subsets() -> None:
    rng = np.random.default_rng(0)
    correct = (rng.random((5, 6)) < np.linspace(0.2, 0.9, 5)[:, None]).astype(float)
    whole = correct.mean(1)
    sizes = np.arange(1, 7)
    exact = []
    for n in sizes:
        taus = [
            kendalltau(correct[:, list(s)].mean(1), whole).statistic
            for s in combinations(range(6), int(n))
        ]
        exact.append(np.mean(np.nan_to_num(taus)))
    found = ranking_curve(correct, sizes, 4000, np.random.default_rng(1))
    np.testing.assert_allclose(found, exact, atol=0.03)
    assert found[-1] == pytest.approx(1.0)
    real = ranking_curve(correct * 0.1, sizes, 4000, np.random.default_rng(1))
    np.testing.assert_allclose(real, found, atol=1e-6)  # scores that are not whole numbers


def test_agreement_is_seeded_and_larger_where_models_differ_more() -> None:
    rng = np.random.default_rng(0)
    items = rng.random((1, 400))
    clear = (items < np.linspace(0.1, 0.9, 8)[:, None]).astype(int)
    noisy = (rng.random((8, 400)) < np.linspace(0.45, 0.55, 8)[:, None]).astype(int)
    one, again = (agreement("x", clear, permutations=20, draws=10, seed=3) for _ in range(2))
    assert one.r == again.r
    assert one.r.value > agreement("y", noisy, permutations=20, draws=10).r.high
    assert one.sizes[-1] == one.n_items == 400
    assert one.tau[-1] == pytest.approx(1)


def test_overlap_is_asymmetric_and_its_own_is_one() -> None:
    """Planted: small inside large, by equation 10, 11 and sets of Python."""
    large = draw(60, d_sae=80, name="large")
    small = footprint("small", large.items[:6].toarray(), sae="x/y/0")
    there, back = overlap(small, large), overlap(large, small)
    f1, f2 = set(small.features), set(large.features)
    assert there.overlap.value == 1.0
    assert back.overlap.value == len(f1 & f2) / len(f2) < 1
    assert there.overlap_min.value == back.overlap_min.value == 1.0
    assert back.shared == len(f1 & f2)
    own = overlap(large, large)
    assert (own.overlap.value, own.overlap.low, own.overlap_min.low, own.equal) == (1, 1, 1, 1)
    table = overlap_matrix([small, large])
    np.testing.assert_allclose(table, np.array([[1, 1], [back.overlap.value, 1]]), rtol=1e-6)
    np.testing.assert_allclose(overlap_matrix([small, large], smallest=True), 1.0)


def test_equal_size_overlap_and_ceiling_against_sampling() -> None:
    a, b = draw(50, seed=1, name="a", d_sae=300), draw(90, seed=2, name="b", d_sae=300)
    rng = np.random.default_rng(0)
    both, ones = [], []
    for _ in range(3000):
        s = a.items[rng.choice(50, 20, replace=False)].sum(0).A1 > 0
        t = b.items[rng.choice(90, 20, replace=False)].sum(0).A1 > 0
        both.append((s & t).sum())
        ones.append(s.sum())
    found = overlap(a, b, draws=20, at=20)
    assert found.equal == pytest.approx(np.mean(both) / np.mean(ones), rel=0.01)
    same = draw(2000, seed=3, name="same")
    assert ceiling(same).overlap.value > ceiling(a).overlap.value  # more items, less noise
    # two halves are two draws of one source: as near as a second benchmark of it can come
    halves = ceiling(b)
    other = overlap(draw(45, seed=7, d_sae=300), draw(45, seed=8, d_sae=300)).overlap
    assert other.low < halves.overlap.value < other.high
    assert [(x.first, x.second) for x in overlaps([a, b], draws=5)] == [("a", "b"), ("b", "a")]


def test_partial_correlation_is_that_of_residuals() -> None:
    rng = np.random.default_rng(0)
    m = rng.normal(size=50)
    x, y = m + rng.normal(size=50), 2 * m + rng.normal(size=50)
    of_x, of_y = (v - np.polyval(np.polyfit(m, v, 1), m) for v in (x, y))
    expected = np.corrcoef(of_x, of_y)[0, 1]
    assert partial(pearson(x, y), pearson(x, m), pearson(y, m)) == pytest.approx(expected)
    table = similarity(np.stack([x, y], axis=1), ["x", "y"], m)
    assert table[0, 1] == pytest.approx(expected)


def test_correlations_are_those_of_scipy() -> None:
    rng = np.random.default_rng(3)
    for size in (2, 3, 40):
        x, y = rng.normal(size=size), rng.integers(0, 9, size).astype(float)
        y[0] = 10
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
        assert pearson(x, y) == pytest.approx(pearsonr(x, y).statistic)
    assert np.isnan(pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert np.isnan(spearman([1.0], [2.0]))


def test_correlations_over_benchmarks_and_pairs() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    straight, ranks = correlate(x, x + 0.1 * rng.normal(size=20))
    assert straight.low > 0.9
    assert ranks.low > 0.8
    base = rng.random((9, 9))
    table = (base + base.T) / 2
    related = correlate_pairs(table, table + 0.01 * rng.random((9, 9)))
    other = rng.random((9, 9))
    assert related.p_value < 0.01 < correlate_pairs(table, other + other.T).p_value
    assert related.n_pairs == 36
    assert related.spearman.low > 0.9


def test_degenerate_cases_say_so() -> None:
    with pytest.raises(TooLittleData, match="no items"):
        footprint("b", csr_matrix((0, 5)))
    with pytest.raises(TooLittleData, match="footprint is empty"):
        footprint("b", np.zeros((4, 5)))
    single = footprint("single", np.ones((1, 5)))
    with pytest.raises(TooLittleData, match="one item"):
        redundancy(single)
    with pytest.raises(TooLittleData, match="cannot be split"):
        ceiling(single)
    with pytest.raises(TooLittleData, match="needs two"):
        overlaps([single])
    with pytest.raises(StoreMismatch, match="width"):
        overlap(single, footprint("other", np.ones((1, 6))))
    with pytest.raises(StoreMismatch, match="position"):
        overlap(single, Footprint("o", single.items, single.keys, "", "any"))
    with pytest.raises(TooLittleData, match="have no ranking"):
        agreement("same", np.ones((3, 9)))
    with pytest.raises(TooLittleData, match="at least 2"):
        agreement("short", np.ones((3, 1)))
    with pytest.raises(BadFile, match="1 of 6 results"):
        agreement("gap", [[1, 0, np.nan], [0, 0, 1]])
    scores = np.random.default_rng(0).random((6, 3))
    with pytest.raises(StoreMismatch, match="must not be one of the pairs"):
        similarity(scores, ["a", "b", "m"], scores[:, 2])
    with pytest.raises(TooLittleData, match="linear function of the control"):
        similarity(scores, ["a", "b", "c"], 2 * scores[:, 1] + 1)
    scores[:, 1] = 0.5
    with pytest.raises(TooLittleData, match="b: all 6 models score 0"):
        similarity(scores, ["a", "b", "c"])
    with pytest.raises(UnknownName, match="control benchmark 'mmlu'"):
        split_control(scores, ["a", "b", "c"], "mmlu")
    with pytest.raises(TooLittleData, match="at least 3"):
        correlate(np.array([1.0, 2.0]), np.array([2.0, 1.0]))
