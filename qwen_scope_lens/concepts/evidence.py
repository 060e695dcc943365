"""What speaks for a feature, layer by layer: what the texts fire, and what the direction says.

One SAE is open at a time, and what is kept of it is one number per feature and column, so memory
does not grow with the number of layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_scope_lens.concepts.concept import Concept
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.features.pool import pool
from qwen_scope_lens.models.jacobian import Lens
from qwen_scope_lens.models.residuals import Capture, iter_captures
from qwen_scope_lens.models.unembedding import Unembedding
from qwen_scope_lens.saes.layer_sae import LayerSAE

if TYPE_CHECKING:
    from qwen_scope_lens.models.architecture import Model
    from qwen_scope_lens.models.checkpoint import Tokenizer
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["Readout", "TextEvidence", "lifts", "read_groups", "readout", "says", "shares"]

Floats = np.ndarray[Any, np.dtype[np.float32]]

MOST_TOKENS = 64
"""How much of a text is read. Examples are sentences; longer texts are cut."""
GROUPS = ("words", "fillers", "examples", "neutral")
AT_ONCE = 16
"""Rows of a decoder that are multiplied at a time: 4 MB of 65,536 features, which a cache holds."""


@dataclass(frozen=True)
class TextEvidence:
    """How the features of a layer fire on the groups of texts, each `[d_sae]` float32.

    A share is a feature's part of all activation on the tokens of a group; every text of a group
    counts alike, however long it is.
    """

    share: dict[str, Floats]

    def rise(self, group: str, other: str) -> Floats:
        """The share in one group minus that in the other."""
        difference: Floats = self.share[group] - self.share[other]
        return difference


def read_groups(
    model: Model,
    concept: Concept,
    layers: Sequence[int],
    tokenizer: Tokenizer,
    wanted: Container[str] = GROUPS,
) -> tuple[list[Capture], list[str]]:
    """The residuals of the texts of a concept, of the wanted groups, and the group of each text.

    Together they are some thousand tokens: at most `MOST_TOKENS` per text.
    """
    groups, texts = zip(*(pair for pair in concept.texts() if pair[0] in wanted), strict=True)
    found = iter_captures(
        model, texts, layers, tokenizer=tokenizer, truncate=True, max_tokens=MOST_TOKENS
    )
    return list(found), list(groups)


@torch.no_grad()
def shares(
    sae: LayerSAE, layer: int, captures: Sequence[Capture], groups: Sequence[str]
) -> TextEvidence:
    """Encode the texts with the SAE of one layer."""
    sums = {group: torch.zeros(sae.cfg.d_sae, dtype=torch.float64) for group in groups}
    for capture in captures:
        keep = capture.keep(layer).cpu()
        rows = capture.doc_rows()
        tokens = torch.zeros(len(capture), dtype=torch.float64).index_add_(
            0, rows, keep.to(torch.float64)
        )
        x = capture.residuals[layer][keep.to(capture.residuals[layer].device)]
        codes = sae.encode_sparse(x.to(sae.W_dec.device)).detach().to("cpu")
        of_doc = rows[keep]
        values = codes.values.double() / tokens[of_doc][:, None]
        for number, doc in enumerate(capture.doc_ids):
            mine = of_doc == number
            active = codes.active[mine]
            sums[groups[doc]].index_add_(
                0, codes.indices[mine][active].long(), values[mine][active]
            )
    return TextEvidence({group: _share(total.numpy()) for group, total in sums.items()})


@torch.no_grad()
def lifts(
    sae: LayerSAE,
    layer: int,
    captures: Sequence[Capture],
    groups: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> list[Floats]:
    """How much more each feature is called for by one group of texts than by another.

    The mean residual of the one minus that of the other, through the encoder: the difference of
    mean pre-activations, in standard deviations above the layer's mean. One product per layer in
    place of one per token, and no selection of the top k: a feature that is called for may still
    never fire. `[d_sae]` for each of `pairs`
    """
    sums: dict[str, Tensor] = {}
    counts = Counter(groups)
    for capture in captures:
        keep = capture.keep(layer).cpu()
        x = capture.residuals[layer].float().cpu() * keep[:, None]
        rows = capture.doc_rows()
        tokens = torch.zeros(len(capture)).index_add_(0, rows, keep.float()).clamp(min=1)
        mean = torch.zeros(len(capture), x.shape[1]).index_add_(0, rows, x) / tokens[:, None]
        for number, doc in enumerate(capture.doc_ids):
            group = groups[doc]
            sums[group] = sums.get(group, torch.zeros(x.shape[1])) + mean[number] / counts[group]
    apart = torch.stack([sums[one] - sums[other] for one, other in pairs])
    weights = sae.W_enc.detach()
    found = (apart.to(weights.device, weights.dtype) @ weights).float()
    found -= found.mean(1, keepdim=True)
    return list((found / found.std(1, keepdim=True).clamp(min=1e-12)).cpu().numpy())


def share_in_store(store: FeatureStore, layer: int) -> Floats:
    """The shares on the documents of a store, every document counting alike."""
    found = np.asarray(pool(store, layer, how="mean").sum(0)).ravel()
    if not found.any():
        raise TooLittleData(f"no feature of layer {layer} fires in the store {store.path}")
    return _share(found)


def _share(total: np.ndarray[Any, Any]) -> Floats:
    return (total / max(float(total.sum()), 1e-30)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Readout:
    """The tokens that a concept's features would promote, as one direction of the last residual."""

    direction: Tensor  # [d_model], float32: their mean unembedding minus that of all tokens
    tokens: tuple[int, ...]  # those of the words


def readout(concept: Concept, tokenizer: Tokenizer, end: Unembedding) -> Readout:
    """The tokens of the words, in the usual spellings, and those of the examples, half and half.

    A token of the examples counts by the share of examples that have it, and not at all where the
    texts to compare with have it, too.
    """
    words = concept.words.strip()
    forms = dict.fromkeys(
        f"{space}{form}"
        for form in (words, words.lower(), words.capitalize())
        for space in ("", " ")
    )
    own = {t for form in forms for t in _ids(tokenizer, form)}
    weights = [Counter(own)]
    if concept.examples:
        sides = [
            Counter(t for text in texts for t in set(_ids(tokenizer, text)))
            for group in ("examples", "neutral")
            for texts in [[text for name, text in concept.texts() if name == group]]
        ]
        fresh = Counter({t: n for t, n in sides[0].items() if t not in sides[1]})
        if fresh:
            weights.append(fresh)
    mean = _mean(end.weight)
    direction = torch.zeros_like(mean)
    for part in weights:
        ids = torch.tensor(sorted(part))
        share = torch.tensor([float(part[t]) for t in sorted(part)])
        direction += (share / share.sum()) @ end.weight[ids].float() - mean
    return Readout(direction / len(weights), tuple(sorted(own)))


@torch.no_grad()
def says(
    sae: LayerSAE, layer: int, wanted: Readout, end: Unembedding, lens: Lens | None = None
) -> Floats:
    """How much each feature raises the concept's tokens: standard deviations above its layer's
    mean.

    The decoder row, at length one, through the last norm's scale and the unembedding; with a lens,
    through its matrix first. `[d_sae]`
    """
    vector = wanted.direction * end.scale
    if lens is not None:
        vector = lens.pull(layer, vector)
    columns = sae.W_dec.detach().T  # [d_model, d_sae], as published files hold it
    vector = vector.to(columns.device)
    dots = torch.zeros(columns.shape[1], device=columns.device)
    squares = torch.zeros_like(dots)
    if columns.is_contiguous():
        for start in range(0, len(columns), AT_ONCE):
            block = columns[start : start + AT_ONCE].float()
            dots += vector[start : start + AT_ONCE] @ block
            squares += (block * block).sum(dim=0)
    else:
        for start in range(0, len(dots), 256 * AT_ONCE):
            block = columns.T[start : start + 256 * AT_ONCE].float()
            dots[start : start + len(block)] = block @ vector
            squares[start : start + len(block)] = torch.linalg.vector_norm(block, dim=1) ** 2
    scores = dots / squares.sqrt().clamp(min=1e-12)
    spread = scores.std().clamp(min=1e-12)
    found: Floats = ((scores - scores.mean()) / spread).cpu().numpy()
    return found


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:MOST_TOKENS]
    return found


def _mean(weight: Tensor) -> Tensor:
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for rows in weight.split(8192):
        total += rows.double().sum(dim=0)
    return (total / len(weight)).float()
