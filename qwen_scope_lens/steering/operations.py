"""What can be done to a feature: one frozen row an operation, each one formula.

Every operation adds c d to the residual, where d is the feature's decoder row and c a number per
token. Those that read the code use c = a' - a, with a the feature's activation (0 where it is not
among the top k, whatever its pre-activation): of the SAE's picture of the residual only this one
feature changes, and what the SAE cannot explain stays as it is. No tensor library is needed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from qwen_scope_lens.errors import BadPlan

__all__ = ["OPERATIONS", "UNITS", "Operation", "find_operation"]

UNITS = ("raw", "sigma", "norm")
"""raw: activations, as the SAE counts them. sigma: multiples of the feature's typical activation.
norm: v is chosen at every token so that v d is this fraction of the residual's length."""

Reads = Literal["nothing", "code", "residual"]


@dataclass(frozen=True)
class Operation:
    """One row: `v` is the strength, `a` the activation, `x` the residual before any edit."""

    name: str
    change: str  # the formula, for documentation and messages
    silent: str  # what it means where the feature is not in the top k
    reads: Reads
    takes_strength: bool
    target: Callable[[Any, Any], Any] | None = None  # a' of (a, v), for tensors or numbers
    neutral: float | None = None  # the strength that changes nothing, bit for bit
    least: float | None = None  # strengths below this make no sense
    units: tuple[str, ...] = UNITS


def _largest(a: Any, v: Any) -> Any:
    return a + (v - a) * (v > a)


def _smallest(a: Any, v: Any) -> Any:
    return a + (v - a) * (v < a)


OPERATIONS: tuple[Operation, ...] = (
    Operation("add", "v d", "the same: it reads no activation", "nothing", True, neutral=0.0),
    Operation("set", "(v - a) d", "a is 0: the feature is switched on", "code", True,
              lambda a, v: v + 0 * a),
    Operation("clamp", "(v - a) d", "the same as set, under the name that papers use", "code", True,
              lambda a, v: v + 0 * a),
    Operation("scale", "(v a - a) d", "nothing happens", "code", True, lambda a, v: v * a,
              neutral=1.0, units=("raw",)),
    Operation("ablate", "(0 - a) d", "nothing happens", "code", False, lambda a, v: 0 * a,
              units=("raw",)),
    Operation("floor", "(max(a, v) - a) d", "the feature is switched on at v", "code", True,
              _largest, neutral=0.0, least=0.0),
    Operation("cap", "(min(a, v) - a) d", "nothing happens", "code", True, _smallest, least=0.0),
    Operation("project_out", "-(d x / d d) d", "the same: it reads no activation; whatever lies"
              " along d goes, other features' share of it too", "residual", False, units=("raw",)),
)  # fmt: skip

_BY_NAME = {row.name: row for row in OPERATIONS}


def find_operation(name: object) -> Operation:
    row = _BY_NAME.get(name) if isinstance(name, str) else None
    if row is None:
        raise BadPlan(f"no operation is named {name!r:.60}: there are {', '.join(_BY_NAME)}")
    return row
