"""From a labelled corpus, or from pairs, to hypotheses: features that separate, each tested anew.

Half of the documents propose: features whose difference passes a false-discovery rate, the
strongest first, without those that fire on the same documents as a stronger one. The other half
tests each proposal once, and the false-discovery rate is controlled over all tests. Documents with
equal texts, and the two sides of a pair, stay in one half. `discovery.py` holds the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.concepts.discovery import Discovery, Hypothesis
from qwen_scope_lens.concepts.pairs import PAIR, PREFERRED, REJECTED, SIDE
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.features.contrast import contrast, q_values
from qwen_scope_lens.features.document_sets import DocumentLabel, held_out_texts
from qwen_scope_lens.features.pool import How, pool
from qwen_scope_lens.features.statistics import statistics
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.labels.passages import Passages
from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["discover", "discover_pairs"]

MOST_VALUES = 20
LEAST_DOCUMENTS = 3
SHARED = 0.8
"""From this correlation on, two features make one hypothesis."""
LOOKED_AT = 200
"""Of the features that pass, so many are compared with each other."""
PASSAGES = 3

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class _Test:
    """One comparison of all features on some documents; every array is `[features]`."""

    size: (
        Floats  # AUROC, or of the pairs that differ the share that is higher on the preferred side
    )
    p: Floats
    rate_positive: Floats
    rate_negative: Floats
    documents: np.ndarray[Any, Any]


def discover(
    store: FeatureStore,
    label: str,
    *,
    values: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    labels: LabelPack | None = None,
    most: int = 10,
    fdr: float = 0.05,
    how: How = "mean",
    seed: int = 0,
) -> Discovery:
    """Hypotheses of the form: documents with this value of the label have more of this feature.

    Args:
        values: of the label, each against all other documents that have it; default: all of them.
        most: hypotheses per value.
        fdr: the false-discovery rate, of the proposals and of the tests.
        how: how the tokens of a document become one number, see `pool`.
    """
    column = DocumentLabel.of(store, label)
    chosen = sorted({one for value in values for one in column.find(value)}) if values else None
    wanted = chosen or [value for value, _ in column.counts.most_common()]
    if len(wanted) > MOST_VALUES:
        raise TooLittleData(
            f"{label} has {len(wanted):,} values: {column.shown}. Name at most {MOST_VALUES}"
        )
    if len(column.counts) < 2:
        raise TooLittleData(f"{label} has one value, {column.shown}: there is nothing to compare")
    numbers, refs, x = _matrix(store, layers, how)
    docs = np.flatnonzero(column.known)
    texts = store.documents(["text"])["text"].to_pylist()
    said = np.array([column.texts[doc] for doc in docs])
    kinds = np.unique(said, return_inverse=True)[1]
    held = held_out_texts([texts[doc] for doc in docs], kinds, 0.5, seed)

    def test(value: str, part: Bools, some: np.ndarray[Any, Any] | None = None) -> _Test:
        rows = x[docs[part]]
        found = contrast(rows if some is None else rows[:, some], said[part] == value)
        return _Test(
            found.auroc,
            found.p_value,
            found.rate_positive,
            found.rate_negative,
            found.documents,
        )

    groups = [
        (value, test, int((said[~held] == value).sum()), int((said[held] == value).sum()))
        for value in wanted
    ]
    for value, _, inside, outside in groups:
        if min(inside, outside) < 2:
            raise TooLittleData(
                f"{inside + outside} documents have {label} = {value}: at least 4 are needed, and"
                " some dozens to find anything"
            )
    question = f"which features do documents with a value of {label} have more of than the others?"
    settings = {"label": label, "values": wanted, "pool": how, "fdr": fdr, "seed": seed}
    counts = {"documents": len(docs), "proposing": int((~held).sum()), "testing": int(held.sum())}
    return _discovery(
        store, refs, x[docs], groups, held, question, settings, counts, numbers, labels, most, fdr
    )


def discover_pairs(
    store: FeatureStore,
    *,
    layers: Iterable[int] | None = None,
    labels: LabelPack | None = None,
    most: int = 10,
    fdr: float = 0.05,
    how: How = "mean",
    seed: int = 0,
) -> Discovery:
    """Hypotheses about pairs, from a store of the documents that `pairs_of` made.

    The test is the sign test: of the pairs whose two sides differ in a feature, on how many is the
    preferred side higher? Every feature is asked for both sides.
    """
    numbers, refs, x = _matrix(store, layers, how)
    pair, side = store.labels(PAIR).tolist(), store.labels(SIDE).tolist()
    of: dict[Any, dict[str, int]] = {}
    for doc, (number, name) in enumerate(zip(pair, side, strict=True)):
        of.setdefault(number, {})[name] = doc
    whole = [sides for sides in of.values() if set(sides) == {PREFERRED, REJECTED}]
    if len(whole) < 8:
        raise TooLittleData(
            f"{len(whole)} pairs: at least 8 are needed, and some dozens to find anything"
        )
    rows = {name: np.array([sides[name] for sides in whole]) for name in (PREFERRED, REJECTED)}
    texts = store.documents(["text"])["text"].to_pylist()
    held = held_out_texts(
        [f"{texts[sides[PREFERRED]]}\0{texts[sides[REJECTED]]}" for sides in whole],
        np.zeros(len(whole), dtype=int),
        0.5,
        seed,
    )

    def test(value: str, part: Bools, some: np.ndarray[Any, Any] | None = None) -> _Test:
        other = REJECTED if value == PREFERRED else PREFERRED
        high, low = x[rows[value][part]], x[rows[other][part]]
        if some is not None:
            high, low = high[:, some], low[:, some]
        return sign_test(high, low)

    groups = [(value, test, int((~held).sum()), int(held.sum())) for value in (PREFERRED, REJECTED)]
    both = x[np.concatenate([rows[PREFERRED], rows[REJECTED]])]
    counts = {"pairs": len(whole), "proposing": int((~held).sum()), "testing": int(held.sum())}
    settings = {"pairs": True, "pool": how, "fdr": fdr, "seed": seed}
    question = "which features does one side of the pairs have more of?"
    return _discovery(
        store,
        refs,
        both,
        groups,
        held,
        question,
        settings,
        counts,
        numbers,
        labels,
        most,
        fdr,
        twice=True,
    )


def _matrix(
    store: FeatureStore, layers: Iterable[int] | None, how: How
) -> tuple[list[int], list[LayerRef], csr_matrix]:
    """Documents by features of all layers, one layer after the other."""
    numbers = list(store.layers) if layers is None else sorted(set(layers))
    refs = [LayerRef.parse(store.sae(number).ref) for number in numbers]
    parts = [pool(store, number, how=how) for number in numbers]
    return numbers, refs, csr_matrix(hstack(parts, format="csr"))


def sign_test(high: csr_matrix, low: csr_matrix) -> _Test:
    """The sign test of every feature over pairs, two-sided and exact."""
    from scipy.stats import binom

    difference = csr_matrix(high - low)
    above = np.asarray((difference > 0).sum(0)).ravel()
    below = np.asarray((difference < 0).sum(0)).ravel()
    n = above + below
    p = np.minimum(1.0, 2 * binom.sf(np.maximum(above, below) - 1, np.maximum(n, 1), 0.5))
    pairs = max(1, high.shape[0])
    return _Test(
        size=np.where(n > 0, above / np.maximum(n, 1), 0.5),
        p=np.where(n > 0, p, 1.0),
        rate_positive=np.asarray((high > 0).sum(0)).ravel() / pairs,
        rate_negative=np.asarray((low > 0).sum(0)).ravel() / pairs,
        documents=n,
    )


def _discovery(
    store: FeatureStore,
    refs: Sequence[LayerRef],
    x: csr_matrix,
    groups: Sequence[Any],
    held: Bools,
    question: str,
    settings: dict[str, Any],
    counts: dict[str, int],
    layers: Sequence[int],
    labels: LabelPack | None,
    most: int,
    fdr: float,
    twice: bool = False,
) -> Discovery:
    """Propose on one half, test on the other; `x` has the documents of `held`, twice for pairs."""
    d_sae = x.shape[1] // len(refs)
    halves = [half for _, _, *sides in groups for half in sides]
    if min(halves) < 2:
        raise TooLittleData(
            f"one half has {min(halves)} documents or pairs of a side: equal texts stay together,"
            " and at least 2 are needed in each half"
        )
    first = np.concatenate([~held, ~held]) if twice else ~held
    proposed: list[tuple[str, int, float]] = []
    for value, test, _, _ in groups:
        here = test(value, ~held)
        q = q_values(here.p, here.documents >= LEAST_DOCUMENTS)
        passed = np.flatnonzero((q <= fdr) & (here.size > 0.5))
        order = passed[np.lexsort((here.p[passed], -here.size[passed]))][:LOOKED_AT]
        chosen = _different(x[first][:, order], most)
        proposed += [(value, int(order[i]), float(here.size[order[i]])) for i in chosen]
    sizes, p, rates = [], [], []
    for value, test, _, _ in groups:
        mine = np.array([at for name, at, _ in proposed if name == value], dtype=np.int64)
        if len(mine):
            there = test(value, held, mine)
            sizes += there.size.tolist()
            p += there.p.tolist()
            rates += list(zip(there.rate_positive, there.rate_negative, strict=True))
    q = q_values(np.array(p), np.ones(len(p), dtype=bool)) if p else np.zeros(0)
    named = [refs[at // d_sae].feature(at % d_sae) for _, at, _ in proposed]
    shown = dict(_passages(store, named))
    rows = tuple(
        Hypothesis(
            ref=str(ref),
            value=value,
            label=labels.text(ref) if labels is not None else "",
            proposed_size=before,
            size=float(size),
            rate_positive=float(rate[0]),
            rate_negative=float(rate[1]),
            p_value=float(one_p),
            q_value=float(one_q),
            holds=bool(one_q <= fdr and size > 0.5),
            passages=shown.get(ref, ()),
        )
        for (value, _, before), ref, size, rate, one_p, one_q in zip(
            proposed, named, sizes, rates, p, q.tolist(), strict=True
        )
    )
    model = store.manifest.model.id
    facts = {"model": model, "sae": refs[0].group, "layers": list(layers), **settings}
    values = Counter({value: inside + outside for value, _, inside, outside in groups})
    return Discovery(
        question,
        "share of pairs" if twice else "AUROC",
        tuple(sorted(rows, key=lambda row: (not row.holds, row.q_value, -row.size))),
        {**counts, **{f"with {value}": n for value, n in values.items() if not twice}},
        facts,
    )


def _different(x: csr_matrix, most: int) -> list[int]:
    """The first columns, without those that go along with an earlier one."""
    dense = np.asarray(x.todense(), dtype=np.float64)
    dense -= dense.mean(0)
    dense /= np.maximum(np.linalg.norm(dense, axis=0), 1e-12)
    chosen: list[int] = []
    for column in range(dense.shape[1]):
        if len(chosen) == most:
            break
        alike = dense[:, chosen].T @ dense[:, column] if chosen else np.zeros(1)
        if alike.max() < SHARED:
            chosen.append(column)
    return chosen


def _passages(
    store: FeatureStore, refs: Sequence[FeatureRef]
) -> Iterator[tuple[FeatureRef, tuple[str, ...]]]:
    source = Passages(store)
    for layer in sorted({ref.layer for ref in refs}):
        facts = statistics(store, layer, examples=PASSAGES, sample=0, partners=1)
        for ref in (ref for ref in refs if ref.layer == layer):
            examples = facts.top_examples(ref.feature)[:PASSAGES]
            yield ref, tuple(source.top(layer, ref.feature, examples))
