"""What reads a store's texts again does it as the store was made, in every room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qwen_scope_lens as qsl
from qwen_scope_lens.bench import extract_suite
from qwen_scope_lens.bench.screen import footprint_like
from qwen_scope_lens.bench.suite import open_benchmark
from qwen_scope_lens.classify import open_reader
from qwen_scope_lens.classify.pooled import source_of_store
from qwen_scope_lens.compare.fidelity import fidelity
from qwen_scope_lens.compare.sources import both_fvu
from qwen_scope_lens.errors import BadFile, LayerOutOfRange
from qwen_scope_lens.stores import FeatureStore, StoreReader, extract, pooled_residuals
from qwen_scope_lens.stores.corpus import Document
from qwen_scope_lens.train import mean_pre_activations

GROUP, LAYERS, LIMIT, RATIO = "mini-qwen3/w1k-l0-16", [1, 6], 14, 1.2
TEXTS = [
    "今天天气很好。" * 3,
    "The weather is fine today, said the man who had seen many days like this one before.",
    "Die Sonne scheint, und der Wind weht heute nicht.",
    "x",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return qsl.load_model("mini-qwen3", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Made with everything that a default would get wrong: bfloat16, a limit, another ratio."""
    return extract(
        TEXTS,
        model="mini-qwen3",
        group=GROUP,
        layers=LAYERS,
        out=tmp_path_factory.mktemp("reread") / "store",
        max_tokens=LIMIT,
        extreme_norm_ratio=RATIO,
        dtype=torch.bfloat16,
        progress=False,
    )


@pytest.fixture(scope="module")
def captured(model: Any) -> Any:
    found = qsl.capture(
        model, TEXTS, LAYERS, max_tokens=LIMIT, truncate=True, extreme_norm_ratio=RATIO
    )
    assert any(found.truncated)
    assert found.extreme[1].any()
    return found


def test_a_reading_gives_the_store_again(store: FeatureStore, captured: Any) -> None:
    reading = StoreReader.of(store)
    assert (reading.layers, reading.dtype) == (tuple(LAYERS), "bfloat16")
    model = reading.open_model()
    assert next(model.parameters()).dtype == torch.bfloat16
    for batch in reading.captures(model, TEXTS):
        for i, number in enumerate(batch.doc_ids):
            rows = slice(*batch.offsets[i : i + 2].tolist())
            assert batch.token_ids[rows].tolist() == store.token_ids(number).tolist()
            there = store.by_token(number, 1)
            assert batch.keep(1)[rows].tolist() == there.keep.tolist()
    with pytest.raises(LayerOutOfRange, match="layer 2"):
        StoreReader.of(store, [2])


def test_residuals_beside_a_ranking_are_the_store_s(store: FeatureStore, captured: Any) -> None:
    means, last = pooled_residuals(store), pooled_residuals(store, [1], last=True)
    for doc in range(len(TEXTS)):
        one = captured.doc(doc)
        for layer in LAYERS:
            x = one.residuals[layer].float()
            kept = x[one.keep(layer)]
            expected = kept.mean(0) if len(kept) else torch.zeros(x.shape[1])
            np.testing.assert_allclose(means[layer][doc], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(last[1][doc], one.residuals[1][-1].float())


def test_language_features_stand_where_the_store_s_model_puts_them(
    store: FeatureStore, captured: Any
) -> None:
    refs = [qsl.FeatureRef.parse(f"{GROUP}/1/{n}") for n in (3, 40)]
    found = mean_pre_activations(store, refs, {"all": np.arange(len(TEXTS))})
    x = captured.residuals[1][captured.keep(1)].float()
    sae = qsl.load_sae(f"{GROUP}/1")
    for ref in refs:
        expected = float(sae.pre_activations(x, ref.feature).double().mean())
        assert found[ref]["all"] == pytest.approx(expected, rel=1e-4)


def test_a_classifier_s_reader_has_the_store_s_model(store: FeatureStore, captured: Any) -> None:
    reader = open_reader(source_of_store(store, LAYERS))
    assert next(reader.model.parameters()).dtype == torch.bfloat16
    kept = sum(int(batch.keep(1).sum()) for batch in reader.captures(TEXTS))
    assert kept == int(captured.keep(1).sum())


def test_unexplained_variance_is_that_of_the_store_s_tokens(
    store: FeatureStore, model: Any
) -> None:
    saes = {1: qsl.load_sae(f"{GROUP}/1")}
    [expected] = fidelity(
        model, saes, TEXTS, losses=False, max_tokens=LIMIT, extreme_norm_ratio=RATIO
    ).values()
    plain = fidelity(model, saes, TEXTS, losses=False, max_tokens=LIMIT)[1]
    assert expected.fvu != plain.fvu
    assert both_fvu(store, store, [1], len(TEXTS))[1] == (expected.fvu, expected.fvu)


def test_candidates_of_a_benchmark_are_read_like_it(model: Any, tmp_path: Path) -> None:
    items = {"own": [Document(str(n), text) for n, text in enumerate(TEXTS[:3])]}
    how: dict[str, Any] = {"max_tokens": LIMIT, "truncate": True, "extreme_norm_ratio": RATIO}
    facts = {"own": {"template": "{text}"}}
    extract_suite(items, model, GROUP, [6], tmp_path / "suite", facts, progress=False, **how)
    path = tmp_path / "again.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:3]), "utf-8")
    own = open_benchmark(tmp_path / "suite" / "own")
    found = footprint_like(own, path, 6, "any")
    assert (found.items != own.footprint(6, "any").items).nnz == 0


def test_the_revision_goes_where_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "qwen_scope_lens.models.open.open_model", lambda name, **how: asked.update(how, name=name)
    )
    StoreReader("some/model", (2, 5), dtype="bfloat16", revision="abc").open_model(device="cpu")
    assert asked == {
        "name": "some/model",
        "up_to_layer": 5,
        "dtype": torch.bfloat16,
        "revision": "abc",
        "device": "cpu",
    }
    assert StoreReader("m", (1,), dtype="uint8").load_options["dtype"] is None  # quantised weights
    for edited in ("float33", "nn"):
        with pytest.raises(BadFile, match=edited):
            _ = StoreReader("m", (1,), dtype=edited).load_options
