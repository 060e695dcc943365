"""What a sweep plots: one number a continuation, named by a short text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.steering.generate import Continuation
from qwen_scope_lens.steering.select import token_classes
from qwen_scope_lens.steering.where import TOKEN_CLASSES, shown

__all__ = ["Measure", "share_of_class"]


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
                lambda new, old: share_of_class(new.text, value),
            )
        if kind == "regex" and value:
            try:
                value.encode()  # half a surrogate pair is found in no text
                pattern = re.compile(value)
            except (re.error, ValueError, OverflowError, RecursionError) as error:
                raise BadPlan(f"{shown(value)} is no regular expression: {error}") from error
            return cls(
                text,
                f"share of texts in which {value!r} is found",
                lambda new, old: float(pattern.search(new.text) is not None),
            )
        raise BadPlan(
            f"measure {text!r}: expected change, regex=PATTERN or class=NAME with NAME one of"
            f" {', '.join(TOKEN_CLASSES)}"
        )


def share_of_class(text: str, name: str) -> float:
    """The share of a text's visible characters that are of a token class; 0 without any."""
    visible = [char for char in text if not char.isspace()]
    return sum(name in token_classes(char) for char in visible) / max(1, len(visible))


def _difference(new: Continuation, old: Continuation) -> float:
    longest = max(len(new.ids), len(old.ids))
    same = sum(a == b for a, b in zip(new.ids, old.ids, strict=False))
    return 1 - same / longest if longest else 0.0
