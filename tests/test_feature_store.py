"""The store on disk: both views agree with the planted codes, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from feature_stores import LAYER, build_store, random_documents
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import (
    BadFile,
    BadQuery,
    LayerOutOfRange,
    StoreDamaged,
    StoreMismatch,
    UnknownName,
)
from qwen_scope_lens.features import pool
from qwen_scope_lens.stores import FeatureStore, merge, pack
from qwen_scope_lens.stores.codec import Packed, stored_values
from qwen_scope_lens.stores.inspect import check

LANGS = ["zh", "en", None, "zh", "de"] * 8


@pytest.fixture(scope="module")
def documents() -> list[qsl.SparseCodes]:
    docs = random_documents(40, n_tokens=9)
    return [document[: 1 + i % 9] for i, document in enumerate(docs)]


@pytest.fixture(scope="module")
def store(
    documents: list[qsl.SparseCodes], tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    folder = tmp_path_factory.mktemp("planted") / "store"
    return build_store(
        folder, documents, {"lang": LANGS, "stars": list(range(40))}, extreme=[(8, 2), (20, 1)]
    )


def dense(documents: list[qsl.SparseCodes]) -> np.ndarray:
    """`[tokens, d_sae]`, as it should be stored."""
    rows = torch.cat([document.to_dense() for document in documents]).numpy()
    return stored_values(rows)


def test_rows_are_what_was_planted(store: FeatureStore, documents: list[qsl.SparseCodes]) -> None:
    truth = dense(documents)
    blocks = list(store.iter_blocks(LAYER))
    found = torch.cat([block.codes.to_dense() for block in blocks]).numpy()
    assert np.array_equal(found, truth)
    lengths = [len(document) for document in documents]
    doc = np.concatenate([block.doc for block in blocks])
    assert np.array_equal(doc, np.repeat(np.arange(40), lengths))
    position = np.concatenate([block.position for block in blocks])
    assert np.array_equal(position, np.concatenate([np.arange(n) for n in lengths]))
    keep = np.concatenate([block.keep for block in blocks])
    assert np.array_equal(
        keep, (position > 0) & ~((doc == 8) & (position == 2)) & ~((doc == 20) & (position == 1))
    )
    assert store.n_docs == 40
    assert store.n_tokens == len(truth)
    assert store.n_nonzero(LAYER) == (truth > 0).sum()


def test_features_are_the_same_numbers(
    store: FeatureStore, documents: list[qsl.SparseCodes]
) -> None:
    truth = dense(documents)
    doc = np.repeat(np.arange(40), [len(document) for document in documents])
    for feature in (0, 5, 511, 1023):
        hits = store.by_feature((LAYER, feature))
        rows = truth[:, feature].nonzero()[0]
        assert np.array_equal(hits.doc, doc[rows])
        assert np.array_equal(hits.value, truth[rows, feature])
        assert np.array_equal(hits.keep, store.keep_at(LAYER, hits.doc, hits.position))
    ref = f"mini-qwen3/w1k-l0-16/{LAYER}/5"
    assert np.array_equal(store.by_feature(ref).doc, store.by_feature((LAYER, 5)).doc)


def test_shards_with_and_without_firing(
    store: FeatureStore, documents: list[qsl.SparseCodes], tmp_path: Path
) -> None:
    """An older store has no `firing.npy`, and answers the same; a wrong one is found."""
    truth = (dense(documents) > 0).sum(0)
    assert np.array_equal(store.hit_counts(LAYER), truth)
    old = tmp_path / "old"
    shutil.copytree(store.path, old)
    for path in old.glob("shards/*/shard.json"):
        facts = json.loads(path.read_text())
        del facts["files"][f"layer{LAYER}/firing.npy"]
        path.write_text(json.dumps(facts))
        (path.parent / f"layer{LAYER}" / "firing.npy").unlink()
    older = FeatureStore.open(old)
    assert older.shards[0].firing(LAYER) is None
    assert np.array_equal(older.hit_counts(LAYER), truth)
    for feature in range(0, 1024, 61):
        ours, theirs = (each.by_feature((LAYER, feature)) for each in (store, older))
        assert len(ours) == truth[feature]
        for name in ("doc", "position", "value", "keep"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert merge([old], tmp_path / "new", shard_docs=20).shards[0].firing(LAYER) is not None
    shutil.copytree(store.path, tmp_path / "wrong")
    path = tmp_path / "wrong" / "shards" / "00000" / f"layer{LAYER}" / "firing.npy"
    feature, start = np.load(path)
    start[5:] += 1
    np.save(path, np.stack([feature, start]))
    wrong = FeatureStore.open(tmp_path / "wrong")
    with pytest.raises(StoreDamaged, match=r"says that feature .* hits"):
        wrong.by_feature((LAYER, int(feature[4])))
    assert check(wrong.path)


def test_keep_of_some_tokens_is_that_of_all(store: FeatureStore) -> None:
    for shard in store.shards:
        rows = np.random.default_rng(0).permutation(shard.n_tokens)[:20]
        assert np.array_equal(shard.keep_rows(LAYER, rows), shard.keep(LAYER)[rows])


def test_some_documents_only(store: FeatureStore, documents: list[qsl.SparseCodes]) -> None:
    [block] = store.iter_blocks(LAYER, docs=[3, 1, 3])
    assert block.doc.tolist() == [1, 1, 3, 3, 3, 3]
    kept = list(store.iter_blocks(LAYER, keep=True, docs=[0, 8]))
    assert np.concatenate([block.doc for block in kept]).tolist() == [8] * 7
    assert list(store.iter_blocks(LAYER, docs=[])) == []
    with pytest.raises(LayerOutOfRange, match="document 40"):
        next(store.iter_blocks(LAYER, docs=[40]))


def test_one_document(store: FeatureStore, documents: list[qsl.SparseCodes]) -> None:
    block = store.by_token(8)
    assert np.array_equal(block.codes.to_dense().numpy(), dense([documents[8]]))
    assert block.tokens == [f"w{i} " for i in range(9)]
    text = store.documents(["text"])["text"][8].as_py()
    assert [text[a:b] for a, b in block.spans] == block.tokens
    assert np.array_equal(block.spans, store.spans(8))
    with pytest.raises(LayerOutOfRange):
        store.by_token(8, layer=3)


def test_chosen_tokens(store: FeatureStore, documents: list[qsl.SparseCodes]) -> None:
    found = store.codes_at(LAYER, [30, 2, 30], [3, 0, 0]).to_dense().numpy()
    wanted = [dense([documents[d]])[p] for d, p in ((30, 3), (2, 0), (30, 0))]
    assert np.array_equal(found, np.stack(wanted))
    assert np.array_equal(store.matrix_at(LAYER, [30, 2, 30], [3, 0, 0]).toarray(), found)
    with pytest.raises(LayerOutOfRange, match="no token 9"):
        store.codes_at(LAYER, [30], [9])
    assert len(store.codes_at(LAYER, [], [])) == 0
    assert store.matrix_at(LAYER, [], []).shape == (0, store.sae(LAYER).d_sae)


def test_labels(store: FeatureStore) -> None:
    assert store.label_names == ("lang", "stars")
    assert store.labels("lang").tolist() == LANGS
    assert store.labels("stars").tolist() == list(range(40))
    with pytest.raises(UnknownName, match="it has lang, stars"):
        store.labels("tone")
    with pytest.raises(UnknownName, match="no column"):
        store.documents(["nothing"])


def test_sql(store: FeatureStore) -> None:
    answer = store.sql(
        "select d.lang, count(*) n from features f join documents d using (doc)"
        " where f.feature < 50 and lang is not null group by 1 order by 1"
    )
    hits = [store.by_feature((LAYER, feature)).doc for feature in range(50)]
    langs = store.labels("lang")[np.concatenate(hits)]
    assert answer.to_pylist() == [
        {"lang": lang, "n": int((langs == lang).sum())} for lang in ("de", "en", "zh")
    ]
    tokens = store.sql("select count(*) n, sum(extreme_6::int) e from tokens").to_pylist()
    assert tokens == [{"n": store.n_tokens, "e": 2}]


@pytest.mark.parametrize(
    "query",
    [
        "selekt 1",
        "",
        "select 1; select 2",
        "select nothing from features",
        "copy features to 'x.parquet'",
        "drop view features",
        "select * from read_csv('/etc/passwd')",
        "attach 'x.db'",
        "select " + "(" * 3000,  # before: minutes
        "select list(range) from range(1000000000)",  # before: all memory
    ],
)
def test_bad_sql_is_one_line(store: FeatureStore, query: str, tmp_path: Path) -> None:
    with pytest.raises(BadQuery) as caught:
        store.sql(query, 64 * 2**20)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert not list(store.path.glob("x*"))


def test_readable_without_this_package(store: FeatureStore) -> None:
    folder = store.path / "shards" / "00001"
    table = pq.read_table(folder / f"layer{LAYER}" / "features.parquet")
    assert table.column_names == ["layer", "feature", "doc", "position", "value"]
    key = [table[name].to_numpy() for name in ("feature", "doc", "position")]
    assert np.array_equal(np.lexsort(key[::-1]), np.arange(len(table)))
    indices = np.load(folder / f"layer{LAYER}" / "indices.npy")
    assert indices.shape == (np.load(folder / "offsets.npy")[-1], 16)


def test_another_saes_feature_is_refused(store: FeatureStore) -> None:
    with pytest.raises(StoreMismatch, match=r"mini-qwen3.5/w1k-l0-16/6,.*mini-qwen3/w1k-l0-16/6"):
        store.by_feature("mini-qwen3.5/w1k-l0-16/6/5")
    with pytest.raises(LayerOutOfRange):
        store.by_feature((LAYER, 1024))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "1" * 64}, r"another SAE: mini-qwen3/w1k-l0-16/6: sha256 0+.. against 1+.."),
        ({"ref": "mini-qwen3.5/w1k-l0-16/6"}, r"mini-qwen3/\S+ against mini-qwen3.5/w1k-l0-16/6"),
        ({"subtracts_b_dec": True}, "subtracts_b_dec False against True"),
        ({"k": 8}, "k 16 against 8"),
    ],
)
def test_stores_of_different_saes_do_not_merge(
    store: FeatureStore, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    saes = {LAYER: replace(store.sae(LAYER), **changes)}
    other = build_store(tmp_path / "other", [[{1: 1.0}]], saes=saes)
    with pytest.raises(StoreMismatch, match=message):
        merge([store.path, other.path], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_edited_manifest_is_named(store: FeatureStore, tmp_path: Path) -> None:
    build_store(tmp_path, [[{1: 1.0}]])
    path = tmp_path / "manifest.json"
    whole = path.read_text()
    for content, message in (
        (whole.replace("d_model", "width"), "lacks or mistypes"),
        (whole.replace('"version": 1', '"version": 99'), "version 99"),
        (whole[:100], "cannot be read as JSON"),
    ):
        path.write_text(content)
        with pytest.raises(BadFile, match=message):
            FeatureStore.open(tmp_path)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="not a feature store"):
        FeatureStore.open(tmp_path)


def test_half_a_store_is_a_prefix(documents: list[qsl.SparseCodes], tmp_path: Path) -> None:
    store = build_store(tmp_path / "half", documents, only_shards=1)
    assert (store.n_docs, store.is_complete) == (16, False)
    with pytest.raises(LayerOutOfRange, match="not complete"):
        store.spans(20)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(0, 2.0**127, width=32, allow_subnormal=False), min_size=4, max_size=4),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([64, 100_000]),
)
def test_packing(rows: list[list[float]], d_sae: int) -> None:
    """Eleven significant bits or float16's absolute precision; legal order; slices and gathers."""
    values = torch.tensor(rows).sort(descending=True).values
    indices = torch.arange(4).flip(0).repeat(len(rows), 1) * (d_sae // 5)
    codes = qsl.SparseCodes(values, indices.int().masked_fill(values == 0, 0), d_sae)
    packed = pack(codes)
    back = packed.unpack()
    assert torch.equal(back.l0, codes.l0)
    for row in range(len(rows)):
        truth = dict(zip(codes.indices[row].tolist(), values[row].tolist(), strict=True))
        entries = list(zip((-back.values[row]).tolist(), back.indices[row].tolist(), strict=True))
        active = [entry for entry in entries if entry[0] < 0]
        assert active == sorted(active)
        for value, index in active:
            exact = truth[index]
            assert abs(-value - exact) <= max(exact * 2**-11, 6e-8)
    assert pack(back).unpack() == back
    half = len(rows) // 2
    assert Packed.cat([packed.rows(0, half), packed.rows(half, len(rows))]).unpack() == back
    order = np.arange(len(rows))[::-1].copy()
    assert packed.take(order).unpack() == back[torch.from_numpy(order)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("how", ["max", "mean", "any", "last"])
def test_pool(store: FeatureStore, documents: list[qsl.SparseCodes], how: str, keep: bool) -> None:
    """Against plain loops over dense rows."""
    wanted = np.zeros((40, 1024), np.float32)
    for doc, codes in enumerate(documents):
        rows = dense([codes])
        if how == "last":
            wanted[doc] = rows[-1]
            continue
        if keep:
            out = {8: [0, 2], 20: [0, 1]}.get(doc, [0])
            rows = np.delete(rows, [i for i in out if i < len(rows)], axis=0)
        if len(rows):
            wanted[doc] = {"max": rows.max(0), "mean": rows.mean(0), "any": (rows > 0).any(0)}[how]
    found = pool(store, LAYER, how, keep)  # type: ignore[arg-type]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), wanted, rtol=1e-6)
    some = pool(store, LAYER, how, keep, docs=[39, 0, 17])  # type: ignore[arg-type]
    assert np.array_equal(some.toarray(), found.toarray()[[39, 0, 17]])
