"""The units of a strength, and how a strength is written."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.steering.where import shown

__all__ = ["OLD_UNITS", "UNITS", "finite", "parse_strength", "unit_now"]

UNITS = ("raw", "typical", "norm")
"""raw: the SAE's activations. typical: multiples of the feature's typical activation. norm: v is
chosen at every token so that the length of v d is this fraction of the residual's length."""

OLD_UNITS = {"sigma": "typical"}
"""The older name still parses; the unit is not a standard deviation."""


def parse_strength(text: str) -> tuple[float, str]:
    """`4`, `+2typical`, `-0.1norm` -> the number and its unit."""
    found = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-z]*)\s*", text)
    if found is None or found[2] not in ("", *UNITS, *OLD_UNITS):
        raise BadPlan(f"strength {shown(text)}: expected a number such as 4, +2typical or -0.1norm")
    return float(found[1]), unit_now(found[2] or "raw")


def unit_now(unit: Any) -> Any:
    """The unit by its name of today."""
    if not isinstance(unit, str) or unit not in OLD_UNITS:
        return unit
    said = f"the unit {unit} is now called {OLD_UNITS[unit]}"
    warnings.warn(said, DeprecationWarning, stacklevel=4)
    return OLD_UNITS[unit]


def finite(value: Any, ref: FeatureRef) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                return number
    except OverflowError:
        pass
    raise BadPlan(f"{ref}: {shown(value)} is not a finite number that a float can hold")
