"""The fields of a request, each checked once. What is left over is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from qwen_scope_lens.errors import ScopeError
from qwen_scope_lens.serve.faults import Fault, fault_of
from qwen_scope_lens.steering.where import shown

__all__ = ["Fields", "flag", "listed", "number", "text", "whole"]

T = TypeVar("T")
Check = Callable[[Any], Any]


class Fields:
    """The JSON object of a request. `null` counts as absent."""

    def __init__(self, content: Any) -> None:
        if not isinstance(content, Mapping):
            raise Fault(f"expected a JSON object, found {shown(content)}", "bad_value")
        self._left = dict(content)

    def take(self, name: str, check: Check, default: Any = None) -> Any:
        """A field's checked value, or the default."""
        value = self._left.pop(name, None)
        return default if value is None else checked(name, value, check)

    def need(self, name: str, check: Check) -> Any:
        if self._left.get(name) is None:
            raise Fault(f"`{name}` is missing", "bad_value", name)
        return self.take(name, check)

    def given(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self._left

    def ignore(self, *names: str) -> None:
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse a field that cannot be obeyed, except for values that ask for nothing."""
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            raise Fault(f"`{name}` is {shown(value)}: {why}", "unsupported", name)

    def done(self) -> None:
        if self._left:
            name = sorted(self._left)[0]
            raise Fault(f"unknown field {shown(name)}: it would do nothing", "unknown_field", name)


def checked(name: str, value: Any, check: Check) -> Any:
    try:
        return check(value)
    except Fault as fault:
        if fault.param is None:
            fault.param = name
        raise
    except ScopeError as error:
        raise fault_of(error, name) from error
    except ValueError as error:
        raise Fault(f"`{name}` is {shown(value)}: {error}", "bad_value", name) from error


def whole(least: int, most: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return value

    return check


def number(least: float, most: float, above: bool = False) -> Check:
    def check(value: Any) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"expected a number from {least:g} to {most:g}")
        if above and value == least:
            raise ValueError(f"expected a number above {least:g}")
        return float(value)

    return check


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a text")
    return value


def listed(check: Check, most: int, least: int = 0) -> Check:
    """A list; of a single value, a list of one."""

    def listing(value: Any) -> list[Any]:
        values = value if isinstance(value, list) else [value]
        if not least <= len(values) <= most:
            raise ValueError(f"expected {least} to {most} of them")
        return [check(one) for one in values]

    return listing
