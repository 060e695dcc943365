"""One prompt, continued with and without a plan in one batch and shown while the texts grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwen_scope_lens.models.architecture import Model
from qwen_scope_lens.models.tokenize import Content, find_tokenizer
from qwen_scope_lens.steering.generate import Sampling, continue_batch, encode_prompts
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.readers import SAEs
from qwen_scope_lens.steering.report import Report
from qwen_scope_lens.tables import printable, width_of

__all__ = ["SideBySide", "stream", "wrap"]

GAP = " | "


class SideBySide:
    """Columns of text. Call `update` whenever the texts have grown, and `finish` at the end."""

    def __init__(self, names: Sequence[str], width: int, write: Callable[[str], object]) -> None:
        self.width = max(16, (width - len(GAP) * (len(names) - 1)) // len(names))
        self._write = write
        self._shown = 0
        self._line(names)
        self._line(["-" * self.width] * len(names))

    def update(self, texts: Sequence[str]) -> None:
        """Show the texts so far, without the last line of each, which may still grow."""
        columns = [wrap(text, self.width)[:-1] for text in texts]
        self._print(columns, min(map(len, columns)))

    def finish(self, texts: Sequence[str]) -> None:
        columns = [wrap(text, self.width) for text in texts]
        self._print(columns, max(map(len, columns)))

    def _print(self, columns: Sequence[Sequence[str]], ready: int) -> None:
        while self._shown < ready:
            self._line([c[self._shown] if self._shown < len(c) else "" for c in columns])
            self._shown += 1

    def _line(self, cells: Sequence[str]) -> None:
        padded = [cell + " " * (self.width - width_of(cell)) for cell in cells]
        self._write(GAP.join(padded).rstrip() + "\n")


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces where there are some."""
    lines: list[str] = []
    for paragraph in shown_text(text).split("\n"):
        line, used = "", 0
        for char in paragraph:
            size = width_of(char)
            if used + size > width:
                head, space, tail = line.rpartition(" ")
                if space and char != " " and head.strip():
                    lines.append(head)
                    line = tail
                else:
                    lines.append(line.rstrip())
                    line = ""
                    char = "" if char == " " else char
                used = width_of(line)
                size = width_of(char)
            line += char
            used += size
        lines.append(line)
    return lines


def shown_text(text: str) -> str:
    """A text for a terminal: its lines stay, tabs become spaces, control characters are escaped."""
    return "\n".join(printable(line) for line in text.replace("\t", "    ").split("\n"))


def stream(
    model: Model,
    prompt: Content,
    plan: Plan,
    sampling: Sampling,
    write: Callable[[str], Any],
    *,
    compare: bool = False,
    width: int = 80,
    saes: SAEs = None,
    tokenizer: Any = None,
    enable_thinking: bool | None = None,
    allow_other_model: bool = False,
) -> Report:
    """Write the steered text as it is made; with `compare`, the unsteered one beside it."""
    tokenizer = find_tokenizer(model, tokenizer)
    [ids] = encode_prompts(model, [prompt], tokenizer, sampling, enable_thinking)
    plans = [None, plan] if compare else [plan]
    grown: list[list[int]] = [[] for _ in plans]
    columns = SideBySide(["unsteered", "steered"], width, write) if compare else None
    shown = 0

    def on_step(tokens: list[list[int]]) -> None:
        nonlocal shown
        for own, new in zip(grown, tokens, strict=True):
            own += new
        texts = [_text(tokenizer, own) for own in grown]
        if columns is not None:
            columns.update(texts)
        else:
            write(shown_text(texts[0][shown:]))
            shown = len(texts[0])

    with (
        steer(
            model, plans, saes, tokenizer=tokenizer, allow_other_model=allow_other_model
        ) as report,
        torch.random.fork_rng(),
    ):
        torch.manual_seed(sampling.seed)
        found = continue_batch(model, [ids] * len(plans), tokenizer, sampling, on_step)
        if columns is not None:
            columns.finish([one.text for one in found])
        else:
            write(shown_text(found[0].text[shown:]) + "\n")
    return report


def _text(tokenizer: Any, ids: list[int]) -> str:
    """The text that is certain so far: an incomplete character at the end is left out."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd")
