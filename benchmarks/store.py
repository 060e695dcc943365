"""How large a feature store is on disk, and how long a question to it takes.

    python benchmarks/store.py > benchmarks/results/store.txt

A planted store: 200,000 tokens, k = 50 of 65,536 features (10 million non-zeros), features as
unequal as in real SAEs (a few fire on a tenth of all tokens, most on almost none), values with sink
tokens far beyond float16. Times are CPU times of the process (files in the page cache): the median
and the slowest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from _measure import cpu_name
from feature_stores import build_store

import qwen_scope_lens as qsl
from qwen_scope_lens.features import pool
from qwen_scope_lens.stores import FeatureStore

GROUP, LAYER, K, D_SAE = "qwen3-8b-base/w64k-l0-50", 20, 50, 65536
DOCUMENT = 200  # tokens


def planted(rng: np.random.Generator, share: np.ndarray) -> qsl.SparseCodes:
    """The codes of one document: K different features per token, drawn by their share."""
    drawn = rng.choice(D_SAE, size=(DOCUMENT, 4 * K), p=share)
    index = np.empty((DOCUMENT, K), np.int64)
    for row in range(DOCUMENT):
        own = np.unique(drawn[row])
        own = own if len(own) >= K else np.union1d(own, np.arange(2 * K))
        index[row] = rng.permutation(own)[:K]
    values = np.sort(np.exp(rng.normal(0.5, 1, size=(DOCUMENT, K))))[:, ::-1].astype(np.float32)
    values[0, :4] = [3e5, 2e5, 9e4, 7e4]  # the sink
    return qsl.SparseCodes(torch.from_numpy(values.copy()), torch.from_numpy(index).int(), D_SAE)


def timed(question: Callable[[], object], repeats: int) -> str:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        question()
        times.append(1e3 * (time.process_time() - start))
    return f"{statistics.median(times):8.2f} ms  (slowest of {repeats}: {max(times):.2f} ms)"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tokens", type=int, default=200_000)
    tokens = arguments.parse_args().tokens
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    share = 1 / (20 + np.arange(D_SAE)) ** 1.1
    share = rng.permutation(share / share.sum())
    print(f"CPU: {cpu_name()}, one thread")
    with tempfile.TemporaryDirectory() as folder:
        documents = [planted(rng, share) for _ in range(tokens // DOCUMENT)]
        start = time.process_time()
        build_store(Path(folder), documents, group=GROUP, layers=[LAYER], shard_docs=512)
        seconds = time.process_time() - start
        report(Path(folder), seconds, rng)


def report(folder: Path, seconds: float, rng: np.random.Generator) -> None:
    store = FeatureStore.open(folder)
    nonzero = store.n_nonzero(LAYER)
    print(
        f"{store.n_docs:,} documents, {store.n_tokens:,} tokens, {nonzero:,} non-zeros,"
        f" {len(store.shards)} shards; packed and written in {seconds:.1f} s\n"
    )
    views = {"token-major": ("layer20/", "npy"), "feature-major": ("layer20/", "parquet")}
    for view, (start, end) in views.items():
        size = sum(
            facts["size"]
            for shard in store.shards
            for name, facts in shard.files.items()
            if name.startswith(start) and name.endswith(end)
        )
        print(f"{size / nonzero:8.2f} bytes a non-zero  {view}")
    counts = np.bincount(
        np.concatenate([b.codes.indices[b.codes.active].numpy() for b in store.iter_blocks(LAYER)]),
        minlength=D_SAE,
    )
    order = np.argsort(-counts)
    doc, position = rng.integers(0, store.n_docs, 100), rng.integers(0, DOCUMENT, 100)
    features = iter(rng.permutation(np.nonzero(counts)[0]).tolist())
    dense = iter(np.tile(order[:10], 4).tolist())
    print(f"{timed(lambda: FeatureStore.open(folder), 9)}  open the store")
    print(f"{timed(lambda: store.by_feature((LAYER, next(features))), 200)}  one feature, any")
    print(
        f"{timed(lambda: store.by_feature((LAYER, next(dense))), 40)}  one feature, of the ten"
        f" densest ({counts[order[9]]:,} to {counts[order[0]]:,} hits)"
    )
    print(f"{timed(lambda: store.codes_at(LAYER, doc, position), 50)}  100 random tokens")
    print(f"{timed(lambda: store.by_token(int(rng.integers(store.n_docs))), 50)}  one document")
    count = "select feature, count(*) n from features group by 1 order by n desc limit 5"
    print(f"{timed(lambda: store.sql(count), 3)}  SQL: the five densest features")
    print(f"{timed(lambda: pool(store, LAYER, 'max'), 1)}  pool all documents (max)")


if __name__ == "__main__":
    main()
