"""Stores at a URL: in fsspec's memory, and slowly at a server of the S3 protocol."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from feature_stores import GROUP, LAYER, build_store

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import (
    BadFile,
    StorageUnreachable,
    StoreDamaged,
    StoreMismatch,
    TooLittleData,
)
from qwen_scope_lens.features import statistics
from qwen_scope_lens.stores import FeatureStore, merge, read_corpus
from qwen_scope_lens.stores.inspect import check
from qwen_scope_lens.stores.remote import Remote, copy

DOCUMENTS = [[{5: 2.0}, {5: 1.0, 7: 3.0}], [{9: 1.5}, {5: 4.0}], [{7: 2.5}, {11: 1.0}]]
TEXTS = ["Ein Satz.", "A sentence.", "一句话。", "The last one."]
JOB: dict[str, Any] = {
    "model": "mini-qwen3",
    "group": GROUP,
    "layers": [LAYER],
    "shard_docs": 1,
    "progress": False,
}


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("QWEN_SCOPE_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    yield "memory://bucket/store"
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> FeatureStore:
    labels = {"lang": ["de", "en", "zh"]}
    return build_store(tmp_path / "local", DOCUMENTS, labels, shard_docs=1)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".lock" not in path.name
    }


def same_answers(one: FeatureStore, other: FeatureStore) -> None:
    for a, b in zip(one.iter_blocks(LAYER), other.iter_blocks(LAYER), strict=True):
        np.testing.assert_array_equal(a.codes.to_dense(), b.codes.to_dense())
        np.testing.assert_array_equal(a.keep, b.keep)
    for feature in (5, 7, 600):
        ours, theirs = one.by_feature((LAYER, feature)), other.by_feature((LAYER, feature))
        for name in ("doc", "position", "value", "keep"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    query = "select key, count(*) n from features join documents using (doc) group by 1 order by 1"
    assert one.sql(query).to_pylist() == other.sql(query).to_pylist()
    assert one.by_token(1).tokens == other.by_token(1).tokens


def test_a_store_is_copied_and_read(local: FeatureStore, url: str, tmp_path: Path) -> None:
    copy(local.path, url, progress=False)
    there = FeatureStore.open(url)
    assert there.is_complete
    assert there.place == url
    hits = there.by_feature((LAYER, 5))
    assert hits.value.tolist() == [2.0, 1.0, 4.0]
    fetched = {path.suffix for path in (tmp_path / "cache" / "files").rglob("*") if path.is_file()}
    assert fetched == {".npy"}, "the postings were fetched whole for three hits"
    same_answers(local, there)
    assert check(url, checksums=False) == []
    copy(url, tmp_path / "back", progress=False)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "local")


def test_a_folder_has_a_url_too(local: FeatureStore, url: str, tmp_path: Path) -> None:
    there = f"file://{tmp_path}/new/there"
    copy(local.path, there, progress=False)
    assert files_of(tmp_path / "new" / "there") == files_of(tmp_path / "local")
    same_answers(local, FeatureStore.open(there))
    (tmp_path / "new" / "there" / "shards" / "00001" / f"layer{LAYER}" / "values.npy").unlink()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(StoreDamaged, match=r"values\.npy is missing: what sent it"):
        list(FeatureStore.open(there).iter_blocks(LAYER))
    shutil.rmtree(tmp_path / "new" / "there" / "shards")
    with pytest.raises(TooLittleData, match="no finished document"):
        statistics(FeatureStore.open(there), LAYER)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(StoreMismatch, match="full holds other files"):
        copy(there, full, progress=False)
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_a_half_sent_store_never_looks_whole(local: FeatureStore, url: str) -> None:
    copy(local.path, url, progress=False)
    memory, root = fsspec.filesystem("memory"), "/bucket/store"
    sent = sorted(memory.find(root))
    # Whatever was sent when the copy was killed: the files in the order in which they were sent.
    order = [f"{root}/manifest.json"]
    for shard in range(3):
        own = [path for path in sent if f"/shards/{shard:05d}/" in path]
        order += sorted(own, key=lambda path: path.endswith("shard.json"))
    assert sorted(order) == sent
    content = memory.cat(order)
    for stop in range(len(order)):
        if memory.exists(root):
            memory.rm(root, recursive=True)
        for path in order[:stop]:
            memory.pipe_file(path, content[path])
        if not stop:
            with pytest.raises(BadFile, match="no manifest"):
                FeatureStore.open(url)
            continue
        partly = FeatureStore.open(url)
        assert not partly.is_complete
        assert partly.n_docs == sum(path.endswith("shard.json") for path in order[:stop])
    copy(local.path, url, progress=False)
    assert memory.cat(order) == content
    # A file that was cut short is sent again.
    victim = next(path for path in order if path.endswith("00001/tokens.parquet"))
    memory.pipe_file(victim, content[victim][:-1])
    assert "00001 is missing or not whole" in check(url, checksums=False)[0]
    copy(local.path, url, progress=False)
    assert memory.cat_file(victim) == content[victim]


def test_refusals(local: FeatureStore, url: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/store/holiday.jpg", b"x")
    with pytest.raises(StoreMismatch, match="other files"):
        copy(local.path, url, progress=False)
    memory.rm("/bucket/store/holiday.jpg")
    copy(local.path, url, progress=False)
    other = build_store(tmp_path / "other", DOCUMENTS[:2], shard_docs=1)
    with pytest.raises(StoreMismatch, match="other documents"):
        copy(other.path, url, progress=False)
    with pytest.raises(BadFile, match="--sizes-only"):
        check(url)
    with pytest.raises(BadFile, match="qsl store copy"):
        merge([url, local.path], tmp_path / "merged")
    with pytest.raises(BadFile, match="can be used"):
        FeatureStore.open("nosuch://bucket/store")
    # A changed file of the right size, and names that lead out of a shard.
    path = "/bucket/store/shards/00000/tokens.parquet"
    content = memory.cat_file(path)
    memory.pipe_file(path, content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(StoreDamaged, match="checksum differs"):
        FeatureStore.open(url).by_token(0)
    facts = memory.cat_file("/bucket/store/shards/00000/shard.json")
    evil = facts.replace(b'"documents.parquet"', b'"../../../evil.parquet"')
    assert evil != facts
    memory.pipe_file("/bucket/store/shards/00000/shard.json", evil)
    with pytest.raises(StoreDamaged, match="not inside"):
        copy(url, tmp_path / "stolen", progress=False)
    assert not list(tmp_path.rglob("evil.parquet"))


def test_a_storage_that_fails_is_named_as_what_was_asked_of_it(
    local: FeatureStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TimeoutError("nobody")

    copy(local.path, url, progress=False)
    there, memory = Remote.of(url), type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "cat_file", fail)
        with pytest.raises(StorageUnreachable) as said:
            FeatureStore.open(url)
    assert "manifest.json cannot be read: TimeoutError: nobody" in str(said.value)
    assert "written" not in str(said.value)
    monkeypatch.setattr(memory, "pipe_file", fail)
    with pytest.raises(StorageUnreachable) as said:
        there.send(local.path, 0)
    assert "cannot be written: TimeoutError: nobody" in str(said.value)
    assert "Nothing half counts as written" in str(said.value)


def test_extraction_to_a_url(url: str, tmp_path: Path) -> None:
    corpus = tmp_path / "texts.txt"
    corpus.write_text("\n".join(TEXTS), encoding="utf-8")
    fsspec.filesystem("memory").put_file(str(corpus), "/bucket/texts.txt")
    documents = read_corpus("memory://bucket/texts.txt")
    job = JOB | {"model": qsl.load_model("mini-qwen3", up_to_layer=LAYER)}
    qsl.extract(documents, out=tmp_path / "single", **job)
    for worker in ((1, 2), (0, 2)):
        there = qsl.extract(documents, out=url, worker=worker, **job)
    assert there.is_complete
    copy(url, tmp_path / "back", progress=False)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "single")
    assert not list((tmp_path / "cache" / "sending").rglob("*.parquet"))
    with pytest.raises(StoreMismatch, match="memory://bucket/store holds"):
        qsl.extract(TEXTS[:2], out=url, **JOB)
    with pytest.raises(StoreMismatch, match="cannot be appended to"):
        qsl.extract(TEXTS, out=url, append=True, **JOB)


@pytest.mark.slow
def test_a_server_of_the_s3_protocol(
    local: FeatureStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(local.path, bucket, progress=False)
    same_answers(local, FeatureStore.open(bucket))
    copy(bucket, tmp_path / "back", progress=False)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "local")
    with pytest.raises(StorageUnreachable, match="no bucket nowhere"):
        copy(local.path, "s3://nowhere/store", progress=False)
    other = build_store(tmp_path / "other", DOCUMENTS[:2], shard_docs=1)
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "manifest", lambda self: None)  # as if both began at once
        with pytest.raises(StoreMismatch):
            Remote.of(bucket).begin(other.manifest)
    assert FeatureStore.open(bucket).n_docs == 3
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


@pytest.mark.slow
def test_a_silent_server_is_not_waited_for_long(
    local: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit of ours s3fs asks for more than five minutes."""
    fs = pytest.importorskip("s3fs").S3FileSystem
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        fs.clear_instance_cache()
        started = time.monotonic()
        with pytest.raises(StorageUnreachable, match="cannot be read: ReadTimeoutError"):
            copy(local.path, "s3://shelf/store", progress=False)
        assert time.monotonic() - started < 40
    fs.clear_instance_cache()
