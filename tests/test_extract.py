"""From documents to a store: right codes, resumable, refusing what does not belong together."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from feature_stores import GROUP, LAYER
from forks import forked
from tiny_models import before_each_run

import qwen_scope_lens as qsl
from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.errors import (
    BadCorpus,
    BadText,
    CannotWrite,
    CheckpointMissing,
    LayerOutOfRange,
    StoreMismatch,
    TooLittleData,
    WrongModel,
)
from qwen_scope_lens.features import pool
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.saes import LayerSAE, mapped
from qwen_scope_lens.stores import FeatureStore, extraction, fingerprints, merge
from qwen_scope_lens.stores import shard_files as shards
from qwen_scope_lens.stores.codec import stored_values
from qwen_scope_lens.stores.merge import check

LAYERS = (2, LAYER)
ROWS = [
    {"key": str(r["id"]), "text": r["text"][: 30 + 17 * i], "lang": r["lang"], "n": i}
    for i, r in zip(range(11), heldout(), strict=False)
]


@pytest.fixture(scope="module")
def model() -> Any:
    return qsl.load_model("mini-qwen3", up_to_layer=LAYER)


def run(model: Any, out: Path, rows: Any = ROWS, **options: Any) -> FeatureStore:
    settings: dict[str, Any] = {"max_tokens": 48, "shard_docs": 3, "progress": False} | options
    return qsl.extract(rows, model=model, group=GROUP, out=out, **{"layers": LAYERS} | settings)


@pytest.fixture(scope="module")
def store(model: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return run(model, tmp_path_factory.mktemp("mini") / "store")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".lock" not in path.name
    }


def test_codes_are_those_of_capture_and_encode(store: FeatureStore, model: Any) -> None:
    """One document alone through the model: same features, values to rounding."""
    texts = store.documents(["text"])["text"].to_pylist()
    assert texts == [row["text"] for row in ROWS]
    for layer in store.layers:
        sae = qsl.load_sae(f"{GROUP}/{layer}")
        for doc in range(store.n_docs):
            read = qsl.capture(model, [texts[doc]], [layer], max_tokens=48, truncate=True)
            truth = sae.encode_sparse(read.residuals[layer]).to_dense().numpy()
            found = store.by_token(doc, layer)
            np.testing.assert_allclose(
                found.codes.to_dense().numpy(), stored_values(truth), rtol=2e-3, atol=2e-3
            )
            assert found.token_ids.tolist() == read.token_ids.tolist()
            assert found.keep.tolist() == read.keep(layer).tolist()
            assert [tuple(span) for span in found.spans.tolist()] == list(read.char_spans[0] or ())
            assert set(found.layers) == set(LAYERS)


def test_labels_and_manifest(store: FeatureStore) -> None:
    assert store.is_complete
    assert store.labels("n").tolist() == list(range(11))
    assert store.labels("lang").tolist() == [row["lang"] for row in ROWS]
    assert store.documents(["key"])["key"].to_pylist() == [row["key"] for row in ROWS]
    assert store.manifest.model.id == "mini-qwen3"
    assert store.sae(LAYER).ref == f"{GROUP}/{LAYER}"
    assert store.manifest.settings.max_tokens == 48
    assert any(store.documents(["truncated"])["truncated"].to_pylist())
    assert pool(store, LAYER).shape == (11, 1024)


def test_batches_are_encoded_together_or_one_by_one(
    store: FeatureStore, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = LayerSAE.encode_sparse

    def counted(sae: LayerSAE, x: Any) -> Any:
        sizes.append(len(x))
        return encode(sae, x)

    monkeypatch.setattr(LayerSAE, "encode_sparse", counted)
    for together in (1, 200):
        monkeypatch.setattr(extraction, "TOGETHER", together)
        run(model, tmp_path / str(together), token_budget=96)
        sizes.append(-together)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "200")
    one, many = sizes[: sizes.index(-1)], sizes[sizes.index(-1) + 1 : -1]
    assert sum(one) == sum(many) == 2 * store.n_tokens
    assert len(many) < len(one)


def test_the_last_token_alone_is_encoded_and_kept(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    read: list[weakref.ref[Any]] = []
    alive: list[int] = []
    encode, captures = LayerSAE.encode_sparse, extraction.iter_captures

    def counted(sae: LayerSAE, x: Any) -> Any:
        encoded.append(len(x))
        return encode(sae, x)

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        for capture in captures(*arguments, **options):
            read.extend(map(weakref.ref, capture.residuals.values()))
            box = [capture]
            del capture
            yield box.pop()

    monkeypatch.setattr(LayerSAE, "encode_sparse", counted)
    monkeypatch.setattr(extraction, "iter_captures", watched)

    def look(texts: int, tokens: int) -> None:
        alive.append(sum(each() is not None for each in read))

    with before_each_run(model, look):
        store = run(model, tmp_path / "last", last_token=True, token_budget=96)
    assert sum(encoded) == 2 * len(ROWS) == 2 * store.n_tokens
    assert len(read) == 2 * len(alive) > 8
    assert set(alive) == {0}


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's /proc")
def test_pages_of_saes_are_given_back_after_their_turn(
    store: FeatureStore, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(mapped, "WORTH", 1)
    monkeypatch.setattr(extraction, "give_back", lambda w: given.append(mapped.give_back(w)))
    run(model, tmp_path / "store")
    assert files_of(tmp_path / "store") == files_of(store.path)
    assert len(given) == 2 * 4  # layers and shards
    assert min(given) > 200_000  # of 524,288; a page at either end may be shared with other weights
    given.clear()
    run(model, tmp_path / "one", layers=[LAYER])
    assert given == []


def test_a_tokenizers_hash_is_over_its_sorted_json(model: Any) -> None:
    """As older stores have it, with and without spaces in the JSON."""
    backend = model.tokenizer.backend_tokenizer
    expected = json.loads(backend.to_str())
    del expected["truncation"], expected["padding"]
    text = json.dumps(expected, sort_keys=True)
    assert fingerprints.tokenizer_hash(model.tokenizer) == hashlib.sha256(text.encode()).hexdigest()
    for pretty in (False, True):
        assert fingerprints.sorted_json(backend.to_str(pretty=pretty)) == text
    odd = {"b": [], "a": {}, "c": {"é": [["]", "{"], [1]], "A": None}, "padding": 1}
    compact = json.dumps(odd, separators=(",", ":"), ensure_ascii=False)
    del odd["padding"]
    assert fingerprints.sorted_json(compact) == json.dumps(odd, sort_keys=True)


# Killed, stopped, damaged.


SMALL: dict[str, Any] = {"rows": ROWS[:3], "shard_docs": 2, "max_tokens": 12, "layers": [2]}


def dying(step: int, model: Any, out: Path) -> None:
    """An extraction that kills itself at its `step`-th act on the disk."""
    acts = iter(range(10_000))

    def deadly(act: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*args: Any, **kwargs: Any) -> Any:
            if next(acts) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args, **kwargs)

        return acting

    np.save = deadly(np.save)
    pq.write_table = deadly(pq.write_table)
    pq.ParquetWriter.write_table = deadly(pq.ParquetWriter.write_table)
    for name in ("rename", "replace", "mkdir", "write_text"):
        setattr(Path, name, deadly(getattr(Path, name)))
    run(model, out, **SMALL)


def test_killed_at_every_step_and_started_again(model: Any, tmp_path: Path) -> None:
    """One folder; the process dies one step later each time, until it has nothing left to do."""
    undisturbed, out = run(model, tmp_path / "whole", **SMALL), tmp_path / "store"
    deaths = 0
    for step in range(100):
        if forked(lambda step=step: dying(step, model, out)) == 0:  # type: ignore[misc]
            break
        deaths += 1
        if (out / "manifest.json").exists():
            FeatureStore.open(out)  # whatever is there can be read
    assert deaths > 10
    assert files_of(out) == files_of(undisturbed.path)


def test_killed_at_any_moment(store: FeatureStore, model: Any, tmp_path: Path) -> None:
    out, draw = tmp_path / "store", random.Random(0)
    started = time.monotonic()
    assert forked(lambda: run(model, tmp_path / "undisturbed")) == 0
    took = time.monotonic() - started
    deaths = 0
    for _ in range(30):
        started = time.monotonic()
        if forked(lambda: run(model, out), draw.uniform(0.05, 0.7) * took) == -signal.SIGKILL:
            deaths += 1
        else:  # whole before the kill, as after a first run that the machine held up: begin again
            took = min(took, time.monotonic() - started)
            shutil.rmtree(out)
        if deaths == 5:
            break
    assert deaths == 5
    run(model, out)
    assert files_of(out) == files_of(store.path)
    assert check(out) == []


def test_read_while_another_process_writes(model: Any, tmp_path: Path) -> None:
    out, seen = tmp_path / "store", set()
    writer = multiprocessing.get_context("fork").Process(target=lambda: run(model, out))
    writer.start()
    while writer.is_alive():
        if (out / "manifest.json").exists():
            now = FeatureStore.open(out)
            tokens = sum(len(block) for block in now.iter_blocks(LAYER))
            assert tokens == now.n_tokens
            seen.add(now.n_docs)
    writer.join()
    assert writer.exitcode == 0
    assert seen <= {0, 3, 6, 9, 11}
    assert len(seen) > 1
    assert FeatureStore.open(out).is_complete


@pytest.mark.parametrize("what", ["lost", "changed", "cut"])
def test_a_damaged_shard_is_found_and_made_again(
    store: FeatureStore, model: Any, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(store.path, out)
    path = out / "shards" / "00001" / f"layer{LAYER}" / "values.npy"
    content = bytearray(path.read_bytes())
    if what == "lost":
        path.unlink()
    else:
        content[-1] ^= 1  # the same size
        path.write_bytes(bytes(content if what == "changed" else content[:-1]))
    [problem] = check(out)
    assert "values.npy" in problem
    run(model, out)
    assert files_of(out) == files_of(store.path)


def test_a_full_disk_loses_nothing_finished(
    store: FeatureStore, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save, calls = tmp_path / "store", np.save, iter(range(1000))

    def full(*args: Any) -> None:
        if next(calls) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(CannotWrite, match="No space left"):
        run(model, out)
    monkeypatch.undo()
    assert FeatureStore.open(out).n_docs == 3
    run(model, out)
    assert files_of(out) == files_of(store.path)


def test_out_of_memory_halves_the_batch(store: FeatureStore, model: Any, tmp_path: Path) -> None:
    def small(texts: int, tokens: int) -> None:
        if texts > 1:
            raise MemoryError

    with before_each_run(model, small), pytest.warns(UserWarning, match="out of memory"):
        alone = run(model, tmp_path / "store")
    assert alone.is_complete
    one, other = (
        np.concatenate([b.codes.to_dense().numpy() for b in s.iter_blocks(LAYER)])
        for s in (alone, store)
    )
    np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


# Shared work, and less memory.


def test_ranks_share_the_work(store: FeatureStore, model: Any, tmp_path: Path) -> None:
    together = tmp_path / "together"
    for i in (1, 0):
        run(model, together, worker=(i, 2))
    assert files_of(together) == files_of(store.path)
    parts = [tmp_path / "part0", tmp_path / "part1"]
    for i, part in enumerate(parts):
        run(model, part, worker=(i, 2))
    assert not FeatureStore.open(parts[0]).is_complete
    assert merge(parts, tmp_path / "joined").is_complete
    assert files_of(tmp_path / "joined") == files_of(store.path)


@pytest.mark.parametrize(("room", "loads"), [(0, 8), (500_000, 4), (1_000_000, 2)])
def test_one_sae_at_a_time_makes_the_same_store(
    store: FeatureStore,
    model: Any,
    tmp_path: Path,
    room: int,
    loads: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Residuals of a shard, of two, of all four wait for each of the two SAEs."""
    from qwen_scope_lens.saes import load

    read: list[Callable[[], Any]] = []
    open_sae = load.open_sae

    def loading(name: str, **options: Any) -> Any:
        assert not [sae for sae in read if sae() is not None], "two SAEs in memory"
        sae = open_sae(name, **options)
        read.append(weakref.ref(sae))
        return sae

    monkeypatch.setattr(load, "open_sae", loading)
    one = qsl.find_group(GROUP).bytes_per_layer
    run(model, tmp_path / "store", sae_memory=one + room, progress=True)
    assert len(read) == loads
    assert files_of(tmp_path / "store") == files_of(store.path)
    assert "they are loaded one at a time" in capfd.readouterr().err
    with pytest.raises(TooLittleData, match="one SAE alone"):
        run(model, tmp_path / "other", sae_memory=one - 1)


def test_two_writers(model: Any, tmp_path: Path) -> None:
    from qwen_scope_lens.files import exclusive

    with exclusive(tmp_path / "store"), pytest.raises(CannotWrite, match="another process"):
        run(model, tmp_path / "store")


# More documents.


def test_append_and_merge_give_the_same(store: FeatureStore, model: Any, tmp_path: Path) -> None:
    more = [{"text": "More of it.", "stars": 4}, {"text": "和更多。", "stars": 2}]
    appended = tmp_path / "appended"
    run(model, appended)
    both = run(model, appended, more, append=True)
    assert (both.n_docs, both.is_complete) == (13, True)
    assert both.labels("stars").tolist() == [None] * 11 + [4, 2]
    assert both.labels("lang").tolist()[10:] == [ROWS[10]["lang"], None, None]
    assert both.by_token(12).tokens[0].startswith("和")
    run(model, appended, more, append=True)  # again: nothing to do
    second = run(model, tmp_path / "second", more)
    merged = merge([store.path, second.path], tmp_path / "merged")
    assert files_of(merged.path) == files_of(appended)
    for layer in LAYERS:
        assert both.sql(f"select count(*) n from features where layer = {layer}").to_pylist() == [
            {"n": both.n_nonzero(layer)}
        ]
    large = merge([merged.path], tmp_path / "large", shard_docs=100)
    assert len(large.shards) == 2
    for feature in (3, 77):
        one, other = (s.by_feature((LAYER, feature)) for s in (large, both))
        assert one.doc.tolist() == other.doc.tolist()
        assert one.value.tolist() == other.value.tolist()
    with pytest.raises(StoreMismatch, match="in two of the stores"):
        merge([store.path, appended], tmp_path / "twice")


def test_append_needs_a_finished_store(model: Any, tmp_path: Path) -> None:
    run(model, tmp_path / "store", worker=(0, 2))
    with pytest.raises(StoreMismatch, match="not finished"):
        run(model, tmp_path / "store", ["another corpus"], append=True)


# Refusals.


def test_what_does_not_belong_is_refused_before_the_model_loads(
    store: FeatureStore, tmp_path: Path
) -> None:
    """The model has a configuration but no weights, so loading it would be another error."""
    bundled = bundled_model("mini-qwen3")
    assert bundled is not None
    name = str(shutil.copytree(bundled, tmp_path / "model"))
    for weights in (tmp_path / "model").glob("*.safetensors*"):
        weights.unlink()
    with pytest.raises(CheckpointMissing):
        run(name, tmp_path / "new")
    with pytest.raises(StoreMismatch, match=r"another SAE: .*layer 2"):
        run(name, store.path, layers=[LAYER])
    with pytest.raises(StoreMismatch, match="max_tokens 10 against 48"):
        run(name, store.path, max_tokens=10)
    with pytest.raises(StoreMismatch, match="other documents"):
        run(name, store.path, ROWS[:4])
    with pytest.raises(LayerOutOfRange):
        run(name, store.path, layers=[8])
    with pytest.raises(BadCorpus, match="no documents"):
        run(name, store.path, [])
    with pytest.raises(BadCorpus, match="say enable_thinking"):
        run(name, store.path, [[{"role": "user", "content": "hi"}]])


def test_another_model_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    from tiny_models import make_model, make_tokenizer

    tiny = qsl.load_model(make_model(), tokenizer=make_tokenizer())
    with pytest.raises(WrongModel, match="d_model 32"):
        run(tiny, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_other_weights_are_refused(store: FeatureStore, model: Any) -> None:
    import torch

    from qwen_scope_lens.models import decoder_layers

    weight = next(decoder_layers(model)[1].parameters())
    with torch.no_grad():
        weight.mul_(2)
    try:
        with pytest.raises(StoreMismatch, match="another model"):
            run(model, store.path)
    finally:
        with torch.no_grad():
            weight.div_(2)
    run(model, store.path)


def test_too_long_is_refused_when_asked(model: Any, tmp_path: Path) -> None:
    with pytest.raises(BadText, match="the limit is 5"):
        run(model, tmp_path / "store", max_tokens=5, truncate=False)


def test_shard_size_is_the_stores(store: FeatureStore, model: Any) -> None:
    with pytest.raises(StoreMismatch, match="3 documents per shard"):
        run(model, store.path, shard_docs=4)


# Chats, odd characters.


def test_chats(model: Any, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": "Hello"}], "lang": "en"},
        {"messages": [{"role": "user", "content": "你好"}], "lang": "zh"},
    ]
    found = run(model, tmp_path / "store", chats, enable_thinking=False)
    text = found.documents(["text"])["text"][1].as_py()
    assert "你好" in text
    assert text.startswith("<|im_start|>")
    assert found.manifest.settings.enable_thinking is False


def test_odd_characters(model: Any, tmp_path: Path) -> None:
    texts = ["half \ud83d character", "🙂🙂 emoji", "مرحبا بالعالم", "a\tb\nc\x00d", "e\u0301 ﷺ"]
    found = run(model, tmp_path / "store", texts)
    stored = found.documents(["text"])["text"].to_pylist()
    assert stored == ["half \ufffd character", *texts[1:]]
    for doc, text in enumerate(stored):
        block = found.by_token(doc)
        assert [text[a:b] for a, b in block.spans] == block.tokens
    assert shards.damage(found.shards[0].folder) is None
