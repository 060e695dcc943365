"""The logit lens of features: the tokens that each promotes and suppresses, and its neighbours.

The direction of a feature (its decoder row) is read as if it were the whole residual at the end of
the model: through the last norm (for RMSNorm this is exact up to the length) and the unembedding.
The effects of the layers in between are left out, so for early layers this is only a hint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.features.extremes import extremes
from qwen_scope_lens.models.architecture import Model
from qwen_scope_lens.models.checkpoint import Tokenizer
from qwen_scope_lens.models.open import open_model
from qwen_scope_lens.models.token_text import Vocabulary
from qwen_scope_lens.models.tokenize import find_tokenizer
from qwen_scope_lens.models.unembedding import Unembedding, read_unembedding
from qwen_scope_lens.saes.load import load_directions

__all__ = [
    "Neighbours",
    "TokenEffects",
    "nearest",
    "promoted_of",
    "promoting",
    "token_effects",
]


@dataclass(frozen=True)
class TokenEffects:
    """Tokens per feature, and their logits minus the vocabulary's mean; `[features, count]`."""

    promoted: np.ndarray
    promoted_by: np.ndarray
    suppressed: np.ndarray
    suppressed_by: np.ndarray


@dataclass(frozen=True)
class Neighbours:
    """The other features of the largest decoder cosine, per feature; `[features, count]`."""

    features: np.ndarray
    cosines: np.ndarray


@torch.no_grad()
def token_effects(
    directions: Tensor,
    out: Unembedding,
    count: int = 10,
    vocabulary: int | None = None,
    half: bool | None = None,
    progress: bool = False,
) -> TokenEffects:
    """The tokens that `directions [features, d_model]` promote and suppress most.

    Only the first `vocabulary` tokens take part, because models embed some ids that the tokenizer
    never makes.
    """
    if directions.shape[-1] != out.weight.shape[-1]:
        raise WrongModel(
            f"the directions have {directions.shape[-1]} dimensions, the unembedding"
            f" {out.weight.shape[-1]}: the SAE belongs to another model"
        )
    weight = out.weight[:vocabulary]
    title = "promoted tokens" if progress else None
    most, least = extremes(
        directions,
        weight,
        count,
        smallest=True,
        half=half,
        transform=out.normed,
        progress=title,
    )
    centre = _mean(weight)
    mean = torch.cat([out.normed(rows) @ centre for rows in directions.split(4096)])[:, None]
    return TokenEffects(
        most.indices.numpy(),
        (most.values - mean).numpy(),
        least.indices.numpy(),
        (least.values - mean).numpy(),
    )


@torch.no_grad()
def promoting(
    directions: Tensor, out: Unembedding, tokens: Sequence[int], count: int, vocabulary: int
) -> list[tuple[int, int, float]]:
    """The features whose `directions [d_sae, d_model]` promote one of some tokens most.

    `(feature, token, logit minus the vocabulary's mean)` of so many features, the largest first.
    """
    weight = out.weight[:vocabulary]
    columns = weight[list(tokens)].float() - _mean(weight)
    best = (out.normed(directions.detach().cpu()) @ columns.T).max(1)
    values, features = best.values.topk(min(count, len(best.values)))
    return [
        (feature, tokens[at], value)
        for feature, at, value in zip(
            features.tolist(), best.indices[features].tolist(), values.tolist(), strict=True
        )
    ]


def promoted_of(
    model: str | Model,
    sae_folder: str | Path | None = None,
    count: int = 8,
    *,
    end: Unembedding | None = None,
    tokenizer: Tokenizer | None = None,
) -> Callable[[Sequence[FeatureRef]], dict[FeatureRef, tuple[str, ...]]]:
    """A function from features to the tokens that they promote; it reads only their decoder rows.

    `end` and `tokenizer` are those of the model, where they are known already.
    """

    def of(refs: Sequence[FeatureRef]) -> dict[FeatureRef, tuple[str, ...]]:
        last = read_unembedding(model) if end is None else end
        known = tokenizer
        if known is None:
            here = open_model(model, up_to_layer=0) if isinstance(model, str) else model
            known = find_tokenizer(here)
        vocabulary = Vocabulary(known)
        by_sae: dict[LayerRef, list[FeatureRef]] = {}
        for ref in refs:
            by_sae.setdefault(ref.sae, []).append(ref)
        found: dict[FeatureRef, tuple[str, ...]] = {}
        for sae, some in by_sae.items():
            rows = load_directions(sae, [ref.feature for ref in some], folder=sae_folder).float()
            effects = token_effects(rows, last, count, vocabulary=len(vocabulary))
            for ref, ids in zip(some, effects.promoted.tolist(), strict=True):
                found[ref] = tuple(map(vocabulary.text, ids))
        return found

    return of


@torch.no_grad()
def nearest(
    directions: Tensor,
    count: int = 8,
    half: bool | None = None,
    progress: bool = False,
    *,
    among: Tensor | None = None,
) -> Neighbours:
    """The nearest others of `directions [features, d_model]`, or the nearest rows of `among
    [others, d_model]`, such as another layer's directions. A zero direction has cosine 0."""
    columns = directions if among is None else among
    if columns.shape[-1] != directions.shape[-1]:
        raise WrongModel(
            f"the directions have {directions.shape[-1]} dimensions, the others"
            f" {columns.shape[-1]}: only SAEs of one residual stream can be compared"
        )
    norms = torch.cat([rows.float().norm(dim=-1) for rows in columns.split(4096)])
    [found] = extremes(
        directions,
        columns,
        count,
        without_self=among is None,
        half=half,
        transform=lambda rows: torch.nn.functional.normalize(rows, dim=-1),
        column_scale=1 / norms.clamp(min=1e-12),
        progress="nearest directions" if progress else None,
    )
    return Neighbours(found.indices.cpu().numpy(), found.values.clamp(-1, 1).cpu().numpy())


def _mean(weight: Tensor) -> Tensor:
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for rows in weight.split(8192):
        total += rows.double().sum(dim=0)
    return (total / len(weight)).float()
