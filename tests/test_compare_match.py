"""Matching features: planted copies come back, unrelated SAEs stay at the null's level."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import planted
import pyarrow.parquet as pq
import pytest
import torch
from feature_stores import build_store
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix

from qwen_scope_lens.cli import main
from qwen_scope_lens.compare import (
    align,
    assign,
    counterparts_by_activation,
    counterparts_by_decoder,
    match_activations,
    match_decoders,
    shuffled_directions,
)
from qwen_scope_lens.compare.align import pieces
from qwen_scope_lens.compare.null import shuffled_rows
from qwen_scope_lens.errors import LayerOutOfRange, StoreMismatch, WrongShape
from qwen_scope_lens.features import nearest_by_correlation, nearest_by_cosine
from qwen_scope_lens.features.nearest import Nearest
from qwen_scope_lens.saes import SparseCodes

D, N = 64, 160


def directions(seed: int, n: int = N, d: int = D) -> torch.Tensor:
    """Random directions with a common mean and outlier dimensions, as real decoders have."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng)
    x[:, :3] = x[:, :3] * 4 + 5
    return x


def permuted(x: torch.Tensor, noise: float, seed: int = 9) -> tuple[torch.Tensor, np.ndarray]:
    """`(copy, where)`: row i of x is row where[i] of the copy."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=rng)
    copy = x[order] + noise * torch.randn(x.shape, generator=rng)
    return copy, order.argsort().numpy()


def test_one_feature_gets_what_the_whole_matching_gives_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    a = directions(0)
    b, where = permuted(a, 0.3)
    found = counterparts_by_decoder(a, 5, b, candidates=3)
    every = nearest_by_cosine(a, b, 3)
    assert [one.ref for one in found.rows] == [f"B/{n}" for n in every.of_a[5].tolist()]
    assert found.rows[0].ref == f"B/{where[5]}"
    assert found.rows[0].back == 1
    assert found.rows[0].p_value == pytest.approx(1 / N)
    assert found.rows[1].p_value > 0.05
    rng = np.random.default_rng(0)
    left = csr_matrix(rng.random((400, 30)) * (rng.random((400, 30)) < 0.2))
    right = left[:, rng.permutation(30)]
    same = counterparts_by_activation(left, 4, right, candidates=2)
    match = nearest_by_correlation(left, right, 2)
    assert same.rows[0].ref == f"B/{match.of_a[4][0]}"
    assert same.rows[0].score == pytest.approx(1, abs=1e-5)
    assert same.rows[0].back == 1
    with pytest.raises(LayerOutOfRange, match="not 900"):
        counterparts_by_decoder(a, 900, b)
    here, there = "mini-qwen3/w1k-l0-16/6", "mini-qwen3/w1k-l0-16/5"
    assert main(["compare", "match", f"{here}/423", there, "--candidates", "1"]) == 0
    assert f"{here}/423 -> {there}, by decoder cosine" in capsys.readouterr().out
    assert main(["compare", "match", f"{here}/423", there, "--feature", "4"]) == 1
    assert "names another" in capsys.readouterr().err


def test_a_permuted_noised_and_scaled_copy_is_matched_back() -> None:
    a = directions(0)
    b, where = permuted(a, 0.3)
    found = match_decoders(a, b * 7)
    assert (found.nearest == where).all()
    assert (found.assigned == where).all()
    assert found.matched.all()
    assert found.mutual.all()
    assert (found.n_children == 1).all()


def test_unrelated_directions_match_at_the_null_s_level() -> None:
    found = match_decoders(directions(0), directions(1))
    assert found.matched.mean() < 0.05
    assert abs(np.median(found.score) - np.median(found.null)) < 0.03
    assert (found.assigned >= 0).mean() < 0.1
    # Cosines that would look like agreement if the common directions were not in the null.
    rng = torch.Generator().manual_seed(4)
    one, other = (torch.randn(N, D, generator=rng) for _ in range(2))
    random = match_decoders(one, other).score
    assert np.median(random) < 0.45
    assert np.median(found.score) > 0.65


def test_half_a_copy_leaves_the_other_half_unmatched() -> None:
    a = directions(0)
    b, where = permuted(a, 0.2)
    b[where[: N // 2]] = directions(5)[: N // 2]
    found = match_decoders(a, b)
    assert found.matched[N // 2 :].all()
    assert found.matched[: N // 2].mean() < 0.15
    assert (found.assigned[N // 2 :] == where[N // 2 :]).all()


def test_a_feature_split_in_two_has_two_children() -> None:
    a = directions(0, 40, 48)
    rng = torch.Generator().manual_seed(3)
    twice = torch.cat([a, a[:10]]) + 0.4 * torch.randn(50, 48, generator=rng)
    found = match_decoders(a, twice)
    assert (found.n_children[:10] == 2).all()
    assert (found.n_children[10:] == 1).all()
    assert {child for child, _ in found.children(4)} == {4, 44}
    assert (found.assigned >= 0).all()
    assert (np.bincount(found.assigned) <= 1).all()


def test_the_shuffle_keeps_mean_and_covariance_and_nothing_else() -> None:
    x = torch.nn.functional.normalize(directions(0, 2000), dim=-1)
    y = shuffled_directions(x, 1)
    assert torch.allclose(x.mean(0), y.mean(0), atol=1e-3)
    assert torch.allclose(torch.cov(x.T), torch.cov(y.T), atol=5e-3)
    same = torch.nn.functional.cosine_similarity(x - x.mean(0), y - y.mean(0)).abs()
    assert same.mean() < 0.25


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 7), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_tiles_change_nothing(n_a: int, n_b: int, m: int, tile: int) -> None:
    rng = torch.Generator().manual_seed(n_a * 31 + n_b)
    a, b = (torch.randn(n, 5, generator=rng) for n in (n_a, n_b))
    found = nearest_by_cosine(a, b, m, tile=tile)
    full = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    for index, score, scores in (
        (found.of_a, found.score_a, full),
        (found.of_b, found.score_b, full.T),
    ):
        value, best = scores.sort(dim=1, descending=True)
        k = min(m, scores.shape[1])
        assert (index[:, :k] == best[:, :k].numpy()).all()
        np.testing.assert_allclose(score[:, :k], value[:, :k], atol=1e-5)
        assert (index[:, k:] == -1).all()


@given(st.integers(0, 10_000), st.sampled_from([2, 5, 64]))
@settings(max_examples=25, deadline=None)
def test_correlations_are_pearson_s(seed: int, tile: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.gamma(2, size=(60, n)) * (rng.random((60, n)) < 0.3) for n in (7, 11))
    b[:, 3] = 2 * a[:, 1]
    found = nearest_by_correlation(csr_matrix(a), csr_matrix(b), 4, tile=tile, least=5)
    full = np.corrcoef(a.T, b.T)[:7, 7:]
    together = (a > 0).T.astype(int) @ (b > 0).astype(int)
    allowed = np.where((together >= 5) & (full > 0), full, -np.inf)
    for index, score, scores in (
        (found.of_a, found.score_a, allowed),
        (found.of_b, found.score_b, allowed.T),
    ):
        expected = -np.sort(-scores, axis=1)[:, :4]
        np.testing.assert_allclose(score, expected, rtol=1e-5)
        rows, entries = np.nonzero(index >= 0)
        np.testing.assert_allclose(
            scores[rows, index[rows, entries]], score[rows, entries], rtol=1e-5
        )


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 9999))
@settings(max_examples=40, deadline=None)
def test_the_assignment_is_scipy_s_dense_optimum(n_a: int, n_b: int, seed: int) -> None:
    scores = np.random.default_rng(seed).random((n_a, n_b)).astype(np.float32)
    order_a, order_b = np.argsort(-scores, 1), np.argsort(-scores.T, 1)
    nearest = Nearest(
        order_a,
        np.take_along_axis(scores, order_a, 1),
        order_b,
        np.take_along_axis(scores.T, order_b, 1),
    )
    partner, found = assign(nearest, level=0.6)
    gain = np.maximum(scores.astype(np.float64) - 0.6, 0)
    best = gain[linear_sum_assignment(-gain)].sum()
    mine = np.flatnonzero(partner >= 0)
    assert len(set(partner[mine])) == len(mine)
    assert gain[mine, partner[mine]].sum() == pytest.approx(best, abs=1e-6)
    np.testing.assert_allclose(found[mine], scores[mine, partner[mine]])
    assert assign(nearest, level=1.1)[0].tolist() == [-1] * n_a


def test_a_rotated_copy_is_matched_by_activations_and_not_by_directions() -> None:
    """Another residual space: permuted, rotated and noised; read on the same tokens."""
    weights = planted.tensors(0)
    x = planted.activations(weights, tokens=4000)
    rng = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=rng))[0]
    order = torch.randperm(planted.D_SAE, generator=rng)
    noise = 0.02 * torch.randn(planted.D_SAE, D, generator=rng)
    copy = {
        "W_enc": (weights["W_enc"][order] + noise) @ rotation.T,
        "W_dec": rotation @ (weights["W_dec"][:, order] + noise.T),
        "b_enc": weights["b_enc"][order],
        "b_dec": rotation @ weights["b_dec"],
    }
    codes = [
        SparseCodes.from_dense(planted.model_card_encode(w, r, planted.K), planted.K)
        for w, r in ((weights, x), (copy, x @ rotation.T))
    ]
    found = match_activations(*(c.to_scipy_csr() for c in codes))
    where = order.argsort().numpy()
    assert found.matched.mean() > 0.99
    assert (found.nearest == where)[found.matched].all()
    assert (found.assigned == where).mean() > 0.99
    by_direction = match_decoders(weights["W_dec"].T, copy["W_dec"].T)
    assert by_direction.matched.mean() < 0.05
    other = planted.tensors(7)
    unrelated = SparseCodes.from_dense(
        planted.model_card_encode(other, planted.activations(other, 4000, seed=8), planted.K),
        planted.K,
    )
    chance = match_activations(codes[0].to_scipy_csr(), unrelated.to_scipy_csr())
    assert chance.matched.mean() < 0.05


def test_a_common_subject_is_no_match_when_rows_stay_in_their_documents() -> None:
    """Both fire at random places of the same half of the documents, and nowhere else."""
    rng = np.random.default_rng(0)
    doc = np.repeat(np.arange(200), 20)
    subject = (doc % 2 == 0)[:, None]
    a, b = (
        (rng.random((4000, 30)) < 0.3) * subject * rng.gamma(2, size=(4000, 30)) for _ in range(2)
    )
    b[:, 4] = a[:, 9]
    loose = match_activations(csr_matrix(a), csr_matrix(b))
    strict = match_activations(csr_matrix(a), csr_matrix(b), doc=doc)
    assert loose.matched.mean() > 0.9
    assert strict.matched[9]
    assert strict.nearest[9] == 4
    assert strict.matched.mean() < 0.15
    mixed = shuffled_rows(csr_matrix(np.arange(4000.0)[:, None]), 1, doc[::-1]).toarray()[:, 0]
    assert sorted(mixed) == list(range(4000))
    assert (doc[mixed.astype(int)] == doc).all()


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(WrongShape, match="activation correlation"):
        match_decoders(torch.randn(5, 4), torch.randn(5, 6))
    with pytest.raises(WrongShape, match="same pieces"):
        match_activations(csr_matrix((30, 2)), csr_matrix((31, 2)))


def test_pieces_end_where_both_tokenizers_cut() -> None:
    # "ab cd" as ab| cd and a|b| |cd
    a = np.array([[0, 2], [2, 5]])
    b = np.array([[0, 1], [1, 2], [2, 3], [3, 5]])
    of_a, of_b, n = pieces(a, b)
    assert (of_a.tolist(), of_b.tolist(), n) == ([0, 1], [0, 0, 1, 1], 2)
    # Three tokens of one character against one: a border inside a character is none.
    of_a, of_b, n = pieces(np.array([[0, 1], [0, 1], [0, 1], [1, 2]]), np.array([[0, 1], [1, 2]]))
    assert (of_a.tolist(), of_b.tolist(), n) == ([0, 0, 0, 1], [0, 1], 2)
    # Cut at different lengths: what only one of them read is in no piece.
    of_a, of_b, n = pieces(np.array([[0, 3]]), np.array([[0, 3], [3, 7]]))
    assert (of_a.tolist(), of_b.tolist(), n) == ([0], [0, -1], 1)
    # No text, no borders in common.
    assert pieces(np.array([[-1, -1]]), np.array([[0, 1]]))[2] == 0
    assert pieces(np.array([[0, 4]]), np.array([[0, 3]]))[2] == 0


@given(st.text(min_size=1, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_pieces_of_any_two_tokenizations_cover_the_text(text: str, random: object) -> None:
    def cut() -> np.ndarray:
        inner = [i for i in range(1, len(text)) if random.random() < 0.5]  # type: ignore[attr-defined]
        ends = [0, *inner, len(text)]
        return np.array(list(pairwise(ends)))

    a, b = cut(), cut()
    of_a, of_b, n = pieces(a, b)
    assert set(of_a.tolist()) == set(of_b.tolist()) == set(range(n))
    assert n == len({e for _, e in a.tolist()} & {e for _, e in b.tolist()})
    for piece in range(n):
        covered = [(s[p == piece].min(), s[p == piece].max()) for s, p in ((a, of_a), (b, of_b))]
        assert covered[0] == covered[1]


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same texts for two models: feature f of A is feature f + 100 of B, in other tokens."""
    folder = tmp_path_factory.mktemp("match")
    rng = np.random.default_rng(0)
    texts, left, right = [], [], []
    for n in range(120):
        fires = rng.integers(0, 20, 8)
        strength = 1 + rng.random(8)
        texts.append(f"{n:04d}" + "ab" * 8)  # 20 characters
        tokens = [{}, *({int(f): float(s)} for f, s in zip(fires, strength, strict=True)), {}]
        left.append(tokens)  # 10 tokens of two characters
        other: list[dict[int, float]] = [{}, {}, {}, {}]
        for f, s in zip(fires, strength, strict=True):
            other += [{}, {int(f) + 100: float(s)}]
        right.append([*other[2:], {}, {}])  # 20 tokens of one character
    build_store(folder / "a", left, texts=texts)
    build_store(folder / "b", right, texts=texts, group="mini-qwen3.5/w1k-l0-16")
    return folder / "a", folder / "b"


def test_two_tokenizers_are_matched_by_the_characters_they_share(
    two_stores: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "match.parquet"
    assert main(["compare", "match", *map(str, two_stores), "--out", str(out)]) == 0
    assert "activation correlation" in capsys.readouterr().out
    rows = pq.read_table(out).to_pylist()
    for f in range(20):
        assert rows[f]["assigned"] == f"mini-qwen3.5/w1k-l0-16/6/{f + 100}"
        assert rows[f]["matched"]
        assert rows[f]["children"] == [rows[f]["assigned"]]
    assert rows[500]["nearest"] is None
    assert rows[500]["assigned"] is None
    assert rows[500]["ref_a"] == "mini-qwen3/w1k-l0-16/6/500"


def test_addresses_are_matched_by_directions(
    two_stores: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "match", "mini-qwen3/w1k-l0-16/2", "mini-qwen3/w1k-l0-16/2"]) == 0
    said = capsys.readouterr()
    assert "matched beyond chance (q <= 0.05): 1,024 of 1,024" in said.out
    assert "every feature matches itself" in said.err
    assert main(["compare", "match", "mini-qwen3/w1k-l0-16/2", "mini-qwen3.5/w1k-l0-16/2"]) == 1
    assert "needs a store of each" in capsys.readouterr().err
    words = ["compare", "match", *map(str, two_stores), "--by", "decoder"]
    assert main(words) == 1
    assert "different residual spaces" in capsys.readouterr().err


def test_stores_of_other_texts_are_refused(two_stores: tuple[Path, Path], tmp_path: Path) -> None:
    from qwen_scope_lens.stores import FeatureStore

    other = build_store(tmp_path / "c", [[{1: 1.0}]] * 3, texts=["x1", "x2", "x3"])
    with pytest.raises(StoreMismatch, match="no document with the same text"):
        align(FeatureStore.open(two_stores[0]), 6, other, 6)
