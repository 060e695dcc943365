"""Labels by meaning: embeddings of a local model and of an endpoint, kept in blocks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from endpoint_server import Call, Server

import qwen_scope_lens as qsl
from qwen_scope_lens.concepts import find
from qwen_scope_lens.errors import CheckpointMissing, GeneratorFailed, TooLittleData, UnknownName
from qwen_scope_lens.labels import Label, LabelPack, by_meaning, open_embedder
from qwen_scope_lens.labels.embeddings import BLOCK, LocalEmbedder, embedded
from qwen_scope_lens.mini import model_path

SAE = qsl.LayerRef("mini-qwen3/w1k-l0-16", 6)
WORDS = ("snow", "winter weather", "a sum of numbers")


class Counted:
    """Three directions: cold things, sums, all else. Counts the texts that it is given."""

    key, query = "counted", ""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def embed(self, texts: Sequence[str]) -> Any:
        self.texts += texts
        cold = [any(word in text for word in ("snow", "winter")) for text in texts]
        sums = ["sum" in text for text in texts]
        return np.array([[3.0 * c, s, 0.1] for c, s in zip(cold, sums, strict=True)], np.float32)


def test_vectors_are_kept_in_blocks(tmp_path: Path) -> None:
    model, texts = Counted(), [f"snow {n}" for n in range(BLOCK + 3)]
    first = embedded(texts, model, tmp_path)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-6)
    files = sorted(tmp_path.rglob("*.npy"), key=lambda path: path.stat().st_size)
    assert len(files) == 2
    files[0].write_bytes(b"cut off")
    assert (embedded(texts, model, tmp_path) == first).all()
    assert model.texts == [*texts, *texts[BLOCK:]]  # only the damaged block again


def test_find_reads_labels_by_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pack = LabelPack(
        [Label(SAE.feature(3), "winter weather"), Label(SAE.feature(5), "a sum of numbers")]
    )
    found = by_meaning(pack, "snow", Counted(), tmp_path)
    assert found[SAE.feature(3)] == pytest.approx(1, abs=1e-5)
    assert found[SAE.feature(5)] < 0.1
    how: dict[str, Any] = {"layers": 6, "labels": pack, "promoted": 0}
    both = find("snow", embedder=Counted(), columns=["labels", "meaning"], **how)
    assert both.refs[0] == SAE.feature(3)
    assert both.rows[0].score == pytest.approx(1.0)  # half of the weight of labels: BM25 has none
    assert both.rows[0].meaning == pytest.approx(1, abs=1e-5)
    with pytest.raises(TooLittleData, match="a model for embeddings"):
        find("snow", columns=["meaning"], **how)


def test_a_dead_endpoint_is_known_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module = sys.modules["qwen_scope_lens.concepts.find"]  # `find` is the function's name, too
    monkeypatch.setattr(module, "layers_of", lambda *_: pytest.fail("late"))
    with Server(lambda call: {"data": []}) as server:
        url = server.url
    dead = open_embedder(f"openai:{url}#good", backoff=0.0)
    pack = LabelPack([Label(SAE.feature(3), "winter weather")])
    with pytest.raises(GeneratorFailed, match="no connection"):
        find("snow", labels=pack, embedder=dead)


def test_poolings_of_a_local_model() -> None:
    folder = model_path("mini-qwen3")
    text = "snow and ice"
    bridge = qsl.load_model("mini-qwen3")
    with torch.no_grad():
        ids = bridge.to_tokens(text)
        states = bridge.original_model.model(ids).last_hidden_state[0].numpy()
    wanted = {"mean": states.mean(0), "last": states[-1], "first": states[0]}
    for pooling, vector in wanted.items():
        found = open_embedder(str(folder), pooling).embed([text, text * 3])  # type: ignore[arg-type]
        np.testing.assert_allclose(found[0], vector, rtol=1e-3, atol=1e-3)
    keys = {LocalEmbedder(folder, pooling).key for pooling in ("mean", "last")}
    assert len(keys) == 2
    with pytest.raises(UnknownName, match="pooling"):
        LocalEmbedder(folder, "max")  # type: ignore[arg-type]


def test_nothing_is_downloaded() -> None:
    with pytest.raises(CheckpointMissing, match="Nothing is downloaded"):
        open_embedder("Qwen/Qwen3-Embedding-0.6B")
    with pytest.raises(UnknownName, match="does not name a model"):
        open_embedder("openai:http://localhost/v1")


def test_an_endpoint_gives_vectors() -> None:
    def behave(call: Call) -> dict[str, Any]:
        rows = [
            {"index": n, "embedding": [float(len(text)), 1.0]}
            for n, text in enumerate(call.body["input"])
        ]
        return {"data": rows[::-1]} if call.body["model"] == "good" else {"data": rows[1:]}

    with Server(behave) as server:
        found = open_embedder(f"openai:{server.url}#good").embed(WORDS)
        assert found.tolist() == [[len(text), 1.0] for text in WORDS]
        assert server.calls[0].path == "/v1/embeddings"
        with pytest.raises(GeneratorFailed, match="2 embeddings for 3 texts"):
            open_embedder(f"openai:{server.url}#bad").embed(WORDS)
