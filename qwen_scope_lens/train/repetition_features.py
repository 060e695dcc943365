"""Repetition features: what rises between the first and the last occurrence of a repeated token.

The paper takes, for each repeated token, the activation at its last occurrence less that at its
first, same token and same context; the largest increases are repetition features. What it leaves
open is a parameter here. Whether such a feature causes loops is asked by `causes.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadFile, ScopeError, TooLittleData
from qwen_scope_lens.files import read_json, write_json

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["RepetitionFeature", "RepetitionFeatures", "find_repetition_features", "occurrences"]

FORMAT, VERSION = "qsl-repetition-features", 2  # 1: ordered by z


@dataclass(frozen=True)
class RepetitionFeature:
    """How much a feature rises over a repetition, averaged over documents."""

    ref: FeatureRef
    rise: float  # on the documents it was chosen by
    held_out: float  # on the others
    z: float  # rise over its standard error across documents
    last: float  # mean activation at last occurrences: the scale for a steering strength
    chance: float  # the largest z of any feature when first and last are swapped at random

    @property
    def stands_out(self) -> bool:
        """Whether every document shows the rise: a remark, since a cause of loops need not."""
        return self.z > self.chance and self.held_out > 0


@dataclass(frozen=True)
class RepetitionFeatures:
    """The features of some layers, largest rise first."""

    features: tuple[RepetitionFeature, ...]
    settings: Mapping[str, Any]

    def save(self, path: Path) -> None:
        rows = [{**vars(feature), "ref": str(feature.ref)} for feature in self.features]
        content = {"settings": dict(self.settings), "features": rows}
        write_json(path, FORMAT, VERSION, content)

    @classmethod
    def load(cls, path: Path) -> RepetitionFeatures:
        content = read_json(path, FORMAT, VERSION, "qsl train repetition find")
        try:
            rows = tuple(
                RepetitionFeature(**{**row, "ref": FeatureRef.parse(row["ref"])})
                for row in content["features"]
            )
            return cls(rows, dict(content["settings"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ScopeError):
                raise
            raise BadFile(
                f"{path} is incomplete or damaged ({error!r}): make it again with"
                " `qsl train repetition find`"
            ) from error


def occurrences(tokens: Sequence[int], *, context: int = 2, min_times: int = 3) -> np.ndarray:
    """First and last position of every token that repeats after the same `context` tokens.

    `[n] -> [m, 2]`; a token counts when it stands `min_times` times or more in its context.
    """
    seen: dict[tuple[int, ...], list[int]] = {}
    for position in range(context, len(tokens)):
        seen.setdefault(tuple(tokens[position - context : position + 1]), []).append(position)
    pairs = [(places[0], places[-1]) for places in seen.values() if len(places) >= min_times]
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def find_repetition_features(
    store: FeatureStore,
    *,
    docs: Iterable[int] | None = None,
    layers: Sequence[int] | None = None,
    context: int = 2,
    min_times: int = 3,
    top: int = 10,
    shuffles: int = 100,
    seed: int = 0,
) -> RepetitionFeatures:
    """The features that rise most from first to last occurrence in repeating documents.

    Rises are averaged within a document first, then over documents, so that one long loop does not
    speak for all; as in the paper the largest rises come first, `top` of each layer. Half of the
    documents choose, half score. `z` is the rise over its standard error and `chance` the largest z
    of any feature when the two ends of every document are swapped at random (95th percentile of
    `shuffles`): both describe a rise and neither selects, since a feature that makes a model loop
    may rise in a few documents only.
    """
    wanted = tuple(layers) if layers is not None else store.layers
    chosen = None if docs is None else np.asarray(sorted(set(docs)))
    rng = np.random.default_rng(seed)
    found: list[RepetitionFeature] = []
    used = 0
    for layer in wanted:
        rises, lasts = _rises(store, layer, chosen, context, min_times)
        used = len(rises)
        if used < 4:
            raise TooLittleData(
                f"{used} documents repeat a token {min_times} times after the same {context}"
                " tokens: half of them choose and half score, so four are the least. Extract texts"
                " that loop, or lower the context or the number of times"
            )
        order = rng.permutation(used)
        first, second = rises[order[::2]], rises[order[1::2]]
        z = _z(first)
        signs = rng.choice([-1.0, 1.0], size=(shuffles, len(first)))
        chance = float(np.quantile([_z(first * sign[:, None]).max() for sign in signs], 0.95))
        found.extend(
            RepetitionFeature(
                LayerRef.parse(store.sae(layer).ref).feature(feature),
                float(first[:, feature].mean()),
                float(second[:, feature].mean()),
                float(z[feature]),
                float(lasts[:, feature].mean()),
                chance,
            )
            for feature in np.argsort(-first.mean(axis=0), kind="stable")[:top].tolist()
        )
    found.sort(key=lambda feature: (-feature.rise, feature.ref))
    return RepetitionFeatures(
        tuple(found),
        {"context": context, "min_times": min_times, "documents": used, "seed": seed},
    )


def _rises(
    store: FeatureStore,
    layer: int,
    docs: np.ndarray | None,
    context: int,
    min_times: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean rise and mean last activation of every repeating document. `[n, d_sae]` each"""
    rises, lasts = [], []
    for block in store.iter_blocks(layer, docs=docs):
        matrix = block.codes.to_scipy_csr()
        starts = np.flatnonzero(np.diff(block.doc, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(block.doc)], strict=True):
            tokens = block.token_ids[start:end].tolist()
            pairs = start + occurrences(tokens, context=context, min_times=min_times)
            if len(pairs):
                last = np.asarray(matrix[pairs[:, 1]].mean(axis=0)).ravel()
                rises.append(last - np.asarray(matrix[pairs[:, 0]].mean(axis=0)).ravel())
                lasts.append(last)
    width = store.sae(layer).d_sae
    return np.array(rises).reshape(-1, width), np.array(lasts).reshape(-1, width)


def _z(rises: np.ndarray) -> np.ndarray:
    """Mean over standard error across documents; 0 where nothing moves. `[n, d] -> [d]`

    A pseudo-count of one document at the mean spread keeps a feature that moves in a single
    document from dividing by nothing.
    """
    n = len(rises)
    spread = rises.std(axis=0)
    typical = spread[spread > 0].mean() if (spread > 0).any() else 1.0
    error = np.sqrt((n * spread**2 + typical**2) / (n + 1) / n)
    z: np.ndarray = rises.mean(axis=0) / error
    return z
