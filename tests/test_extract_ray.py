"""Ray: a local cluster of two workers, one of them killed in the middle, makes the same store."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from feature_stores import GROUP, LAYER
from torch import nn

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import BadCorpus, LayerOutOfRange, WrongModel
from qwen_scope_lens.stores import Settings
from qwen_scope_lens.stores.extract import Request
from qwen_scope_lens.stores.extract_ray import extract_on_ray
from qwen_scope_lens.stores.remote import copy

psutil = pytest.importorskip("psutil")
pytest.importorskip("ray")

pytestmark = pytest.mark.ray

TEXTS = [f"Document {n} says {n * n} 并且 {'again ' * n}" for n in range(14)]
JOB: dict[str, Any] = {"model": "mini-qwen3", "group": GROUP, "layers": [LAYER], "shard_docs": 1}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".lock" not in path.name
    }


def kill_one(shards: Path, seen: list[tuple[int, int]], over: threading.Event) -> None:
    """Once a shard is there, kill -9 one of the cluster's two workers."""
    while not over.wait(0.05):
        done = len(list(shards.glob("0*"))) if shards.is_dir() else 0
        if done:
            for process in psutil.Process().children(recursive=True):
                if "_Maker" in " ".join(process.cmdline()):
                    seen.append((process.pid, done))
                    process.kill()
                    return


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    over = threading.Event()
    killer = threading.Thread(target=kill_one, args=(tmp_path / "ray" / "shards", seen, over))
    killer.start()
    settings = Settings(max_tokens=40)
    request = Request(out=tmp_path / "ray", settings=settings, **JOB)
    on_ray = extract_on_ray(TEXTS, request, progress=False, workers=2)
    over.set()
    killer.join()
    assert seen
    assert seen[0][1] < len(TEXTS), "nobody was killed in the middle"
    assert on_ray.is_complete
    single = qsl.extract(TEXTS, out=tmp_path / "single", max_tokens=40, progress=False, **JOB)
    assert files_of(on_ray.path) == files_of(single.path)
    # There is nothing to do, so no cluster starts.
    assert extract_on_ray(TEXTS, request, progress=False).n_docs == len(TEXTS)


@pytest.mark.slow
def test_actors_write_to_a_url(bucket: str, tmp_path: Path) -> None:
    request = Request(out=bucket, **JOB)
    store = extract_on_ray(TEXTS[:4], request, progress=False, workers=2)
    assert store.n_docs == 4
    assert store.is_complete
    copy(bucket, tmp_path / "copied", progress=False)
    single = qsl.extract(TEXTS[:4], out=tmp_path / "single", progress=False, **JOB)
    assert files_of(tmp_path / "copied") == files_of(single.path)


def test_refusals_need_no_cluster(tmp_path: Path) -> None:
    request = Request(out=tmp_path, **JOB)
    with pytest.raises(BadCorpus, match="no documents"):
        extract_on_ray([], request)
    with pytest.raises(BadCorpus, match="0 workers"):
        extract_on_ray(["a"], request, workers=0)
    with pytest.raises(LayerOutOfRange):
        extract_on_ray(["a"], replace(request, layers=[8]))
    with pytest.raises(BadCorpus, match="Write them to a file"):
        extract_on_ray(["a " * 6_000_000], request)
    with pytest.raises(WrongModel, match="name it"):
        extract_on_ray(["a"], replace(request, model=nn.Identity()))
