"""Features by number, by the words of their labels, and by a token that they promote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.labels.packs import LabelPack

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_scope_lens.models.unembedding import Unembedding

__all__ = ["Hit", "by_label", "by_number", "by_token"]


@dataclass(frozen=True)
class Hit:
    """A feature, and why it was found."""

    ref: FeatureRef
    why: str  # number, label or token
    found: str
    score: float | None = None  # by token: the logit over the vocabulary's mean


def by_number(asked: str, layers: Sequence[LayerRef]) -> Iterator[Hit]:
    """The features of a number, one per layer, or the one of an address."""
    if asked.isdecimal() and len(asked) <= 18:
        refs = [one.feature(int(asked)) for one in layers if int(asked) < one.row.d_sae]
    elif asked.count("/") >= 2 and asked.rpartition("/")[2].isdecimal():
        refs = [FeatureRef.parse(asked)]
    else:
        refs = []
    yield from (Hit(ref, "number", str(ref.feature)) for ref in refs)


def by_label(asked: str, layers: Sequence[LayerRef], labels: LabelPack) -> Iterator[Hit]:
    """The features of these layers whose labels have all the words, in any order and case."""
    words = asked.casefold().split()
    for ref, label in labels.items():
        if ref.sae in layers and all(word in label.text.casefold() for word in words):
            yield Hit(ref, "label", label.text)


def by_token(
    asked: str,
    layers: Sequence[LayerRef],
    directions: Callable[[LayerRef], Tensor],
    end: Unembedding,
    tokenizer: Any,
    size: int,
    most: int,
) -> list[Hit]:
    """The features whose direction raises the logit of a token most, if what is asked for is one.

    `directions(layer)` are the decoder rows `[d_sae, d_model]`, and the first `size` tokens are the
    vocabulary. All is computed on the CPU, where the unembedding is.
    """
    import torch

    for text in (asked, asked.strip(), f" {asked.strip()}"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) == 1:
            break
    else:
        return []
    weight = end.weight[:size].float()
    column = weight[ids[0]] - weight.mean(0)
    hits: list[Hit] = []
    for layer in layers:
        with torch.no_grad():
            logits = end.normed(directions(layer).detach().cpu()).float() @ column
            best = logits.topk(min(most, len(logits)))
        hits += [
            Hit(layer.feature(feature), "token", text, value)
            for value, feature in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return sorted(hits, key=lambda hit: -(hit.score or 0.0))[:most]
