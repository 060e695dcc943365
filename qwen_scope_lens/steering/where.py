"""Where: which tokens an edit acts on, as pure data with a text form.

The default is every token of the prompt and of the generation except the first token of the text,
whose residual is an outlier in every Qwen model. Two conditions depend on what came before in the
text: the thinking phase, and a gate, which another feature opens. `token_masks.py` finds the
selected tokens in a running model, and `gates.py` the tokens that open a gate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan

__all__ = ["THINKS", "TOKEN_CLASSES", "Gate", "Positions", "Where", "shown"]

Phase = Literal["both", "prompt", "generation"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Think = Literal["inside", "after"]
THINKS: tuple[Think, ...] = get_args(Think)
"""inside: between `<think>` and `</think>`. after: from `</think>` to the end of that message. The
marks themselves are neither."""
MOST = 2**31

TOKEN_CLASSES: dict[str, str] = {
    "special": "tokens such as <|im_end|>",
    "space": "white space only",
    "newline": "white space with a line break",
    "punctuation": "no letter or digit, something visible",
    "digit": "has a digit",
    "letter": "has a letter of any script",
    "latin": "has a letter of the Latin script",
    "cyrillic": "has a Cyrillic letter",
    "greek": "has a Greek letter",
    "arabic": "has an Arabic letter",
    "hebrew": "has a Hebrew letter",
    "devanagari": "has a Devanagari letter",
    "thai": "has a Thai letter",
    "han": "has a Chinese character",
    "kana": "has a Japanese hiragana or katakana",
    "hangul": "has a Korean letter",
    "fragment": "holds only a part of a character, which several tokens spell together",
}
"""Classes of tokens, by the text of the token alone; one token can be of several classes."""

Positions: TypeAlias = "int | range | slice | tuple[int, int | None]"
"""One position, or a half-open range of positions. They count from 0 in the text of a row, without
its pads; a negative start counts from the end of the prompt, so -1 is its last token."""

Span: TypeAlias = "tuple[int, int | None]"


@dataclass(frozen=True, order=True)
class Gate:
    """Closed at the beginning of a text, and open from the token on at which the activation of a
    feature is above `threshold` (in raw activations, before any edit in the feature's layer).

    The first token of a text opens no gate, because its residual is an outlier.
    """

    ref: FeatureRef
    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "ref", FeatureRef.parse(self.ref))
        value = self.threshold
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise BadPlan(
                f"gate {self.ref}: threshold {shown(value)}: expected a number of 0 or more"
            )
        object.__setattr__(self, "threshold", float(value))

    @classmethod
    def of(cls, value: Gate | str) -> Gate:
        """From its text form, `ADDRESS>THRESHOLD`."""
        if isinstance(value, Gate):
            return value
        ref, sign, number = value.partition(">") if isinstance(value, str) else ("", "", "")
        try:
            threshold = float(number)
        except ValueError:
            threshold, sign = 0.0, ""
        if not sign:
            raise BadPlan(
                f"gate {shown(value)}: expected an address and a threshold, such as"
                " qwen3-8b-base/w64k-l0-50/20/6159>3.5"
            )
        return cls(FeatureRef.parse(ref.strip()), threshold)

    def __str__(self) -> str:
        return f"{self.ref}>{self.threshold!r}"


@dataclass(frozen=True)
class Where:
    """Which tokens an edit acts on: all conditions have to hold.

    `phase`: both, prompt or generation. `positions`: single ones or ranges. `classes`: names of
    `TOKEN_CLASSES`, any of them. `token_ids`: or any of these tokens. `roles`: chat roles, which
    stand for the content of their messages. `skip_first`: leave out the first token of the text,
    where no `positions` are given. `think`: inside or after the thinking of a reply. `gate`: from
    the token on at which another feature fired. Text form:
    `prompt,class=han,pos=3-8+-1,role=user,first`, `generation,think=inside,gate=G/6/12>3.5`.
    """

    phase: Phase
    positions: tuple[Span, ...] | None
    classes: tuple[str, ...]
    token_ids: tuple[int, ...]
    roles: tuple[str, ...]
    skip_first: bool
    think: Think | None
    gate: Gate | None

    def __init__(
        self,
        phase: Phase = "both",
        positions: Positions | Iterable[Positions] | None = None,
        classes: str | Iterable[str] = (),
        token_ids: int | Iterable[int] = (),
        roles: str | Iterable[str] = (),
        skip_first: bool = True,
        think: Think | None = None,
        gate: Gate | str | None = None,
    ) -> None:
        if phase not in PHASES:
            raise BadPlan(f"phase {phase!r}: expected one of {', '.join(PHASES)}")
        if think is not None and think not in THINKS:
            raise BadPlan(f"think {shown(think)}: expected one of {', '.join(THINKS)}")
        spans: tuple[Span, ...] | None = None
        if positions is not None:
            spans = tuple(_span(one) for one in _listed(positions))
            if not spans:
                raise BadPlan("positions are empty: the edit would act on no token")
        given = {
            "phase": phase,
            "positions": spans,
            "classes": tuple(_listed(classes)),
            "token_ids": tuple(_listed(token_ids)),
            "roles": tuple(_listed(roles)),
            "skip_first": skip_first,
            "think": think,
            "gate": None if gate is None else Gate.of(gate),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        for token in self.token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < MOST:
                raise BadPlan(
                    f"token id {shown(token)}: expected a whole number from 0 to 2^31 - 1"
                )
        for role in self.roles:
            if not isinstance(role, str) or not role.isprintable():
                raise BadPlan(f"role {shown(role)}: expected a name such as user or assistant")
        for name in self.classes:
            if name not in TOKEN_CLASSES:
                raise BadPlan(
                    f"token class {shown(name)} does not exist: there are"
                    f" {', '.join(TOKEN_CLASSES)}"
                )

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
        terms += [f"think={self.think}"] if self.think else []
        terms += [f"gate={self.gate}"] if self.gate else []
        return ",".join(terms)

    def apart(self, other: Where) -> bool:
        """Whether the two can never select the same token."""
        phases = {self.phase, other.phase} == {"prompt", "generation"}
        return phases or {self.think, other.think} == {"inside", "after"}

    @property
    def looks_back(self) -> bool:
        """Whether it depends on which tokens came before."""
        return bool(self.roles or self.think or self.gate)


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
        elif key == "think" and value in THINKS:
            found = value
        elif key == "gate" and value:
            found = Gate.of(value)
        else:
            raise BadPlan(
                f"{shown(term)} in {shown(text)} is not a condition: expected prompt, generation,"
                " both, first, pos=3-8+-1, class=han, role=user, token=42, think=inside or"
                " gate=ADDRESS>3.5, joined by commas"
            )
        if key in given:
            raise BadPlan(f"{shown(text)} gives {key} twice: join values with +, as in pos=1+3")
        given[key] = found
    return Where(**given)


def _parse_span(text: str) -> Span:
    """`3`, `3-8` (both ends included) or `3-` (to the end); each number may be negative."""
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
        start, stop, step = value.start or 0, value.stop, value.step or 1
        value = (start, stop) if stop is None and step == 1 else value
        value = range(start, stop, step) if stop is not None else value
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
    """A value as messages show it; of a number with thousands of digits only its length."""
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
