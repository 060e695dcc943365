"""One prompt continued with and without a plan, in one batch, shown as the texts grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen_scope_lens.models.tokens import Document, find_tokenizer
from qwen_scope_lens.steering.generate import Sampling, continue_batch, encode_prompts
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.readers import SAEs
from qwen_scope_lens.steering.report import Report
from qwen_scope_lens.steering.show import SideBySide, printable

__all__ = ["stream"]


def stream(
    model: Any,
    prompt: Document,
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
            write(printable(texts[0][shown:]))
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
            write(printable(found[0].text[shown:]) + "\n")
    return report


def _text(tokenizer: Any, ids: list[int]) -> str:
    """What is certain so far: half a character at the end waits for its other half."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd")
