"""Find features by their address, by words of their labels, or by a token that they promote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import UnknownName
from qwen_scope_lens.labels.packs import LabelPack

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_scope_lens.models.token_text import Vocabulary
    from qwen_scope_lens.models.unembedding import Unembedding

__all__ = ["Hit", "Shelf", "look_up"]

LONGEST_NUMBER = 9
"""Digits: no SAE has more features."""


@dataclass(frozen=True)
class Hit:
    """A feature, and why it was found."""

    ref: FeatureRef
    why: Literal["address", "label", "token"]
    found: str  # the address, the label or the token
    score: float | None = None  # of a token: the logit that it gets over the vocabulary's mean


@dataclass(frozen=True)
class Shelf:
    """Where features are looked for: some layers of one group."""

    layers: Sequence[LayerRef]
    labels: LabelPack
    directions: Callable[[LayerRef], Tensor]  # the decoder rows of a layer `[d_sae, d_model]`
    end: Callable[[], Unembedding] | None  # None: tokens are not looked for
    tokenizer: Any
    vocabulary: Vocabulary


def look_up(asked: str, shelf: Shelf, most: int) -> list[Hit]:
    """At most so many features, each once: by address first, then by label, then by token.

    A number means the features of that number in the layers, and an address any feature of the
    group. Of a label all words have to be there, in any order and case. A token is what `asked` is
    without or with a space before it. Raises for an address that the group does not have.
    """
    found: dict[FeatureRef, Hit] = {}
    for hits in (_by_address, _by_label, _by_token):
        if len(found) < most:
            for hit in hits(asked, shelf, most):
                found.setdefault(hit.ref, hit)
    return list(found.values())[:most]


def _by_address(asked: str, shelf: Shelf, most: int) -> Iterator[Hit]:
    bare = asked.strip()
    refs: list[FeatureRef] = []
    if bare.isdecimal() and len(bare) <= LONGEST_NUMBER:
        refs = [one.feature(int(bare)) for one in shelf.layers if int(bare) < one.row.d_sae]
    elif bare.count("/") >= 2 and bare.rpartition("/")[2].isdecimal():
        try:
            refs = [FeatureRef.parse(bare)]
        except UnknownName:
            return  # a text with slashes
        groups = {layer.group for layer in shelf.layers}
        if refs[0].group not in groups:
            raise UnknownName(
                f"{refs[0]} belongs to other SAEs than those that are open: expected an address of"
                f" {', '.join(sorted(groups))}"
            )
    yield from (Hit(ref, "address", str(ref)) for ref in refs)


def _by_label(asked: str, shelf: Shelf, most: int) -> Iterator[Hit]:
    words = asked.casefold().split()
    for ref, label in shelf.labels.items():
        text = label.text.casefold()
        if words and ref.sae in shelf.layers and all(word in text for word in words):
            yield Hit(ref, "label", label.text)


def _by_token(asked: str, shelf: Shelf, most: int) -> Sequence[Hit]:
    """The features whose direction raises the logit of a token most, over the layers."""
    tokens: dict[int, None] = {}
    for text in (asked, asked.strip(), f" {asked.strip()}"):
        ids = shelf.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            tokens[ids[0]] = None
    if not tokens or shelf.end is None:
        return []
    from qwen_scope_lens.features.token_effects import promoting

    end, size, word = shelf.end(), len(shelf.vocabulary), shelf.vocabulary.text
    hits = []
    for layer in shelf.layers:
        best = promoting(shelf.directions(layer), end, list(tokens), most, size)
        hits += [
            Hit(layer.feature(feature), "token", word(token), value)
            for feature, token, value in best
        ]
    return sorted(hits, key=lambda hit: -(hit.score or 0.0))[:most]
