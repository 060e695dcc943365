"""Statistics of all features in one pass, against counting by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from feature_stores import random_codes, store_of_dense

from qwen_scope_lens.errors import LayerOutOfRange, TooLittleData
from qwen_scope_lens.features import statistics
from qwen_scope_lens.features.best_entries import Best, place_hash
from qwen_scope_lens.features.cofiring import LEAST, Cofiring
from qwen_scope_lens.features.statistics import BIN_EDGES
from qwen_scope_lens.stores import FeatureStore, blocks

D_SAE = 40


@dataclass(frozen=True)
class Planted:
    """What was put into the store, token by token."""

    dense: np.ndarray  # float32 [n_tokens, d_sae], as float16 keeps it
    lengths: list[int]
    doc: np.ndarray
    position: np.ndarray
    keep: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        """The rows that count, the others zero."""
        return np.where(self.keep[:, None], self.dense, 0)


@pytest.fixture(scope="module")
def planted() -> Planted:
    rng = np.random.default_rng(1)
    dense = random_codes(0, 400, D_SAE, popular=2.0).astype(np.float16).astype(np.float32)
    dense[:, 7] = 0  # dead
    lengths = [100, 1, 1, 50, *rng.multinomial(248, [1 / 20] * 20).tolist()]
    position = np.concatenate([np.arange(n) for n in lengths])
    keep = (rng.random(400) > 0.1) & (position > 0)
    return Planted(dense, lengths, np.repeat(np.arange(len(lengths)), lengths), position, keep)


@pytest.fixture(scope="module")
def store(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("statistics") / "store"
    extreme = ~planted.keep & (planted.position > 0)
    return store_of_dense(folder, {6: planted.dense}, planted.lengths, extreme=extreme)


def test_counts_are_those_of_the_dense_matrix(planted: Planted, store: FeatureStore) -> None:
    found = statistics(store, 6, examples=5)
    x = planted.counted
    fires = x > 0
    assert found.n_tokens == planted.keep.sum()
    assert (found.token_count == fires.sum(0)).all()
    np.testing.assert_allclose(found.total, x.sum(0), rtol=1e-6)
    assert (found.maximum == x.max(0)).all()
    docs = [[fires[planted.doc == d, f].any() for d in range(store.n_docs)] for f in range(D_SAE)]
    assert (found.doc_count == np.sum(docs, axis=1)).all()
    assert found.dead[7]
    assert found.mean_active[7] == 0
    assert (found.dead == (fires.sum(0) == 0)).all()
    assert found.l0 == pytest.approx(fires.sum() / planted.keep.sum())
    for f in range(D_SAE):
        expected = np.histogram(x[fires[:, f], f].astype(np.float32), BIN_EDGES)[0]
        assert (found.histogram[f] == expected).all()
    frame = found.to_pandas().set_index("feature").sort_index()
    assert (frame["tokens"] == found.token_count).all()
    assert (frame["of documents"] == found.document_frequency).all()
    assert repr(found).count("\n") == 8
    assert found.table(1).rows[0][1] == found.token_count.max()


@pytest.mark.parametrize(("block", "shard_docs"), [(1, 16), (13, 1), (37, 7), (1000, 1000)])
def test_block_borders_change_nothing(
    planted: Planted,
    store: FeatureStore,
    block: int,
    shard_docs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = statistics(store, 6, examples=4)
    monkeypatch.setattr(blocks, "BLOCK_TOKENS", block)
    extreme = ~planted.keep & (planted.position > 0)
    other = store_of_dense(
        tmp_path / "other",
        {6: planted.dense},
        planted.lengths,
        extreme=extreme,
        shard_docs=shard_docs,
    )
    b = statistics(other, 6, examples=4)
    for name, value in vars(a).items():
        if name == "total":  # a sum, in another order
            np.testing.assert_allclose(value, getattr(b, name), rtol=1e-12)
        else:
            np.testing.assert_array_equal(value, getattr(b, name))


def test_top_examples_are_the_strongest_token_of_each_document(
    planted: Planted, store: FeatureStore
) -> None:
    found = statistics(store, 6, examples=5)
    x = planted.counted
    for f in range(D_SAE):
        best: dict[int, tuple[float, int]] = {}
        for row in np.flatnonzero(x[:, f]):
            place = (-float(x[row, f]), int(planted.position[row]))
            doc = int(planted.doc[row])
            best[doc] = min(best.get(doc, place), place)
        expected = sorted((value, doc, position) for doc, (value, position) in best.items())[:5]
        shown = [(-e.value, e.doc, e.position) for e in found.top_examples(f)]
        assert shown == [(pytest.approx(v), d, p) for v, d, p in expected]


def test_a_small_buffer_gives_the_same_best() -> None:
    rng = np.random.default_rng(3)
    n = 3000
    feature, doc = rng.integers(0, 6, n), np.sort(rng.integers(0, 90, n))
    position = rng.permutation(n)
    value = rng.integers(1, 12, n).astype(np.float32)
    for one_per_doc in (True, False):
        results = []
        for pending in (1, 10**9):
            best = Best(6, 7, one_per_doc, pending)
            for at in np.array_split(np.arange(n), 60):
                best.add(feature[at], doc[at], position[at], value[at], value[at])
            results.append(best.result())
        for a, b in zip(*results, strict=True):
            assert (a == b).all()


def test_the_sample_is_uniform_and_the_same_in_any_order() -> None:
    doc, position = np.divmod(np.arange(20_000), 100)
    value = np.linspace(1, 9, 20_000).astype(np.float32)
    key = place_hash(doc, position, np.zeros(20_000, dtype=np.int64))
    results = []
    for order in (np.arange(20_000), np.random.default_rng(0).permutation(20_000)):
        best = Best(1, 400, one_per_doc=False, pending=3000)
        for at in np.array_split(order, 20):
            best.add(np.zeros(len(at), int), doc[at], position[at], value[at], key[at])
        results.append(best.result())
    assert all((a == b).all() for a, b in zip(*results, strict=True))
    drawn = results[0][2][0]
    assert drawn.mean() == pytest.approx(5.0, abs=0.4)  # three standard errors
    assert drawn.std() == pytest.approx(2.31, abs=0.25)


def test_quantile_examples_run_from_the_weakest_to_the_strongest(store: FeatureStore) -> None:
    found = statistics(store, 6, sample=10)
    busy = int(found.token_count.argmax())
    low, middle, high = (e.value for e in found.quantile_examples(busy, [0, 0.5, 1]))
    assert low < middle < high
    assert found.quantile_examples(7, [0.5]) == []


def test_partners_are_those_of_brute_force(planted: Planted, store: FeatureStore) -> None:
    found = statistics(store, 6, partners=6)
    fires = planted.counted[planted.keep] > 0
    both = fires.T.astype(int) @ fires.astype(int)
    alone = np.diag(both)
    for f in range(D_SAE):
        union = alone[f] + alone - both[f]
        score = np.divide(both[f], union, out=np.zeros(D_SAE), where=union > 0)
        order = sorted((-score[g], g) for g in range(D_SAE) if g != f and both[f, g] >= LEAST)[:6]
        assert [g for _, g in order] == [g for g in found.partner[f] if g >= 0]
        assert [both[f, g] for _, g in order] == found.partner_count[f][: len(order)].tolist()
    a, b, n, score = found.top_pairs(1)[0]
    assert a < b
    assert n == both[a, b]
    assert score == pytest.approx(both[a, b] / (alone[a] + alone[b] - both[a, b]))


def test_pairs_on_a_sample_of_tokens_stay_bounded_and_close() -> None:
    codes = random_codes(5, 6000, 12, k=4)
    indices = np.argsort(-codes, axis=1)[:, :4].astype(np.int32)
    active = np.take_along_axis(codes, indices, 1) > 0
    few, all_of_them = Cofiring(12, most_tokens=1000), Cofiring(12, most_tokens=10**6)
    for at in np.array_split(np.arange(6000), 30):
        for pairs in (few, all_of_them):
            pairs.add(at // 50, at % 50, indices[at], active[at])
    partner, count, jaccard, tokens = few.partners(11)
    full, _, full_jaccard, n = all_of_them.partners(11)
    assert (tokens, n) == (1000, 6000)
    for f in range(12):
        a = dict(zip(partner[f].tolist(), jaccard[f].tolist(), strict=True))
        b = dict(zip(full[f].tolist(), full_jaccard[f].tolist(), strict=True))
        assert all(abs(a.get(g, 0) - b[g]) < 0.08 for g in b)
    assert count.max() <= 1000


def test_some_documents_only_and_what_is_refused(planted: Planted, store: FeatureStore) -> None:
    part = statistics(store, 6, docs=[0, 3])
    assert part.n_docs == 2
    assert part.n_tokens == planted.keep[np.isin(planted.doc, [0, 3])].sum()
    assert set(part.top_doc[part.top_doc >= 0]) <= {0, 3}
    with pytest.raises(TooLittleData):
        statistics(store, 6, docs=[])
    with pytest.raises(LayerOutOfRange):
        part.top_examples(D_SAE)
