"""How good the minis are: held-out loss against n-gram baselines, and figures of every SAE.

Only measures; `benchmarks/mini.py` prints. What single features mean is `meaning.py`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.mini import SAES
from qwen_scope_lens.saes.load import load_sae
from qwen_scope_lens.saes.sae import ScopeSAE, ScopeSAEConfig
from tools.mini.activations import batch_residuals
from tools.mini.data import batches, padded
from tools.mini.model import loss_of

__all__ = [
    "LayerFigures",
    "Ngrams",
    "baselines",
    "by_group",
    "group_of",
    "layer_figures",
    "load_saes",
    "random_sae",
]

Rows = Sequence[Sequence[int]]
DISCOUNT = 0.75


def group_of(record: dict[str, Any]) -> str:
    """The row of the loss table that a document belongs to: its language for prose."""
    return str(record["lang"]) if record["domain"] == "prose" else str(record["domain"])


class Ngrams:
    """Unigram and bigram models of one group's training rows (absolute discounting)."""

    def __init__(self, rows: Rows, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.single = Counter(token for row in rows for token in row)
        self.total = sum(self.single.values())
        self.pairs: Counter[tuple[int, int]] = Counter()
        for row in rows:
            self.pairs.update(pairwise(row))
        self.follows: Counter[int] = Counter()
        self.kinds: Counter[int] = Counter()
        for (first, _), count in self.pairs.items():
            self.follows[first] += count
            self.kinds[first] += 1

    def unigram(self, token: int) -> float:
        return (self.single[token] + 0.1) / (self.total + 0.1 * self.vocabulary)

    def bigram(self, first: int, token: int) -> float:
        seen = self.follows[first]
        if not seen:
            return self.unigram(token)
        kept = max(self.pairs[first, token] - DISCOUNT, 0.0) / seen
        return kept + DISCOUNT * self.kinds[first] / seen * self.unigram(token)

    def losses(self, rows: Rows) -> tuple[float, float]:
        """Mean `(unigram, bigram)` loss in nats over all tokens but every row's first."""
        one = two = 0.0
        count = 0
        for row in rows:
            for first, token in pairwise(row):
                one -= math.log(self.unigram(token))
                two -= math.log(self.bigram(first, token))
                count += 1
        return one / count, two / count


Split = tuple[list[dict[str, Any]], list[list[int]]]


def by_group(split: Split, most: int | None = None) -> dict[str, list[list[int]]]:
    """The rows of every language and kind of text, at most the first `most`, groups by name."""
    found: dict[str, list[list[int]]] = defaultdict(list)
    for record, row in zip(*split, strict=True):
        found[group_of(record)].append(row)
    return {group: rows[:most] for group, rows in sorted(found.items())}


def baselines(train: Split, held: dict[str, list[list[int]]], vocabulary: int) -> dict[str, Any]:
    """Per group: held-out `(unigram, bigram)` loss of n-gram models of its own training text."""
    texts = by_group(train)
    return {group: Ngrams(texts[group], vocabulary).losses(rows) for group, rows in held.items()}


def load_saes(name: str) -> list[ScopeSAE]:
    """The shipped SAEs of a mini model, by layer."""
    group = find_group(SAES[name])
    return [load_sae(f"{group.short}/{layer}") for layer in group.layers]


def random_sae(like: ScopeSAE, mean: torch.Tensor) -> ScopeSAE:
    """Random directions of length one that read and write around the mean: learnt nothing."""
    config = ScopeSAEConfig(d_in=like.cfg.d_in, d_sae=like.cfg.d_sae, k=like.cfg.k)
    sae = ScopeSAE(config)
    shape = (like.cfg.d_sae, like.cfg.d_in)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(rows, dim=-1)
    state = {"W_enc": rows.T.clone(), "W_dec": rows, "b_enc": -(rows @ mean), "b_dec": mean}
    sae.load_state_dict(state)
    return sae


@dataclass
class LayerFigures:
    """One SAE on held-out text. Losses in nats per token."""

    layer: int
    fvu: float
    l0: float
    dead: float  # share of features that fire on none of the tokens read
    clean: float
    spliced: float  # residual replaced by its reconstruction, but at the first token
    zeroed: float  # residual replaced by nothing, but at the first token
    random: float  # residual replaced by what an SAE of random directions makes of it

    @property
    def recovered(self) -> float:
        return (self.zeroed - self.spliced) / (self.zeroed - self.clean)

    @property
    def floor(self) -> float:
        """What the random SAE recovers: the figure to compare `recovered` with."""
        return (self.zeroed - self.random) / (self.zeroed - self.clean)


@torch.no_grad()
def layer_figures(
    model: Any, saes: list[ScopeSAE], rows: Rows, splice_rows: Rows
) -> list[LayerFigures]:
    """FVU, L0 and silent features on `rows`; loss recovered on `splice_rows`."""
    layers = len(saes)
    error = torch.zeros(layers, dtype=torch.float64)
    total = torch.zeros(layers, saes[0].cfg.d_in, dtype=torch.float64)
    square = torch.zeros(layers, dtype=torch.float64)
    active = torch.zeros(layers, dtype=torch.float64)
    fired = torch.zeros(layers, saes[0].cfg.d_sae, dtype=torch.bool)
    count = 0
    for _, mask, residuals in batch_residuals(model, rows, batches(rows, 4096, 0)):
        mask[:, 0] = False
        count += int(mask.sum())
        for n, (sae, residual) in enumerate(zip(saes, residuals, strict=True)):
            x = residual[mask]
            codes = sae.encode_sparse(x)
            error[n] += (sae.decode_sparse(codes) - x).pow(2).sum().double()
            total[n] += x.sum(0).double()
            square[n] += x.pow(2).sum().double()
            active[n] += codes.active.sum().double()
            fired[n, codes.indices[codes.active].long()] = True
    variance = square - total.pow(2).sum(1) / count
    clean = _spliced_loss(model, splice_rows, None, None)
    figures = []
    for n, sae in enumerate(saes):
        spliced = _spliced_loss(model, splice_rows, n, sae)
        zeroed = _spliced_loss(model, splice_rows, n, torch.zeros_like)
        untrained = random_sae(sae, (total[n] / count).float())
        figures.append(
            LayerFigures(
                layer=n,
                fvu=float(error[n] / variance[n]),
                l0=float(active[n] / count),
                dead=float((~fired[n]).float().mean()),
                clean=clean,
                spliced=spliced,
                zeroed=zeroed,
                random=_spliced_loss(model, splice_rows, n, untrained),
            )
        )
    return figures


def _spliced_loss(model: Any, rows: Rows, layer: int | None, change: Any) -> float:
    """Mean loss with the residual after `layer` changed at every token but the first."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        new = torch.cat([x[:, :1], change(x[:, 1:])], dim=1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = None if layer is None else model.model.layers[layer].register_forward_hook(hook)
    total, count = 0.0, 0
    try:
        for numbers in batches(rows, 4096, 0):
            ids, mask = padded(rows, numbers)
            loss, n = loss_of(model, ids, mask)
            total, count = total + float(loss) * n, count + n
    finally:
        if handle is not None:
            handle.remove()
    return total / count
