"""Which documents are compared (chosen by a label or by numbers), and which are held out.

Every command that takes a value of a label looks it up here, so that a boolean, a number or a text
is written in the same way everywhere. Documents with the same text are always in the same part of a
split. What is measured on the documents is `contrast.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.errors import TooLittleData, UnknownName

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = [
    "DocumentLabel",
    "Groups",
    "by_documents",
    "by_label",
    "halves",
    "held_out_texts",
    "label_text",
    "split",
]

SHOWN = 12
YES = frozenset({"1", "true", "yes"})
NO = frozenset({"0", "false", "no"})
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


def label_text(value: Any) -> str | None:
    """A label's value as text: `true` for True, `2` for 2.0; None for a missing value or NaN."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


class DocumentLabel:
    """One label of some documents: the value of each as text, and the values that a name means."""

    def __init__(self, name: str, values: Iterable[Any]) -> None:
        """`values` has one entry for each document, None where a document has no such label."""
        self.name = name
        self.texts = [label_text(value) for value in values]

    @classmethod
    def of(cls, store: FeatureStore, name: str) -> DocumentLabel:
        """The label of every document of a store; raises for a label that the store lacks."""
        store.manifest.check_label(name)
        return cls(name, store.labels(name))

    @cached_property
    def counts(self) -> Counter[str]:
        """How many documents have each value."""
        return Counter(text for text in self.texts if text is not None)

    @property
    def known(self) -> Bools:
        """Which documents have the label. `[n_docs]`"""
        return np.array([text is not None for text in self.texts], dtype=bool)

    @property
    def shown(self) -> str:
        """The values and how many documents have each, the most frequent first."""
        some = [f"{value} ({n:,})" for value, n in self.counts.most_common(SHOWN)]
        return ", ".join(some) + (", ..." if len(self.counts) > SHOWN else "")

    @property
    def is_truth(self) -> bool:
        """Whether every value means true or false: a boolean, 1 and 0, or their names."""
        return bool(self.counts) and all(_truth(value) is not None for value in self.counts)

    def find(self, value: Any) -> set[str]:
        """The values of the label that `value` means.

        `True`, `true`, `yes` and `1` mean the same where the label holds nothing but such values,
        and `2.0` means `2`. Raises `UnknownName` with the values that are there.
        """
        wanted = label_text(value) or ""
        found = {wanted} & set(self.counts)
        if self.is_truth and (truth := _truth(wanted)) is not None:
            found = {other for other in self.counts if _truth(other) == truth}
        if not found and (number := _number(wanted)) is not None:
            found = {other for other in self.counts if _number(other) == number}
        if not found:
            raise UnknownName(
                f"no document has {self.name} = {wanted}: there are {self.shown or 'no values'}"
            )
        return found

    def isin(self, *values: Any) -> Bools:
        """Which documents have one of these values. `[n_docs]`"""
        wanted = {found for value in values for found in self.find(value)}
        return np.array([text in wanted for text in self.texts], dtype=bool)

    def truth(self) -> Bools:
        """Which documents have a value that means true, where `is_truth`. `[n_docs]`"""
        return np.array([text is not None and _truth(text) is True for text in self.texts], bool)


def _truth(text: str) -> bool | None:
    """Whether a value means true or false; None where it means neither."""
    number = _number(text)
    word = text.strip().lower() if number is None else label_text(number)
    return True if word in YES else False if word in NO else None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Groups:
    """Documents to compare: `docs` in ascending order, and which of them are positive."""

    docs: Ints
    positive: Bools
    said: dict[str, Any]  # how they were chosen, for the record


def by_label(
    store: FeatureStore,
    label: str,
    positive: str | Sequence[str],
    negative: str | Sequence[str] | None = None,
) -> Groups:
    """Documents whose label has one of the positive values, against the negative values.

    Without `negative`: against every other document that has the label at all.
    """
    column = DocumentLabel.of(store, label)
    wanted = _found(column, positive)
    others = (
        {value for value in column.counts if value} - wanted
        if negative is None
        else _found(column, negative)
    )
    if both := wanted & others:
        raise UnknownName(f"{', '.join(sorted(both))}: both positive and negative")
    if not others:
        raise TooLittleData(
            f"every document with {label} has {label} = {', '.join(sorted(wanted))}: there is"
            " nothing to compare with"
        )
    docs = [doc for doc, value in enumerate(column.texts) if value in wanted or value in others]
    said = {
        "label": label,
        "positive": sorted(wanted),
        "negative": sorted(others) if negative is not None else "all others",
    }
    is_positive = np.array([column.texts[doc] in wanted for doc in docs])
    return Groups(np.array(docs, dtype=np.int64), is_positive, said)


def by_documents(
    n_docs: int,
    positive: Sequence[int] | np.ndarray[Any, Any],
    negative: Sequence[int] | np.ndarray[Any, Any] | None = None,
) -> Groups:
    """Document numbers, or masks over all documents; without `negative`, against all others."""
    inside = _numbers(n_docs, positive, "positive")
    outside = (
        np.setdiff1d(np.arange(n_docs), inside)
        if negative is None
        else _numbers(n_docs, negative, "negative")
    )
    if len(both := np.intersect1d(inside, outside)):
        raise UnknownName(f"document {both[0]} is both positive and negative ({len(both)} such)")
    docs = np.union1d(inside, outside)
    return Groups(docs, np.isin(docs, inside), {"positive": "documents", "negative": "documents"})


def split(
    positive: Bools, texts: Sequence[str | None], held_out: float, seed: int
) -> tuple[Bools, Bools]:
    """Two masks over the documents: for discovery, and held out; the same share of both groups.

    Equal texts stay together: a copy in both parts would make the held-out figures worthless.
    """
    if not 0 < held_out < 1:
        raise TooLittleData(f"held_out = {held_out}: expected a share between 0 and 1")
    held = held_out_texts(texts, np.where(positive, 0, 1), held_out, seed)
    return ~held, held


def held_out_texts(
    texts: Sequence[str | None], kind: np.ndarray[Any, Any], share: float, seed: int
) -> Bools:
    """Which documents are held out: the same share of the different texts of every kind. `[n]`

    `kind` has a number for each document. Equal texts stay together; a document without a text
    equals no other.
    """
    _, first, text_of = _different(texts)
    rng = np.random.default_rng(seed)
    held = np.zeros(len(first), dtype=bool)
    for each in np.unique(kind):
        mine = np.flatnonzero(kind[first] == each)
        held[rng.permutation(mine)[: round(share * len(mine))]] = True
    return held[text_of]


def halves(texts: Sequence[str | None]) -> Bools:
    """Which documents are in the first of two halves: every other different text. `[n]`

    Equal texts stay together; a document without a text equals no other.
    """
    _, first, text_of = _different(texts)
    place = np.empty(len(first), dtype=np.int64)
    place[np.argsort(first)] = np.arange(len(first))  # in the order in which texts first appear
    in_first: Bools = place[text_of] % 2 == 0
    return in_first


def _different(texts: Sequence[str | None]) -> tuple[Any, Ints, Ints]:
    """The different texts, where each first stands, and which of them each document has."""
    names = [f"{n}" if text is None else f"={text}" for n, text in enumerate(texts)]
    found, first, text_of = np.unique(names, return_index=True, return_inverse=True)
    return found, first, text_of


def _found(column: DocumentLabel, values: str | Sequence[str]) -> set[str]:
    given = [values] if isinstance(values, str) or not isinstance(values, Iterable) else values
    return {found for value in given for found in column.find(value)}


def _numbers(n_docs: int, docs: Any, what: str) -> Ints:
    given = np.asarray(docs)
    if given.dtype == bool:
        if given.shape != (n_docs,):
            raise UnknownName(
                f"{what} is a mask of shape {given.shape}: the store has {n_docs} documents"
            )
        return np.flatnonzero(given)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise UnknownName(f"{what}: expected document numbers or a mask, found {given.dtype}")
    given = np.unique(given.astype(np.int64))
    if len(given) and not 0 <= given[0] <= given[-1] < n_docs:
        raise UnknownName(
            f"{what} names document {given[0] if given[0] < 0 else given[-1]}: there are"
            f" 0..{n_docs - 1}"
        )
    return given
