"""Where an edit acts in a running pass: from `Where` and `Call` to one flag per token.

Token classes depend on the text of the token alone, roles and the thinking phase on the markers
before it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.errors import BadPlan, WrongTokenizer
from qwen_scope_lens.steering.calls import Call
from qwen_scope_lens.steering.where import Span, Where

__all__ = ["Selector", "roles_of", "thinking", "token_classes"]

START, END = "<|im_start|>", "<|im_end|>"
THINK, THOUGHT = "<think>", "</think>"

_SCRIPTS = {
    "latin": ("LATIN",),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "thai": ("THAI",),
    "han": ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH"),
    "kana": ("HIRAGANA", "KATAKANA"),
    "hangul": ("HANGUL",),
}


def token_classes(text: str, special: bool = False) -> frozenset[str]:
    """The classes of a token, by its text (see `where.TOKEN_CLASSES`)."""
    if special:
        return frozenset({"special"})
    found = set()
    if "\ufffd" in text:
        found.add("fragment")
    if text.isspace():
        found |= {"space", "newline"} if "\n" in text else {"space"}
    for char in text:
        kind = unicodedata.category(char)[0]
        if kind == "N":
            found.add("digit")
        elif kind == "L":
            found.add("letter")
            name = unicodedata.name(char, "")
            found |= {script for script, heads in _SCRIPTS.items() if name.startswith(heads)}
    if not found and text.strip():
        found.add("punctuation")
    return frozenset(found)


def roles_of(ids: list[int], tokenizer: Any) -> list[str | None]:
    """The chat role of every token: that of the message whose content it is, else None."""
    start, end = (tokenizer.convert_tokens_to_ids(mark) for mark in (START, END))
    roles: list[str | None] = []
    role: str | None = None
    head: list[int] | None = None  # the tokens of a role's name, while it is read
    for token in ids:
        if token == start:
            role, head = None, []
            roles.append(None)
        elif token == end:
            role, head = None, None
            roles.append(None)
        elif head is not None:
            roles.append(None)
            head.append(token)
            name, line_break, _ = tokenizer.decode(head).partition("\n")
            if line_break:
                role, head = name.strip(), None
        else:
            roles.append(role)
    return roles


def thinking(ids: Tensor, think: int, thought: int, ends: Sequence[int]) -> dict[str, Tensor]:
    """Which tokens are inside a thinking phase, and which after one. int64 `[rows, n] -> [rows, n]`

    A phase ends with the message that it is in; `ends` are the marks of messages.
    """
    mark = ids == thought
    for token in (think, *ends):
        mark = mark | (ids == token)
    at = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(mark, at, -1).cummax(1).values  # the last mark so far
    kind = ids.gather(1, last.clamp(min=0)).masked_fill(last < 0, -1)
    return {"inside": (kind == think) & ~mark, "after": (kind == thought) & ~mark}


class Selector:
    """Selects tokens with one tokenizer, and remembers the classes of tokens."""

    def __init__(self, tokenizer: Callable[[], Any]) -> None:
        self._tokenizer_of = tokenizer  # asked only when an edit needs one
        self._tokenizer: Any = None
        self._classes: dict[int, frozenset[str]] = {}
        self._special: set[int] = set()

    def check(self, where: Where) -> None:
        """Raise now what would otherwise be raised in the middle of a generation."""
        if where.classes or where.roles:
            tokenizer = self._known()
            if where.roles and tokenizer.convert_tokens_to_ids(START) in (
                None,
                tokenizer.unk_token_id,
            ):
                raise WrongTokenizer(
                    f"chat roles are read from {START}, which this tokenizer does not have"
                )
        if where.think:
            self._think_marks()

    def active(self, where: Where, call: Call) -> bool:
        """Whether the pass has any column of the wanted phase."""
        return {
            "both": True,
            "prompt": call.in_prompt,
            "generation": call.in_generation,
        }[where.phase]

    def mask(self, where: Where, call: Call, device: torch.device) -> Tensor | None:
        """bool `[rows or 1, columns or 1]`; None: every token of the pass."""
        total, past = call.past + call.columns, call.past
        parts: list[Tensor] = []
        real = None if call.real is None else call.real.to(device)
        if real is not None:
            parts.append(real[:, past:])
        if where.phase != "both" and call.in_prompt and call.in_generation:
            columns = torch.arange(past, total, device=device)
            wanted = columns < call.prompt if where.phase == "prompt" else columns >= call.prompt
            parts.append(wanted[None])
        skips = where.skip_first and where.positions is None
        if where.positions is not None or (skips and (past == 0 or real is not None)):
            if real is None:
                at = torch.arange(past, total, device=device)[None]
                ends = torch.tensor([[call.prompt]], device=device)
            else:
                at = real.cumsum(1)[:, past:] - 1
                ends = real[:, : call.prompt].sum(1, keepdim=True)
            if call.ends is not None:
                ends = call.ends.to(device)
            if where.positions is None:
                parts.append(at != 0)
            else:
                inside = [_inside(at, ends, span) for span in where.positions]
                parts.append(torch.stack(inside).any(0))
        if where.classes or where.token_ids:
            parts.append(self._of_kind(where, call).to(device))
        if where.roles:
            parts.append(self._of_role(where, call).to(device))
        if where.think:
            ids = self._ids(call, whole=True)
            phases = thinking(ids, *self._think_marks())
            parts.append(phases[where.think][:, -call.columns :].to(device))
        if not parts:
            return None
        mask = parts[0]
        for other in parts[1:]:
            mask = mask & other
        return mask

    def _of_kind(self, where: Where, call: Call) -> Tensor:
        ids = self._ids(call)[:, -call.columns :].tolist()
        listed, classes = set(where.token_ids), set(where.classes)

        def wanted(token: int) -> bool:
            return token in listed or bool(classes and classes & self._classes_of(token))

        return torch.tensor([[wanted(token) for token in row] for row in ids])

    def _of_role(self, where: Where, call: Call) -> Tensor:
        ids = self._ids(call, whole=True)
        tokenizer = self._known()
        roles = [roles_of(row, tokenizer)[-call.columns :] for row in ids.tolist()]
        return torch.tensor([[role in where.roles for role in row] for row in roles])

    def _think_marks(self) -> tuple[int, int, list[int]]:
        tokenizer = self._known()
        think, thought, *ends = map(tokenizer.convert_tokens_to_ids, (THINK, THOUGHT, START, END))
        if {think, thought} & {None, tokenizer.unk_token_id}:
            raise WrongTokenizer(
                f"a thinking phase is read from {THINK} and {THOUGHT}, which this tokenizer does"
                " not have as tokens"
            )
        return think, thought, [token for token in ends if token is not None]

    def _ids(self, call: Call, whole: bool = False) -> Tensor:
        if call.ids is None:
            raise BadPlan(
                "an edit selects by token or role, but the tokens are not known (embeddings were"
                " given, or the text began before the context): select by position or phase"
            )
        if whole and call.ids.shape[1] != call.past + call.columns:
            raise BadPlan(
                "chat roles and the thinking phase need the tokens before these: start the text in"
                " the context"
            )
        return call.ids

    def _classes_of(self, token: int) -> frozenset[str]:
        found = self._classes.get(token)
        if found is None:
            tokenizer = self._known()
            found = token_classes(tokenizer.decode([token]), token in self._special)
            self._classes[token] = found
        return found

    def _known(self) -> Any:
        if self._tokenizer is None:
            tokenizer = self._tokenizer_of()
            added = getattr(tokenizer, "added_tokens_decoder", {})
            self._special = {
                *tokenizer.all_special_ids,
                *(i for i, token in added.items() if token.special),
            }
            self._tokenizer = tokenizer  # last: another thread may look already
        return self._tokenizer


def _inside(at: Tensor, ends: Tensor, span: Span) -> Tensor:
    """Which positions `at` lie in a span; `ends` is the length of each row's prompt."""
    start, stop = span
    low = at >= (start if start >= 0 else ends + start)
    if stop is None:
        return low
    return low & (at < (stop if start >= 0 else ends + stop))
