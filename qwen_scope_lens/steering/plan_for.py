"""From features that something found to a plan: the same edit on each of them.

A ranking, the suspects of `blame`, the firings of a reading and the nodes of a graph all name
features by address. It imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadFile, BadPlan, ScopeError
from qwen_scope_lens.files import read_text
from qwen_scope_lens.steering.plan import EVERYWHERE, Edit, Plan
from qwen_scope_lens.steering.where import Where, shown

__all__ = ["plan_for", "read_features"]


def plan_for(
    features: Any,
    op: str = "add",
    strength: float | None = None,
    unit: str = "raw",
    where: Where | str = EVERYWHERE,
    *,
    top: int | None = None,
) -> Plan:
    """The same edit on each of some features.

    Args:
        features: a `Ranking`; or addresses; or what has them as `ref`, such as the rows of a
            ranking, suspects of `blame`, and firings of a reading. Each feature counts once.
        op, strength, unit, where: those of `Edit`.
        top: the first so many of them; by default all.
    """
    if top is not None and top < 1:
        raise BadPlan(f"top={top}: expected 1 or more features")
    if isinstance(features, (str, FeatureRef)):
        features = [features]
    given: Iterable[Any] = getattr(features, "rows", features)
    refs = dict.fromkeys(FeatureRef.parse(getattr(one, "ref", one)) for one in given)
    if not refs:
        raise BadPlan("no feature was found, so there is no plan: choose others")
    return Plan([Edit(ref, op, strength, unit, where) for ref in list(refs)[:top]])


def read_features(path: Path) -> Sequence[FeatureRef]:
    """The features of a file that `qsl rank --out` wrote, or of what a verb prints with `--json`.

    Each of its `rows` has an address as `ref` or `feature`, best first.
    """
    way = "expected what `qsl rank --out FILE` or `qsl blame --json` wrote"
    try:
        content = json.loads(read_text(path))
        rows = content["rows"]
        refs = [FeatureRef.parse(row.get("ref", row.get("feature"))) for row in rows]
    except FileNotFoundError as error:
        raise BadFile(
            f"{path} does not exist: `qsl rank --out {path}` makes such a file"
        ) from error
    except ScopeError as error:
        raise BadFile(f"{path}: {error}; {way}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadFile(f"{path} has no rows with features ({shown(repr(error))}): {way}") from error
    if not refs:
        raise BadFile(f"{path} has no feature: nothing passed the test there, or it is cut short")
    return refs
