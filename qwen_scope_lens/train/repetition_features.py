"""Repetition features: activations that rise from the first to the last copy of a repeated token.

For each repeated token the paper takes the activation at its last occurrence minus that at its
first occurrence in the same context. Features with the largest increases are repetition features.
Details that the paper leaves open are parameters here. `causes.py` tests whether such a feature
causes loops.
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

FORMAT, VERSION = "qsl-repetition-features", 2  # version 1 was ordered by z


@dataclass(frozen=True)
class RepetitionFeature:
    """How much the activation of a feature rises over a repetition, averaged over documents."""

    ref: FeatureRef
    rise: float  # on the documents that chose it
    held_out: float  # the rise on the other documents
    z: float  # rise divided by its standard error across documents
    last: float  # mean activation at last occurrences, a scale for steering strengths
    chance: float  # largest z of any feature if first and last are swapped at random

    @property
    def stands_out(self) -> bool:
        """Whether the rise is above chance and holds on other documents.

        This is only a remark: a feature that causes loops may rise in a few documents only.
        """
        return self.z > self.chance and self.held_out > 0


@dataclass(frozen=True)
class RepetitionFeatures:
    """Repetition features of some layers, largest rise first."""

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
    """First and last positions of tokens that repeat after the same `context` tokens.

    `[n] -> [m, 2]`. A token counts if it occurs in its context at least `min_times` times.
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
    """Find the features that rise most from first to last occurrences in repeating documents.

    Rises are averaged within each document and then over documents, so that one long loop does not
    dominate. As in the paper the `top` largest rises of each layer are taken. Half of the documents
    choose features and half score them. `z` is the rise divided by its standard error. `chance` is
    the largest z of any feature if the two ends of each document are swapped at random (the 95th
    percentile over `shuffles`). Neither selects features, because a feature that makes a model loop
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
                " tokens, but at least four are needed: half of them choose features and half score"
                " them. Extract texts that loop, or lower the context or the number of times"
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
    """Mean rises and mean last activations of repeating documents. `-> [n, d_sae]` each"""
    rises, lasts = [], []
    for block in store.iter_blocks(layer, docs=docs):
        matrix = block.matrix()
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
    """Mean divided by standard error across documents; 0 if nothing changes. `[n, d] -> [d]`

    A pseudo-count of one document with the mean spread avoids a division by zero for a feature that
    changes in a single document.
    """
    n = len(rises)
    spread = rises.std(axis=0)
    typical = spread[spread > 0].mean() if (spread > 0).any() else 1.0
    error = np.sqrt((n * spread**2 + typical**2) / (n + 1) / n)
    z: np.ndarray = rises.mean(axis=0) / error
    return z
