"""Which documents are compared: by a label's values or by numbers, and the split held out.

Documents with the same text never stand on both sides of the split. What is measured on them is
`contrast.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.errors import TooLittleData, UnknownName

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["Groups", "by_documents", "by_label", "split"]

SHOWN = 12
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


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

    Without `negative`: against every other document that has the label at all. Values are compared
    as text, so that `1` and `"1"` are the same.
    """
    if label not in store.label_names:
        have = ", ".join(store.label_names) or "none at all"
        raise UnknownName(f"the documents of this store have no label {label!r}: they have {have}")
    found = [None if value is None else str(value) for value in store.labels(label)]
    wanted = _values(positive)
    others = _values(negative) if negative is not None else {v for v in found if v} - wanted
    if both := wanted & others:
        raise UnknownName(f"{', '.join(sorted(both))}: both positive and negative")
    counts = {value: found.count(value) for value in dict.fromkeys(found) if value is not None}
    if missing := sorted((wanted | others) - set(counts)):
        have = ", ".join(sorted(counts)[:SHOWN]) + (", ..." if len(counts) > SHOWN else "")
        raise UnknownName(f"no document has {label} = {', '.join(missing)}: there are {have}")
    docs = [doc for doc, value in enumerate(found) if value in wanted or value in others]
    said = {
        "label": label,
        "positive": sorted(wanted),
        "negative": sorted(others) if negative is not None else "all others",
    }
    if not others:
        raise TooLittleData(
            f"every document with {label} has {label} = {', '.join(sorted(wanted))}: there is"
            " nothing to compare with"
        )
    is_positive = np.array([found[doc] in wanted for doc in docs])
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
    _, first, text_of = np.unique(
        [f"{number}" if text is None else f"={text}" for number, text in enumerate(texts)],
        return_index=True,
        return_inverse=True,
    )
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(first), dtype=bool)
    for side in (True, False):
        mine = np.flatnonzero(positive[first] == side)
        rng.shuffle(mine)
        chosen[mine[: round(held_out * len(mine))]] = True
    held = chosen[text_of]
    return ~held, held


def _values(values: str | Sequence[str]) -> set[str]:
    return {values} if isinstance(values, str) else {str(value) for value in values}


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
