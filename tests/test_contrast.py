"""The statistics of two groups, against scipy's and scikit-learn's on the dense columns."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from qwen_scope_lens.errors import TooLittleData, UnknownName
from qwen_scope_lens.features import RankSums
from qwen_scope_lens.features.contrast import LIKELY, contrast, q_values
from qwen_scope_lens.features.document_sets import by_documents, split


@settings(max_examples=60, deadline=None)
@given(
    st.integers(4, 30),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.integers(1, 6),
    st.integers(0, 2**31),
)
def test_every_column_is_as_computed_alone(n: int, fill: float, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(1, levels + 1, (n, 5)) * (rng.random((n, 5)) < fill) * 0.7
    positive = np.arange(n) < rng.integers(2, n - 1)
    rng.shuffle(positive)
    found = contrast(csr_matrix(x.astype(np.float32)), positive)
    x = x.astype(np.float32).astype(np.float64)
    for f in range(5):
        a, b = x[positive, f], x[~positive, f]
        assert found.auroc[f] == pytest.approx(roc_auc_score(positive, x[:, f]))
        assert found.mean_difference[f] == pytest.approx(a.mean() - b.mean(), abs=1e-12)
        assert found.rate_difference[f] == pytest.approx((a > 0).mean() - (b > 0).mean())
        assert found.documents[f] == (x[:, f] > 0).sum()
        if len(set(x[:, f])) > 1:
            p = stats.mannwhitneyu(a, b, method="asymptotic", use_continuity=True).pvalue
            if p >= LIKELY:
                assert found.p_value[f] == pytest.approx(p, abs=1e-12)
            else:
                assert 0 < found.p_value[f] <= 1
        else:
            assert found.p_value[f] == 1
            assert found.effect[f] == 0
        spread = (a.var() * len(a) + b.var() * len(b)) / (n - 2)
        if spread > 1e-9:
            d = (a.mean() - b.mean()) / spread**0.5
            assert found.effect[f] == pytest.approx(d, rel=1e-6, abs=1e-9)


def test_perfect_separation_is_infinite_and_not_a_warning() -> None:
    x = csr_matrix(np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 2.0], [0.0, 2.0]]))
    found = contrast(x, np.array([True, True, False, False]))
    assert found.effect.tolist() == [np.inf, 0.0]
    assert found.auroc.tolist() == [1.0, 0.5]


def test_many_labellings_at_once_are_as_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    x = csr_matrix(rng.integers(0, 4, (20, 9)).astype(float))
    labels = rng.random((20, 3)) < 0.5
    auroc, p = RankSums(x).test(labels)
    for run in range(3):
        one, q = RankSums(x).test(labels[:, run])
        np.testing.assert_allclose(auroc[:, run], one)
        np.testing.assert_allclose(p[:, run], q)


@pytest.mark.parametrize("kind", ["different values", "two levels", "fires or not"])
@pytest.mark.parametrize(("n", "n_positive", "fires"), [(12, 3, 5), (11, 4, 11), (13, 2, 6)])
def test_a_small_p_is_that_of_all_labellings(
    kind: str, n: int, n_positive: int, fires: int
) -> None:
    """Against every possible choice of the positive documents."""
    rng = np.random.default_rng(n)
    x = np.zeros(n)
    x[rng.choice(n, fires, replace=False)] = {
        "different values": rng.permutation(fires) + 1.0,
        "two levels": rng.integers(1, 3, fires),
        "fires or not": np.ones(fires),
    }[kind]
    every = list(combinations(range(n), n_positive))
    labels = np.zeros((n, len(every)), dtype=bool)
    for run, chosen in enumerate(every):
        labels[list(chosen), run] = True
    p = RankSums(csr_matrix(x[:, None])).test(labels)[1][0]
    sums = stats.rankdata(x) @ labels
    tails = [[(sums >= s - 1e-9).mean(), (sums <= s + 1e-9).mean()] for s in sums]
    exact = np.minimum(1, 2 * np.min(tails, axis=1))
    small = p < LIKELY
    assert (p[small] >= 0.9 * exact[small]).all()
    if kind == "fires or not":
        np.testing.assert_allclose(p[small], exact[small])
    for limit in (0.1, 0.05, 0.02):
        assert (p <= limit).mean() <= limit


def test_one_number_for_all_that_fire_is_fishers_test() -> None:
    rng = np.random.default_rng(0)
    x = csr_matrix((rng.random((400, 60)) < np.linspace(0.01, 0.99, 60)).astype(float))
    positive = rng.permutation(400) < 30
    found = contrast(x, positive)
    for f in range(60):
        table = stats.hypergeom(400, found.documents[f], 30)
        inside = round(found.rate_positive[f] * 30)
        exact = min(1.0, 2 * min(table.sf(inside - 1), table.cdf(inside)))
        if found.p_value[f] < LIKELY:
            assert found.p_value[f] == pytest.approx(exact, rel=1e-6)


def test_without_ties_the_tail_is_not_below_scipys_exact_one() -> None:
    rng = np.random.default_rng(2)
    positive = np.arange(60) < 12
    x = rng.random((60, 40)) + positive[:, None] * np.linspace(0, 1.2, 40)
    p = contrast(csr_matrix(x), positive).p_value
    exact = np.array(
        [
            stats.mannwhitneyu(x[positive, f], x[~positive, f], method="exact").pvalue
            for f in range(40)
        ]
    )
    assert (p >= 0.97 * exact)[exact < 0.05].all()
    assert (p <= 3 * exact)[exact > 1e-4].all()  # and not far above where it matters


@pytest.mark.parametrize("levels", [False, True])
def test_where_nothing_is_nothing_passes(levels: bool) -> None:
    """48 documents against 2,000: 100 labellings that mean nothing, rare and common features. The
    normal approximation alone passes some in nearly all of them."""
    rng = np.random.default_rng(0)
    n, passed = 2048, 0
    for _ in range(4):
        rates = np.exp(rng.uniform(np.log(0.001), np.log(0.8), 1500))
        fires = np.concatenate(
            [f * n + rng.choice(n, rng.binomial(n, r), replace=False) for f, r in enumerate(rates)]
        )
        values = rng.gamma(2.0, size=len(fires)) + 0.01
        if levels:
            values = np.where(rng.random(len(fires)) < 0.97, 1.0, 2.0)
        sums = RankSums(csr_matrix((values, (fires % n, fires // n)), shape=(n, 1500)))
        tested = sums.documents >= 3
        labels = np.stack([rng.permutation(n) < 48 for _ in range(25)], axis=1)
        p = sums.test(labels)[1]
        passed += sum((q_values(p[:, run], tested) <= 0.05).any() for run in range(25))
    assert passed <= 5


def test_q_values_are_the_step_up_procedure_over_the_tested() -> None:
    p = np.array([0.001, 0.9, 0.02, 0.03, 1e-9])
    tested = np.array([True, True, True, True, False])
    expected = [0.004, 0.9, 0.04, 0.04, 1.0]  # p (n / rank), made monotone
    assert q_values(p, tested).tolist() == pytest.approx(expected)
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert q_values(p, tested, "by")[0] == pytest.approx(0.004 * harmonic)


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(TooLittleData, match="1 positive"):
        contrast(csr_matrix(np.eye(4)), np.array([True, False, False, False]))


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.1, 0.9), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_split_keeps_shares_and_copies_together(
    a: int, b: int, share: float, seed: int
) -> None:
    positive = np.arange(a + b) < a
    texts = [f"text {n % 7}" if n % 5 == 0 else f"own {n}" for n in range(a + b)]
    found, held = split(positive, texts, share, seed)
    assert (found ^ held).all()
    assert not {texts[n] for n in np.flatnonzero(found)} & {texts[n] for n in np.flatnonzero(held)}
    distinct = split(positive, [None] * (a + b), share, seed)[1]
    assert distinct[positive].sum() == round(share * a)
    assert distinct[~positive].sum() == round(share * b)
    assert (split(positive, texts, share, seed)[1] == held).all()


def test_documents_are_chosen_by_number_or_mask() -> None:
    groups = by_documents(6, [4, 1], [0, 2])
    assert groups.docs.tolist() == [0, 1, 2, 4]
    assert groups.positive.tolist() == [False, True, False, True]
    mask = np.array([True, False, False, False, False, True])
    assert by_documents(6, mask).positive.tolist() == mask.tolist()
    for positive, negative, says in (
        ([0], [0, 1], "both positive and negative"),
        ([7], None, "names document 7"),
        ([-1], None, "names document -1"),
        (mask[:3], None, "mask of shape"),
        ([0.5], None, "document numbers"),
    ):
        with pytest.raises(UnknownName, match=says):
            by_documents(6, np.asarray(positive), negative)
