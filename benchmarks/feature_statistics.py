"""Statistics of 65,536 features from one pass over 10 million non-zeros: time and memory.

    python benchmarks/feature_statistics.py > benchmarks/results/feature-statistics.txt

The blocks are made up (features used as unevenly as real ones), so that what is measured is the
counting and not the disk.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _measure import cpu_name, peak_extra

from qwen_scope_lens.features import statistics
from qwen_scope_lens.saes import SparseCodes

D_SAE, K, DOC_TOKENS, BLOCK = 65536, 50, 200, 8000


@dataclass
class MadeUp:
    """The part of a store that `statistics` reads."""

    n_docs: int

    def sae(self, layer: int) -> Any:
        return SimpleNamespace(ref="qwen3-8b-base/w64k-l0-50/20", d_sae=D_SAE, k=K)

    def iter_blocks(self, layer: int, keep: bool, docs: Any) -> Iterator[Any]:
        rng = np.random.default_rng(0)
        weights = np.cumsum(np.exp(rng.normal(size=D_SAE) * 1.5))
        weights /= weights[-1]
        for start in range(0, self.n_docs * DOC_TOKENS, BLOCK):
            row = np.arange(start, min(start + BLOCK, self.n_docs * DOC_TOKENS))
            indices = np.searchsorted(weights, rng.random((len(row), K))).astype(np.int32)
            values = -np.sort(-rng.gamma(2.0, size=(len(row), K)), axis=1).astype(np.float32)
            values[:, 1:][np.diff(np.sort(indices, axis=1)) == 0] = 0  # roughly no repeats
            codes = SparseCodes(torch.from_numpy(values), torch.from_numpy(indices), D_SAE)
            yield SimpleNamespace(doc=row // DOC_TOKENS, position=row % DOC_TOKENS, codes=codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    store = MadeUp(parser.parse_args().tokens // DOC_TOKENS)
    torch.set_num_threads(1)
    start = time.process_time()
    for _ in store.iter_blocks(0, True, None):
        pass
    making = time.process_time() - start
    kept: list[Any] = []
    start = time.process_time()
    peak = peak_extra(lambda: kept.append(statistics(store, 20)))  # type: ignore[arg-type]
    took = time.process_time() - start - making
    found = kept[0]
    print(f"{cpu_name()}, one thread")
    print(
        f"{D_SAE:,} features, {found.n_tokens:,} tokens,"
        f" {int(found.token_count.sum()):,} non-zeros: {took:.0f} s of CPU,"
        f" {peak / 2**20:.0f} MiB at the peak; {int(found.dead.sum()):,} features never fire"
    )


if __name__ == "__main__":
    main()
