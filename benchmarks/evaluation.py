"""Speed and memory of footprints and of what is counted from them, at the paper's sizes.

    python benchmarks/evaluation.py > benchmarks/results/evaluation.txt

Stores of planted codes in the shape of qwen3-8b-base/w64k-l0-50: 65,536 features, 50 a token. Half
of an item's last-token features come from 300 common ones, half from a Zipf tail. Wall-clock times,
the store just written (warm cache); peaks in a fresh process, beyond what the imports hold.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _measure import cpu_name, peak_extra, peak_in_fresh_process

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from feature_stores import build_store

import qwen_scope_lens as qsl
from qwen_scope_lens.bench import (
    Footprint,
    ceiling,
    choose,
    coverage_curve,
    overlap,
    read_footprint,
    redundancy,
)
from qwen_scope_lens.bench import footprint as make
from qwen_scope_lens.stores import FeatureStore

GROUP, LAYER = "qwen3-8b-base/w64k-l0-50", 20
TOKENS = 16
SIZES = (10_000, 26_529)


def write_store(folder: Path, n_items: int) -> None:
    row = qsl.find_group(GROUP)
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(n_items):
        common = rng.integers(0, 300, (TOKENS, 2 * row.k))
        tail = np.minimum(rng.zipf(1.3, (TOKENS, 2 * row.k)) + 300, row.d_sae - 1)
        mixed = np.where(rng.random((TOKENS, 2 * row.k)) < 0.5, common, tail)
        indices = np.zeros((TOKENS, row.k), dtype=np.int32)
        values = np.zeros((TOKENS, row.k), dtype=np.float32)
        for t, features in enumerate(mixed):
            unique = rng.permutation(np.unique(features))[: row.k]
            indices[t, : len(unique)] = unique
            values[t, : len(unique)] = np.linspace(9, 1, len(unique))
        codes = qsl.SparseCodes(torch.from_numpy(values), torch.from_numpy(indices), row.d_sae)
        documents.append(codes)
    build_store(folder, documents, group=GROUP, layers=[LAYER], shard_docs=512)


def everything(folder: Path) -> tuple[Footprint, dict[str, float]]:
    """Every figure of one benchmark, and the seconds each took."""
    found: dict[str, float] = {}
    clock = time.perf_counter

    start = clock()
    footprint = read_footprint(FeatureStore.open(folder), LAYER, name=folder.name)
    found["footprint from the store"] = clock() - start
    half = footprint.subset(range(0, len(footprint), 2))
    for what, figure in (
        ("R-hat and AUC, 200 resamples", lambda: redundancy(footprint)),
        ("coverage curve with its band", lambda: coverage_curve(footprint)),
        ("overlap with half of itself, 200 resamples", lambda: overlap(footprint, half)),
        ("ceiling, 100 splits", lambda: ceiling(footprint)),
        ("subset for 95%, greedy and its bound", lambda: choose(footprint)),
    ):
        start = clock()
        figure()
        found[what] = clock() - start
    return footprint, found


def interval_coverage() -> None:
    """How often the intervals hold the expected value, over benchmarks drawn from one source."""
    print("Intervals that hold the expected figure, of 150 benchmarks from one planted source")
    for n_items, n_features in ((30, 300), (80, 120), (80, 400), (300, 1000)):
        rates = 0.6 / (1 + 0.15 * np.arange(n_features))

        def draw(seed: int, shape: tuple[int, int] = (n_items, n_features)) -> Footprint:
            return make("b", np.random.default_rng(seed).random(shape) < rates)  # noqa: B023

        sources, other = [draw(seed) for seed in range(150)], draw(9999)
        rows = [redundancy(one, draws=100) for one in sources]
        pairs = [overlap(one, other, draws=100) for one in sources]
        shares = []
        for values in ([r.auc for r in rows], [r.r_hat for r in rows], [p.overlap for p in pairs]):
            expected = np.mean([v.value for v in values])
            shares.append(np.mean([v.low <= expected <= v.high for v in values]))
        print(
            f"  {n_items} items, {n_features} features: AUC {shares[0]:.2f}, R-hat"
            f" {shares[1]:.2f}, overlap {shares[2]:.2f}"
        )


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        print(peak_extra(lambda: everything(Path(sys.argv[2]))))
        return
    print(f"{cpu_name()}; {torch.get_num_threads()} threads")
    print(f"{GROUP}, {TOKENS} tokens an item\n")
    with tempfile.TemporaryDirectory() as place:
        for n_items in SIZES:
            folder = Path(place) / f"{n_items}"
            write_store(folder, n_items)
            footprint, times = everything(folder)
            print(f"{n_items:,} items, {footprint.size:,} features in the footprint")
            for what, seconds in times.items():
                print(f"  {seconds:7.2f} s  {what}")
            peak = peak_in_fresh_process(__file__, str(folder))
            print(f"  {peak / 1e9:7.2f} GB peak of all of these\n", flush=True)
    interval_coverage()


if __name__ == "__main__":
    main()
