"""What single features tell: the best feature for every language and contrast, on held-out text.

A document is summed up by the share of its tokens on which each feature fires. A rule is one
feature and one threshold on that share; feature, layer and threshold are chosen on discovery
documents of the training split, the F1 is that of documents of held-out pages. Threshold 0 is the
rule "fires anywhere".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_scope_lens.saes.sae import ScopeSAE
from tools.mini.activations import batch_residuals
from tools.mini.data import batches

__all__ = ["SEVERAL", "THRESHOLDS", "Rule", "best_rule", "firing_shares", "several"]

SEVERAL = 16
"""Features that `several` puts together."""

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)


@torch.no_grad()
def firing_shares(model: Any, saes: list[ScopeSAE], rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Share of a row's tokens (but the first) on which a feature fires. `[layers, rows, d_sae]`"""
    width = saes[0].cfg.d_sae
    shares = torch.zeros(len(saes), len(rows), width)
    for numbers, mask, residuals in batch_residuals(model, rows, batches(rows, 4096, 0)):
        mask[:, 0] = False
        length = mask.sum(1, keepdim=True).clamp(min=1)
        for n, (sae, residual) in enumerate(zip(saes, residuals, strict=True)):
            codes = sae.encode_sparse(residual)
            row, token, entry = (codes.active & mask[:, :, None]).nonzero(as_tuple=True)
            cells = row * width + codes.indices[row, token, entry]
            fires = torch.bincount(cells, minlength=len(numbers) * width)
            shares[n, list(numbers)] = fires.view(-1, width) / length
    return shares


@dataclass(frozen=True)
class Rule:
    """`feature` of `layer` fires on more than `threshold` of the tokens: the class is present."""

    layer: int
    feature: int
    threshold: float
    found: float  # F1 on the discovery documents
    f1: float  # on the held-out documents
    precision: float
    recall: float


def _scores(hits: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`(f1, precision, recall)` of every column of `hits [rows, features]`."""
    right = (hits & truth[:, None]).sum(0).double()
    precision = right / hits.sum(0).clamp(min=1)
    recall = right / max(1, int(truth.sum()))
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return f1, precision, recall


def best_rule(
    discovery: torch.Tensor,
    truth: torch.Tensor,
    held: torch.Tensor,
    held_truth: torch.Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    layers: Sequence[int] | None = None,
) -> Rule:
    """The rule that is best on `discovery [layers, rows, d_sae]`, scored on `held`."""
    best = (-1.0, 0, 0, 0.0)
    for layer in range(len(discovery)) if layers is None else layers:
        for threshold in thresholds:
            f1, _, _ = _scores(discovery[layer] > threshold, truth)
            top = int(f1.argmax())
            if float(f1[top]) > best[0] + 1e-9:
                best = (float(f1[top]), layer, top, threshold)
    found, layer, feature, threshold = best
    column = held[layer, :, feature : feature + 1] > threshold
    on_held = (float(value[0]) for value in _scores(column, held_truth))
    return Rule(layer, feature, threshold, found, *on_held)


def several(
    discovery: torch.Tensor, truth: torch.Tensor, held: torch.Tensor, held_truth: torch.Tensor
) -> float:
    """F1 on `held` of a logistic regression on the shares of SEVERAL features of all layers.

    Those whose mean differs most between the classes, in units of their spread, on `discovery`.
    """
    from sklearn.linear_model import LogisticRegression

    known = discovery.transpose(0, 1).flatten(1)
    gap = (known[truth].mean(0) - known[~truth].mean(0)).abs() / (known.std(0) + 1e-3)
    chosen = gap.topk(SEVERAL).indices
    scale = known[:, chosen].std(0) + 1e-6
    fitted = LogisticRegression(max_iter=1000).fit(known[:, chosen] / scale, truth)
    said = fitted.predict(held.transpose(0, 1).flatten(1)[:, chosen] / scale)
    f1, _, _ = _scores(torch.as_tensor(said)[:, None], held_truth)
    return float(f1[0])
