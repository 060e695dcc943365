"""A feature store in memory with codes that a test made up, for tests of what reads stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qwen_scope_lens.errors import LayerOutOfRange
from qwen_scope_lens.saes import SparseCodes


@dataclass(frozen=True)
class Facts:
    ref: str
    d_sae: int
    k: int


@dataclass(frozen=True)
class PlantedBlock:
    doc: np.ndarray
    position: np.ndarray
    token_ids: np.ndarray
    keep: np.ndarray
    codes: SparseCodes

    def __len__(self) -> int:
        return len(self.doc)


@dataclass(frozen=True)
class PlantedManifest:
    model: str = "planted"


class PlantedStore:
    """`dense[layer]` is `[n_tokens, d_sae]`; documents have the lengths given."""

    manifest = PlantedManifest()

    def __init__(
        self,
        dense: dict[int, np.ndarray],
        lengths: list[int],
        labels: dict[str, list[Any]] | None = None,
        texts: list[str] | None = None,
        keep: np.ndarray | None = None,
        k: int = 8,
        block: int = 64,
    ) -> None:
        self.layers = tuple(sorted(dense))
        self._labels = labels or {}
        self.lengths, self.block, self.k = lengths, block, k
        self.doc = np.repeat(np.arange(len(lengths)), lengths)
        self.position = np.concatenate([np.arange(n) for n in lengths])
        self.keep = np.ones(len(self.doc), bool) if keep is None else keep
        self.texts = texts or [f"document {n}" for n in range(len(lengths))]
        self.codes = {
            layer: SparseCodes.from_dense(torch.from_numpy(x).float(), k)
            for layer, x in dense.items()
        }
        self.n_docs, self.n_tokens = len(lengths), len(self.doc)

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self._labels)

    def labels(self, name: str) -> np.ndarray:
        return np.array(self._labels[name], dtype=object)

    def sae(self, layer: int) -> Facts:
        if layer not in self.layers:
            raise LayerOutOfRange(f"layer {layer} is not in this store: it has {self.layers}")
        return Facts(f"mini-qwen3/w1k-l0-16/{layer}", self.codes[layer].d_sae, self.k)

    def documents(self, columns: list[str] | None = None) -> pa.Table:
        table = pa.table(
            {
                "doc": range(self.n_docs),
                "text": self.texts,
                "n_tokens": self.lengths,
                **self._labels,
            }
        )
        return table if columns is None else table.select(columns)

    def iter_blocks(
        self, layer: int, keep: bool = False, docs: Iterable[int] | None = None
    ) -> Iterator[PlantedBlock]:
        good = self.keep if keep else np.ones_like(self.keep)
        if docs is not None:
            good = good & np.isin(self.doc, list(docs))
        rows = np.flatnonzero(good)
        for start in range(0, len(rows), self.block):
            at = rows[start : start + self.block]
            yield PlantedBlock(
                self.doc[at],
                self.position[at],
                self.position[at],
                self.keep[at],
                self.codes[layer][torch.from_numpy(at)],
            )


def random_codes(
    seed: int, n_tokens: int, d_sae: int, k: int = 8, popular: float = 1.0
) -> np.ndarray:
    """At most k features a token, some far more common than others. `[n_tokens, d_sae]`"""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=d_sae) ** popular
    dense = np.zeros((n_tokens, d_sae), np.float32)
    for row in dense:
        chosen = rng.choice(
            d_sae, size=rng.integers(1, k + 1), replace=False, p=weights / weights.sum()
        )
        row[chosen] = np.round(rng.gamma(2.0, size=len(chosen)) + 0.1, 2)  # rounded: ties
    return dense
