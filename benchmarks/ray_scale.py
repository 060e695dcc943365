"""Extraction on Ray with 1, 2 and 4 workers of a slow model, a killed worker, and a merge.

    python benchmarks/ray_scale.py --out benchmarks/results/ray-scale.txt

The model is a mini one in the real job, whose actors sleep for `--seconds` before every shard, as
if a large model ran on a GPU of its own; so four workers fit on two cores. Times are of the clock,
from the first shard to the last. The start of the cluster and of its actors (importing torch,
loading the model) is given apart. Every store is compared with that of a single process, byte by
byte.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from _measure import Printed, cpu_name

import qwen_scope_lens as qsl
from qwen_scope_lens.stores import Settings, extract_ray, merge
from qwen_scope_lens.stores.extract import Request
from qwen_scope_lens.version import versions

GROUP, LAYER, SLOW = "mini-qwen3/w1k-l0-16", 6, "BENCHMARK_SECONDS"


class _Maker(extract_ray._Maker):
    """Ray's actor with a slow model: it sleeps before every shard."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(float(os.environ.get(SLOW, 0)))
        return super().__call__(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="per shard")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    say = Printed()
    facts = versions("ray", "pyarrow")
    say(
        f"{cpu_name()}, {os.cpu_count()} cores, busy; {date.today().isoformat()};"
        f" ray {facts['ray']}, torch {facts['torch']}, qwen-scope-lens {facts['qwen-scope-lens']}\n"
    )
    texts = [
        f"Document {n} says {n * n} 并且 {'again ' * (n % 7)}" for n in range(2 * options.shards)
    ]
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), texts, options, say)
    if options.out:
        say.save(options.out)


def measure(folder: Path, texts: list[str], options: argparse.Namespace, say: Printed) -> None:
    job: dict[str, Any] = {
        "model": "mini-qwen3",
        "group": GROUP,
        "layers": [LAYER],
        "shard_docs": 2,
    }
    single = qsl.extract(texts, out=folder / "single", max_tokens=64, progress=False, **job).path
    os.environ[SLOW] = str(options.seconds)
    settings, took = Settings(max_tokens=64), {}
    say(f"{options.shards} shards, {options.seconds:g} s each (a sleep in place of a large model)")
    for workers in map(int, options.workers.split(",")):
        out = folder / f"ray{workers}"
        first, last = run(texts, Request(out=out, settings=settings, **job), workers)
        took[workers] = last
        ratio = took[min(took)] / last
        say(
            f"{workers} workers: {last:6.1f} s of shards after {first:.1f} s of start,"
            f" {ratio:.2f} times one worker, {'the same bytes' if same(single, out) else 'OTHER'}"
        )
    out = folder / "killed"
    killed: list[float] = []
    threading.Thread(target=kill_one, args=(out / "shards", killed), daemon=True).start()
    _, last = run(texts, Request(out=out, settings=settings, **job), 2)
    say(
        f"2 workers, one killed with -9 in the middle ({len(killed)} killed): {last:.1f} s,"
        f" {'the same bytes' if same(single, out) else 'OTHER BYTES'}"
    )
    del os.environ[SLOW]
    halves = [folder / "half0", folder / "half1"]
    for i, half in enumerate(halves):
        qsl.extract(texts, out=half, max_tokens=64, progress=False, worker=(i, 2), **job)
    start = time.perf_counter()
    merged = merge(halves, folder / "merged").path
    say(
        f"two halves made apart (--worker) and merged in {time.perf_counter() - start:.2f} s:"
        f" {'the same bytes' if same(single, merged) else 'OTHER BYTES'}"
    )


def run(texts: list[str], request: Request, workers: int) -> tuple[float, float]:
    """Seconds until the first shard was begun, and from there to the last one."""
    shards = Path(request.out) / "shards"
    start = time.time()
    extract_ray._Maker = _Maker
    store = extract_ray.extract_on_ray(texts, request, workers=workers, progress=False)
    assert store.is_complete
    made = sorted(path.stat().st_mtime for path in shards.glob("*/shard.json"))
    pause = float(os.environ.get(SLOW, 0))
    return made[0] - pause - start, made[-1] - made[0] + pause


def kill_one(shards: Path, killed: list[float]) -> None:
    while True:
        time.sleep(0.1)
        if shards.is_dir() and len(list(shards.glob("0*"))) >= 3:
            for process in psutil.Process().children(recursive=True):
                if "_Maker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(time.time())
                    return


def same(one: Path, other: Path) -> bool:
    def names(folder: Path) -> set[str]:
        files = [path for path in (folder / "shards").rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix() for path in files}

    mine = names(one)
    _, wrong, missing = filecmp.cmpfiles(one, other, mine | {"manifest.json"}, shallow=False)
    return mine == names(other) and not wrong and not missing


if __name__ == "__main__":
    main()
