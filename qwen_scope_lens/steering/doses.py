"""What a sweep is asked for, as text: strengths such as `-8:8:1`, open edits, and the measure.

It imports nothing heavy, so that a slip is refused at once. `sweep.py` does the work.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.steering.plan import Edit, find_operation
from qwen_scope_lens.steering.where import TOKEN_CLASSES, shown

if TYPE_CHECKING:
    from qwen_scope_lens.steering.generate import Continuation

__all__ = ["Measure", "parse_open_edit", "parse_strengths"]

MOST = 500


def parse_strengths(text: str) -> list[float]:
    """Strengths from `-8:8:1` (both ends included, steps of 1), `-4,-2,2,4`, or both mixed."""
    found: list[float] = []
    for part in text.split(","):
        try:
            numbers = [Decimal(number.strip()) for number in part.split(":")]
        except InvalidOperation:
            numbers = []
        if len(numbers) not in (1, 2, 3) or not all(map(_usable, numbers)):
            raise BadPlan(
                f"strengths {shown(text)}: expected FROM:TO:STEP such as -8:8:1, or a list -4,4"
            )
        if len(numbers) == 1:
            found.append(float(numbers[0]))
            continue
        start, stop = numbers[:2]
        step = numbers[2] if len(numbers) == 3 else Decimal(1)
        if step <= 0 or stop < start or (stop - start) / step > MOST:
            raise BadPlan(
                f"strengths {part!r}: expected FROM up to TO, a STEP above 0, and at most {MOST}"
            )
        count = int((stop - start) / step)
        found += [float(start + i * step) for i in range(count + 1)]
    return list(dict.fromkeys(found))


def _usable(number: Decimal) -> bool:
    """Whether a float can hold the number."""
    return number.is_finite() and (not number or abs(number.adjusted()) <= 300)


def parse_open_edit(text: str, unit: str = "raw") -> Edit:
    """An edit without a strength, for a sweep: `REF:add` or `REF:add@generation`."""
    head, at, place = text.partition("@")
    parts = head.split(":")
    if len(parts) != 2 or not find_operation(parts[1]).takes_strength:
        raise BadPlan(
            f"{shown(text)} is not an edit for a sweep: expected REF:operation without a strength,"
            " for example qwen3-8b-base/w64k-l0-50/20/6159:add"
        )
    return Edit.parse(f"{head}:1{'' if unit == 'raw' else unit}{at}{place}")


@dataclass(frozen=True)
class Measure:
    """`change` (the default), `class=NAME` or `regex=PATTERN`."""

    name: str
    meaning: str
    of: Callable[[Continuation, Continuation], float]  # the steered text, the unsteered one

    @classmethod
    def parse(cls, text: str) -> Measure:
        kind, _, value = text.partition("=")
        if text == "change":
            return cls(text, "share of tokens that differ from the unsteered text", _difference)
        if kind == "class" and value in TOKEN_CLASSES:
            return cls(
                text,
                f"share of visible characters of class {value}",
                lambda new, old: _share(new, value),
            )
        if kind == "regex" and value:
            try:
                value.encode()  # half a surrogate pair is found in no text
                pattern = re.compile(value)
            except (re.error, ValueError, OverflowError, RecursionError) as error:
                raise BadPlan(f"{shown(value)} is not a regular expression: {error}") from error
            return cls(
                text,
                f"share of texts in which {value!r} is found",
                lambda new, old: float(pattern.search(new.text) is not None),
            )
        raise BadPlan(
            f"measure {text!r}: expected change, regex=PATTERN or class=NAME with NAME one of"
            f" {', '.join(TOKEN_CLASSES)}"
        )


def _share(text: Continuation, name: str) -> float:
    from qwen_scope_lens.steering.text_quality import share_of_class

    return share_of_class(text.text, name)


def _difference(new: Continuation, old: Continuation) -> float:
    longest = max(len(new.ids), len(old.ids))
    same = sum(a == b for a, b in zip(new.ids, old.ids, strict=False))
    return 1 - same / longest if longest else 0.0
