"""Where: which tokens an edit touches. Pure data with a text form; no model and no tensor here.

The default is every token of the prompt and of the generation except the first of the text, whose
residual is an outlier in every Qwen model. What a selection picks in a running model is
`token_masks.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qwen_scope_lens.errors import BadPlan

__all__ = ["TOKEN_CLASSES", "Positions", "Where", "shown"]

Phase = Literal["both", "prompt", "generation"]
PHASES = ("both", "prompt", "generation")
MOST = 2**31

TOKEN_CLASSES: dict[str, str] = {
    "special": "tokens such as <|im_end|>",
    "space": "white space only",
    "newline": "white space with a line break",
    "punctuation": "no letter or digit, something visible",
    "digit": "has a digit",
    "letter": "has a letter of any script",
    "latin": "has a letter of the Latin script",
    "cyrillic": "the same for Cyrillic",
    "greek": "for Greek",
    "arabic": "for Arabic",
    "hebrew": "for Hebrew",
    "devanagari": "for Devanagari",
    "thai": "for Thai",
    "han": "for Chinese characters",
    "kana": "for Japanese kana",
    "hangul": "for Korean",
    "fragment": "part of a character that several tokens spell",
}
"""Kinds of tokens, by the text of the token alone; a token can be of several."""

Positions: TypeAlias = "int | range | slice | tuple[int, int | None]"
"""One position, or a half-open range of them; counted from 0 in the row's own text, pads left out.
A negative start counts from the end of the prompt: -1 is its last token."""

Span: TypeAlias = "tuple[int, int | None]"


@dataclass(frozen=True)
class Where:
    """All conditions have to hold. Text form: `prompt,class=han,pos=3-8+-1,role=user,first`."""

    phase: Phase = "both"
    positions: tuple[Span, ...] | None = None
    classes: tuple[str, ...] = ()  # names of TOKEN_CLASSES; any of them
    token_ids: tuple[int, ...] = ()  # or any of these tokens
    roles: tuple[str, ...] = ()  # chat roles: the content of their messages
    skip_first: bool = True  # without `positions`, which say themselves what they want

    if TYPE_CHECKING:  # what a caller may hand over; the fields say what it becomes

        def __init__(
            self,
            phase: Phase = "both",
            positions: Positions | Iterable[Positions] | None = None,
            classes: str | Iterable[str] = (),
            token_ids: int | Iterable[int] = (),
            roles: str | Iterable[str] = (),
            skip_first: bool = True,
        ) -> None: ...

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise BadPlan(f"phase {self.phase!r}: expected one of {', '.join(PHASES)}")
        if self.positions is not None:
            spans = tuple(_span(one) for one in _listed(self.positions))
            if not spans:
                raise BadPlan("positions are empty: the edit would touch nothing")
            object.__setattr__(self, "positions", spans)
        for name in ("classes", "token_ids", "roles"):
            object.__setattr__(self, name, tuple(_listed(getattr(self, name))))
        for token in self.token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < MOST:
                raise BadPlan("a token id is a whole number from 0 to 2^31 - 1: found another")
        for role in self.roles:
            if not isinstance(role, str) or not role.isprintable():
                raise BadPlan(f"role {shown(role)}: expected a name such as user or assistant")
        for name in self.classes:
            if name not in TOKEN_CLASSES:
                raise BadPlan(f"no token class {name!r}: there are {', '.join(TOKEN_CLASSES)}")

    @classmethod
    def of(cls, value: Where | str) -> Where:
        """From its text form."""
        if isinstance(value, Where):
            return value
        if not isinstance(value, str):
            raise BadPlan(f"where={shown(value)}: expected a Where or a text such as 'prompt'")
        return _parse(value)

    @classmethod
    def mask(cls, mask: Iterable[Any], phase: Phase = "both") -> Where:
        """The positions where `mask` (one flag per position of the text) is true."""
        return cls(phase, tuple((i, i + 1) for i, flag in enumerate(mask) if flag))

    def __str__(self) -> str:
        terms: list[str] = [self.phase]
        if self.positions is not None:
            terms.append("pos=" + "+".join(map(_shown, self.positions)))
        for key, values in (("class", self.classes), ("token", self.token_ids)):
            if values:
                terms.append(f"{key}={'+'.join(map(str, values))}")
        if self.roles:
            terms.append(f"role={'+'.join(self.roles)}")
        if not self.skip_first:
            terms.append("first")
        return ",".join(terms)

    def apart(self, other: Where) -> bool:
        """Whether the two certainly never touch the same token."""
        return {self.phase, other.phase} == {"prompt", "generation"}


def _parse(text: str) -> Where:
    given: dict[str, Any] = {}
    for term in text.split(","):
        key, equals, value = term.strip().partition("=")
        values = tuple(value.split("+")) if equals and value else ()
        found: Any
        if key in PHASES and not equals:
            key, found = "phase", key
        elif key == "first" and not equals:
            key, found = "skip_first", False
        elif key == "pos" and values:
            key, found = "positions", tuple(map(_parse_span, values))
        elif key == "class" and values:
            key, found = "classes", values
        elif key == "role" and values:
            key, found = "roles", values
        elif key == "token" and values and all(v.isdecimal() and len(v) < 11 for v in values):
            key, found = "token_ids", tuple(map(int, values))
        else:
            raise BadPlan(
                f"{shown(term)} in {shown(text)} says no place: expected prompt, generation, both,"
                " first, pos=3-8+-1, class=han, role=user or token=42, joined by commas"
            )
        if key in given:
            raise BadPlan(f"{text!r} says {key} twice: join values with +, as in pos=1+3")
        given[key] = found
    return Where(**given)


def _parse_span(text: str) -> Span:
    """`3` or `3-8` (both ends meant) or `3-` (to the end); each number may be negative."""
    found = re.fullmatch(r"(-?\d{1,10})(?:(-)(-?\d{1,10})?)?", text)
    if found is None:
        raise BadPlan(f"position {shown(text)}: expected 3, 3-8, 3- or -1")
    start = int(found[1])
    if not found[2]:
        return (start, start + 1)
    return (start, None if found[3] is None else int(found[3]) + 1)


def _shown(span: Span) -> str:
    start, stop = span
    if stop is None:
        return f"{start}-"
    return str(start) if stop == start + 1 else f"{start}-{stop - 1}"


def _span(value: Any) -> Span:
    if isinstance(value, slice):
        value = range(value.start or 0, value.stop, value.step or 1) if value.stop is not None \
            else (value.start or 0, None) if value.step in (None, 1) else None  # fmt: skip
    if isinstance(value, range):
        value = (value.start, value.stop) if value.step == 1 else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value + 1)
    match value:
        case (int(start), None) if -MOST < start < MOST:
            return (start, None)
        case (int(start), int(stop)) if -MOST < start < stop < MOST and (start >= 0 or stop <= 0):
            return (start, stop)
    raise BadPlan(
        f"position {shown(value)}: expected whole numbers or forward ranges with step 1, wholly"
        " from the start (0, 3) or wholly from the end of the prompt (-3, 0)"
    )


def shown(value: object) -> str:
    """A value for a message; of a number with thousands of digits only how long it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # a number of more than 4,300 digits in it
        return f"a {type(value).__name__} with a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _listed(value: Any) -> Any:
    """A single value as a sequence of one."""
    if isinstance(value, (str, int, range, slice)):
        return (value,)
    return value
