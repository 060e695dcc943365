"""What matching two 65k-feature SAEs costs: cosines of directions, assignment, correlations.

    OMP_NUM_THREADS=1 python benchmarks/compare.py > benchmarks/results/compare.txt

CPU seconds of one thread. The 65,536 x 65,536 matching is run at d_model 256, which shows the cost
of keeping the best of four billion scores, and at d_model 4096. B is a permuted, noised copy of A,
so that the right answer is known. `--quick` is for trying the script.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _measure import cpu_name, peak_extra
from scipy.sparse import csr_matrix

from qwen_scope_lens.compare import assign, shuffled_directions
from qwen_scope_lens.features import nearest_by_correlation, nearest_by_cosine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="*", default=["small", "large", "correlations"])
    arguments = parser.parse_args()
    quick, parts = arguments.quick, arguments.parts
    torch.set_num_threads(1)
    n, small, large, tokens = (4096, 64, 512, 5_000) if quick else (65536, 256, 4096, 20_000)
    print(f"{cpu_name()}, one thread, CPU seconds; torch {torch.__version__}\n", flush=True)
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(n, generator=rng)
    for part, d_model in (("small", small), ("large", large)):
        if part in parts:
            cosines(order, d_model, rng)
    if "correlations" in parts:
        correlations(order, tokens)


def cosines(order: torch.Tensor, d_model: int, rng: torch.Generator) -> None:
    n, where = len(order), order.argsort().numpy()
    a = torch.randn(n, d_model, generator=rng)
    b = a[order] + 0.5 * torch.randn(n, d_model, generator=rng)
    found, seconds, peak = measured(lambda: nearest_by_cosine(a, b))
    right = float((found.of_a[:, 0] == where).mean())
    print(
        f"cosines {n:,} x {n:,}, d_model {d_model}, best 8 of both sides: {seconds:.0f} s,"
        f" {peak / 2**20:.0f} MiB beyond the inputs; right partner {right:.1%}"
    )
    (partner, _), seconds, peak = measured(lambda: assign(found, 0.5))
    right = float((partner == where).mean())
    print(
        f"one-to-one assignment of these: {seconds:.1f} s, {peak / 2**20:.0f} MiB;"
        f" right partner {right:.1%}"
    )
    _, seconds, peak = measured(lambda: shuffled_directions(b, 1))
    size = b.nbytes / 2**20
    print(
        f"shuffled copy: {seconds:.1f} s, {peak / 2**20:.0f} MiB, of which the copy {size:.0f}\n",
        flush=True,
    )


def correlations(order: torch.Tensor, tokens: int) -> None:
    n = len(order)
    a = sparse_codes(tokens, n, seed=0)
    b = a[:, order.numpy()]
    found, seconds, peak = measured(lambda: nearest_by_correlation(a, b))
    fires = np.diff(a.tocsc().indptr) >= 5
    right = float((found.of_a[:, 0] == order.argsort().numpy())[fires].mean())
    print(
        f"correlations on {tokens:,} tokens, k = 50, {n:,} x {n:,} features: {seconds:.0f} s,"
        f" {peak / 2**20:.0f} MiB; right partner {right:.1%} of the {int(fires.sum()):,} that"
        " fire 5 times"
    )


def measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    kept: list[Any] = []
    start = time.process_time()
    peak = peak_extra(lambda: kept.append(work()))
    return kept[0], time.process_time() - start, peak


def sparse_codes(tokens: int, d_sae: int, seed: int, k: int = 50) -> csr_matrix:
    """Features as unevenly used as real ones: drawn with weights over three decades."""
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(size=d_sae) * 1.5)
    columns = rng.choice(d_sae, size=(tokens, k), p=weights / weights.sum())
    values = rng.gamma(2.0, size=columns.shape).astype(np.float32)
    rows = np.repeat(np.arange(tokens), k)
    codes = csr_matrix((values.ravel(), (rows, columns.ravel())), shape=(tokens, d_sae))
    codes.sum_duplicates()
    return codes


if __name__ == "__main__":
    main()
