"""Typical activations, which give strengths a unit: `+2typical` is twice the typical activation.

The typical activation of a feature is its mean over the tokens where it fires. `calibrate.py`
measures it. This module reads and writes files, and does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadFile, BadPlan, ScopeError
from qwen_scope_lens.files import read_json, write_json

__all__ = ["Calibration", "Typical", "split_refs"]

FORMAT, VERSION = "qsl-calibration", 1


@dataclass(frozen=True)
class Typical:
    """One feature over the calibration texts."""

    mean: float  # over the tokens where the feature fires: its typical activation
    largest: float
    fired: int  # the number of tokens where it fires
    rate: float  # their share of all tokens


@dataclass(frozen=True)
class Calibration(Mapping[str, float]):
    """Address -> typical activation, for `Plan.calibrated`; `facts` has the rest."""

    facts: dict[str, Typical]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, ref: FeatureRef | str) -> float:
        return self.facts[str(ref)].mean

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)

    def save(self, path: str | Path) -> None:
        rows = {ref: asdict(found) for ref, found in self.facts.items()}
        write_json(Path(path), FORMAT, VERSION, {"provenance": self.provenance, "features": rows})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        content = read_json(Path(path), FORMAT, VERSION, "qsl calibrate")
        try:
            rows = {
                str(FeatureRef.parse(ref)): Typical(**row)
                for ref, row in content["features"].items()
            }
            return cls(rows, dict(content["provenance"]))
        except (KeyError, TypeError, ValueError, AttributeError, ScopeError) as error:
            raise BadFile(
                f"{path} is damaged ({error!r:.200}): make it with `qsl calibrate`"
            ) from error


def split_refs(
    refs: Iterable[FeatureRef | LayerRef | str],
) -> dict[LayerRef, Sequence[int] | None]:
    """SAE -> the features asked for, None for all of them."""
    found: dict[LayerRef, list[int] | None] = {}
    for ref in refs:
        one = _parse(ref)
        if isinstance(one, LayerRef):
            found[one] = None
        elif (listed := found.setdefault(one.sae, [])) is not None:
            listed.append(one.feature)
    if not found:
        raise BadPlan("there is nothing to calibrate: name at least one feature or SAE")
    return found  # type: ignore[return-value]


def _parse(ref: FeatureRef | LayerRef | str) -> FeatureRef | LayerRef:
    if not isinstance(ref, str):
        return ref
    try:
        return FeatureRef.parse(ref)
    except ScopeError:
        return LayerRef.parse(ref)
