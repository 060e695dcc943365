"""Targets: the features that matter for a task, which of them the data lacks, and coverage.

The formulas are equations 18, 20 and 23 of the Qwen-Scope report, and `F_miss` and FAC of FAC
Synthesis; they differ in the threshold and in the denominator. Everything here is pure data with a
JSON form: `find.py` makes targets from feature stores, `judgements.py` says how relevant features
are, and `reader.py` measures activations on texts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadFile, ScopeError, TooLittleData
from qwen_scope_lens.features.pool import canonical
from qwen_scope_lens.files import read_json, write_json

__all__ = ["Target", "TargetSet", "coverage", "curve", "documents_firing", "fac"]

Array = np.ndarray[Any, Any]


def documents_firing(maxima: csr_matrix, threshold: float = 0.0) -> Array:
    """The number of documents on which each feature's maximum exceeds the threshold.

    `[docs, d] -> [d]`. A feature is covered (equation 18) if its number is above zero.
    """
    maxima = canonical(maxima)
    above = maxima.data > threshold
    return np.bincount(maxima.indices[above], minlength=maxima.shape[1]).astype(np.int64)


def coverage(targets: Iterable[Any], fired: Iterable[Iterable[Any]]) -> float:
    """The share of the targets that at least one example activates (equation 23)."""
    wanted = set(targets)
    if not wanted:
        raise TooLittleData("there are no target features, so there is nothing to cover")
    return len(wanted & set().union(*fired)) / len(wanted)


def fac(generated: Array, anchor: Array) -> float:
    """Feature activation coverage, `|F(Q_Z)| / |F(P_Z)|`; both arguments are bool `[d]`.

    It is the share of the anchor data's features that the generated data has, too. Features that
    only the generated data has do not count, so it cannot exceed 1.
    """
    wanted = int(anchor.sum())
    if not wanted:
        raise TooLittleData("the anchor data activates no feature, so there is nothing to cover")
    return int((generated & anchor).sum()) / wanted


def curve(targets: Iterable[Any], fired: Sequence[Iterable[Any]]) -> Array:
    """Coverage after the first 0, 1, .., n examples. `-> float64 [n + 1]`"""
    wanted = set(targets)
    if not wanted:
        raise TooLittleData("there are no target features, so there is nothing to cover")
    seen: set[Any] = set()
    found = [0]
    for features in fired:
        seen |= wanted.intersection(features)
        found.append(len(seen))
    return np.array(found) / len(wanted)


FORMAT, VERSION, MADE_BY = "qsl-targets", 2, "qsl synth targets"
"""Version 2 changed `typical` from a mean of documents' maxima to the mean over tokens where the
feature fires. Files of version 1 are refused: a push by their `typical` would be too strong."""


@dataclass(frozen=True)
class Target:
    """A feature that matters for the task."""

    ref: FeatureRef
    relevance: float = 1.0  # s_f
    seed_documents: int = 0  # on how many documents of the seed data it fires
    reference_documents: int | None = None  # the same for the anchor data; None: there is none
    typical: float = 0.0  # typical activation (mean where it fires) in the anchor data; 0: unknown
    description: str = ""
    kind: str = ""  # z, its risk category: harmful or benign; empty: unknown
    examples: tuple[str, ...] = ()  # passages of the anchor data, the feature's tokens in << >>


@dataclass(frozen=True)
class TargetSet:
    """T, the target features of a task, with what is known of the seed data."""

    targets: tuple[Target, ...]
    task: str = ""
    threshold: float = 0.0  # a feature fires in a document where its maximum exceeds this
    weak_below: int = 1  # features on fewer seed documents than this are wanted; 1: missing ones
    seed_size: int = 0  # documents
    openings: tuple[str, ...] = ()  # beginnings of anchor documents, for base models
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.targets:
            raise TooLittleData(
                "no feature is a target, because none is relevant enough. Lower --least-relevance,"
                " choose other labels, or take all features of the anchor data"
            )
        refs = [target.ref for target in self.targets]
        if len(set(refs)) < len(refs):
            raise TooLittleData("a feature is a target twice: expected each address once")

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def missing(self) -> tuple[Target, ...]:
        """T_miss: the targets that fire on no document of the seed data."""
        return tuple(target for target in self.targets if not target.seed_documents)

    @property
    def weak(self) -> tuple[Target, ...]:
        """The targets that fire in the seed data, but on fewer than `weak_below` documents."""
        few = (t for t in self.targets if 0 < t.seed_documents < self.weak_below)
        return tuple(sorted(few, key=lambda t: (t.seed_documents, t.ref)))

    @property
    def wanted(self) -> tuple[Target, ...]:
        """The targets to write data for: missing ones by relevance, then weak ones."""
        missing = sorted(self.missing, key=lambda t: (-t.relevance, t.ref))
        return (*missing, *self.weak)

    @property
    def refs(self) -> tuple[FeatureRef, ...]:
        return tuple(target.ref for target in self.targets)

    @property
    def saes(self) -> tuple[LayerRef, ...]:
        return tuple(sorted({target.ref.sae for target in self.targets}))

    @property
    def seed_coverage(self) -> float:
        """Cov(D_seed), equation 23 on the seed data."""
        return 1 - len(self.missing) / len(self)

    @property
    def seed_fac(self) -> float | None:
        """FAC of the seed data against the anchor data; None without anchor data."""
        known = [t for t in self.targets if t.reference_documents is not None]
        if not any(t.reference_documents for t in known):
            return None
        seed = np.array([t.seed_documents > 0 for t in known])
        anchor = np.array([bool(t.reference_documents) for t in known])
        return fac(seed, anchor)

    @property
    def digest(self) -> str:
        """Changes whenever a target, or anything that prompts are written from, changes."""
        content = json.dumps(self.to_dict() | {"provenance": None}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        content = {key: value for key, value in vars(self).items() if key != "targets"}
        rows = [asdict(t) | {"ref": str(t.ref), "examples": list(t.examples)} for t in self.targets]
        content["openings"] = list(self.openings)
        return {**content, "provenance": dict(self.provenance), "targets": rows}

    def save(self, path: Path) -> None:
        write_json(path, FORMAT, VERSION, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> TargetSet:
        content = read_json(path, FORMAT, VERSION, MADE_BY)
        try:
            targets = tuple(_target(row) for row in content.pop("targets"))
            content["openings"] = tuple(content["openings"])
            return cls(targets, **content)
        except (ScopeError, TypeError, KeyError, AttributeError) as error:
            raise BadFile(
                f"{path} lacks or mistypes a field ({error}): make it again with `{MADE_BY}`"
            ) from error

    def __str__(self) -> str:
        lines = [
            f"{len(self)} target features of {', '.join(map(str, self.saes))}"
            + (f" for {self.task!r}" if self.task else ""),
            f"seed data: {self.seed_size} documents, coverage {self.seed_coverage:.2%}"
            + ("" if self.seed_fac is None else f", FAC {self.seed_fac:.2%}"),
            f"missing: {len(self.missing)}, weak (on fewer than {self.weak_below} documents):"
            f" {len(self.weak)}",
        ]
        described = sum(bool(target.description) for target in self.targets)
        shown = sum(bool(target.examples) for target in self.targets)
        lines.append(f"with a description: {described}, with passages: {shown}")
        kinds = Counter(target.kind or "of no known kind" for target in self.wanted)
        if set(kinds) - {"of no known kind"}:
            lines.append("wanted: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
        return "\n".join(lines)


def _target(row: dict[str, Any]) -> Target:
    return Target(**{**row, "ref": FeatureRef.parse(row["ref"]), "examples": (*row["examples"],)})
