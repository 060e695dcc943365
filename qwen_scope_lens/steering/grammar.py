"""What the command line says: a list of strengths, an edit whose strength is still open."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.steering.operations import find_operation
from qwen_scope_lens.steering.plan import Edit
from qwen_scope_lens.steering.where import shown

__all__ = ["parse_open_edit", "parse_strengths"]

MOST = 500


def parse_strengths(text: str) -> list[float]:
    """`-8:8:1` (both ends meant, in steps of 1) or `-4,-2,2,4`, mixed as wanted."""
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
                f"strengths {part!r}: expected FROM at most TO, a STEP above 0, and at most {MOST}"
            )
        count = int((stop - start) / step)
        found += [float(start + i * step) for i in range(count + 1)]
    return list(dict.fromkeys(found))


def _usable(number: Decimal) -> bool:
    """Whether a float holds it; a step of less than 1e-300 would be none."""
    return number.is_finite() and (not number or abs(number.adjusted()) <= 300)


def parse_open_edit(text: str, unit: str = "raw") -> Edit:
    """`REF:add` or `REF:add@generation`: an edit for a sweep, which brings the strengths."""
    head, at, place = text.partition("@")
    parts = head.split(":")
    if len(parts) != 2 or not find_operation(parts[1]).takes_strength:
        raise BadPlan(
            f"{shown(text)} is no edit for a sweep: expected REF:operation without a strength, for"
            " example qwen3-8b-base/w64k-l0-50/20/6159:add"
        )
    return Edit.parse(f"{head}:1{'' if unit == 'raw' else unit}{at}{place}")
