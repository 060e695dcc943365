"""How good a trained SAE is on held-out texts: unexplained variance, loss, dead features.

Variance and dead features come from captured residuals, losses from the whole model with the SAE's
reconstruction in the residual's place (`compare.fidelity`), beside a random SAE of the same sizes.
First tokens and tokens of extreme norm take no part, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen_scope_lens.compare.fidelity import Fidelity, fidelity
from qwen_scope_lens.compare.transfer import random_sae
from qwen_scope_lens.saes.sae import ScopeSAE
from tools.real.shards import Layer

__all__ = ["Losses", "Reconstruction", "losses", "reconstruction"]


@dataclass(frozen=True)
class Reconstruction:
    """One SAE on captured residuals."""

    positions: int
    fvu: float  # the share of variance that is not explained
    fvu_others: float  # the same without the column of the largest variance
    widest: float  # that column's share of the variance
    l0: float
    dead: int  # features that fired at none of these and of the `dead_positions`
    dead_positions: int


@dataclass(frozen=True)
class Losses:
    """Nats per token with the residual of one layer replaced."""

    tokens: int
    clean: float
    spliced: float  # by the SAE's reconstruction
    random: float  # by that of a random SAE with the same mean
    zeroed: float

    @property
    def recovered(self) -> float:
        """1 where the SAE costs nothing, 0 where it is no better than the random SAE."""
        return _recovered(self.clean, self.spliced, self.random)

    @property
    def recovered_from_zeros(self) -> float:
        return _recovered(self.clean, self.spliced, self.zeroed)


def _recovered(clean: float, spliced: float, floor: float) -> float:
    """NaN where the random SAE costs nothing, so that there is nothing to recover."""
    return (floor - spliced) / (floor - clean) if floor - clean > 1e-6 else math.nan


@torch.no_grad()
def reconstruction(
    sae: ScopeSAE, heldout: Layer, train: Layer, dead_positions: int, batch: int = 2048
) -> Reconstruction:
    """Variance on all held-out positions; dead features on those and the first of `train`."""
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    error = torch.zeros(sae.cfg.d_in, dtype=torch.float64)
    total, square, active = error.clone(), error.clone(), 0
    for start in range(0, len(heldout), batch):
        x = heldout.take(np.arange(start, min(start + batch, len(heldout))))
        codes = sae.encode_sparse(x)
        error += (sae.decode_sparse(codes) - x).double().pow(2).sum(0)
        total += x.double().sum(0)
        square += x.double().pow(2).sum(0)
        active += int(codes.l0.sum())
        fired[codes.indices[codes.values > 0]] = True
    more = min(dead_positions, len(train))
    for start in range(0, more, batch):
        codes = sae.encode_sparse(train.take(np.arange(start, min(start + batch, more))))
        fired[codes.indices[codes.values > 0]] = True
    n = len(heldout)
    variance = square - total.pow(2) / n
    widest = int(variance.argmax())
    others = torch.arange(len(variance)) != widest
    return Reconstruction(
        positions=n,
        fvu=float(error.sum() / variance.sum()),
        fvu_others=float(error[others].sum() / variance[others].sum()),
        widest=float(variance[widest] / variance.sum()),
        l0=active / n,
        dead=int((~fired).sum()),
        dead_positions=n + more,
    )


def losses(
    model: Any, saes: Mapping[int, ScopeSAE], texts: Sequence[str], **options: Any
) -> dict[int, Losses]:
    """`{layer: Losses}`; `model` is a whole one, with its head."""
    noise = {layer: random_sae(sae, seed=layer) for layer, sae in saes.items()}
    found = fidelity(model, saes, texts, **options)
    floor = fidelity(model, noise, texts, **options)
    return {layer: _losses(found[layer], floor[layer]) for layer in saes}


def _losses(found: Fidelity, floor: Fidelity) -> Losses:
    assert found.loss is not None
    assert found.spliced is not None
    assert found.zeroed is not None
    assert floor.spliced is not None
    return Losses(found.tokens, found.loss, found.spliced, floor.spliced, found.zeroed)
