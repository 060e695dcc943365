"""Numbers about continuations: perplexity, repetition, and the measures of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.models.architecture import Model, input_device, text_config, unwrap
from qwen_scope_lens.steering.generate import Continuation
from qwen_scope_lens.steering.hooks import is_steered
from qwen_scope_lens.steering.token_masks import token_classes

__all__ = ["perplexity", "repetition", "share_of_class", "surprisals"]


@torch.no_grad()
def surprisals(
    model: Model,
    texts: Sequence[Continuation],
    token_budget: int = 4096,
    steered: bool = False,
) -> list[float | None]:
    """Mean -log p of each continuation's tokens after its prompt; None where it has none.

    Under an active plan only with `steered`, so that nobody measures steered texts so by accident.
    """
    if is_steered(model) and not steered:
        raise BadPlan(
            "perplexity is measured under the unsteered model, and a plan is active: call this"
            " outside of the `with steer` block"
        )
    inner, device = unwrap(model), input_device(model)
    pad = getattr(text_config(model), "pad_token_id", None) or 0
    found: list[float | None] = [None] * len(texts)
    waiting = sorted(
        (i for i, text in enumerate(texts) if text.ids),
        key=lambda i: -len(texts[i].prompt_ids) - len(texts[i].ids),
    )
    while waiting:
        longest = len(texts[waiting[0]].prompt_ids) + len(texts[waiting[0]].ids)
        members = waiting[: max(1, token_budget // longest)]
        waiting = waiting[len(members) :]
        rows = [[*texts[i].prompt_ids, *texts[i].ids] for i in members]
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)
        logits = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for i, row, scores in zip(members, ids, logits, strict=True):
            start, stop = len(texts[i].prompt_ids), len(texts[i].prompt_ids) + len(texts[i].ids)
            own = scores[start - 1 : stop - 1].float().log_softmax(-1)
            picked = own.gather(-1, row[start:stop].to(own.device).unsqueeze(-1))
            found[i] = -float(picked.mean())
    return found


def perplexity(surprisals: Sequence[float | None]) -> float | None:
    """exp of the mean surprisal, over the texts that have one; None without any."""
    known = [value for value in surprisals if value is not None]
    return math.exp(min(700.0, sum(known) / len(known))) if known else None


def repetition(ids: Sequence[int], n: int = 4) -> float | None:
    """The share of n-grams that occurred earlier in the text; None for fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def share_of_class(text: str, name: str) -> float:
    """The share of a text's visible characters that are of a token class; 0 without any."""
    visible = [char for char in text if not char.isspace()]
    return sum(name in token_classes(char) for char in visible) / max(1, len(visible))
