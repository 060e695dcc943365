"""What a plan is compared with: the prompt that asks for it, the mean difference, what it costs.

`sweep` runs these arms beside the plan and its random control. `likeness` is a measure for concepts
that have no pattern: how much better the unsteered model predicts a text after examples of the
concept than after neutral texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.errors import BadPlan, TooLittleData
from qwen_scope_lens.models.architecture import context_length
from qwen_scope_lens.models.residuals import iter_captures
from qwen_scope_lens.models.tokenize import Content, find_tokenizer
from qwen_scope_lens.steering.doses import Measure
from qwen_scope_lens.steering.generate import Continuation
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.readers import SAEs
from qwen_scope_lens.steering.text_quality import perplexity, surprisals

__all__ = ["Examples", "asking", "capability", "likeness", "mean_difference"]

MOST_CONTEXT = 192
"""Tokens of examples that the model reads before a text whose likeness is measured."""
MOST_NEUTRAL = 48
"""Tokens of a neutral text that count for the capability."""


@dataclass(frozen=True)
class Examples:
    """Texts that have a concept, and texts that lack it."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            raise TooLittleData(
                f"{len(self.positive)} texts with the concept and {len(self.negative)} without it:"
                " at least one of each is needed"
            )

    @property
    def sha256(self) -> str:
        return hashlib.sha256(repr((self.positive, self.negative)).encode()).hexdigest()


def asking(prompts: Sequence[Content], ask: str) -> list[Content]:
    """The prompts after an instruction: a line before a text, a system message before a chat."""
    if not ask.strip():
        raise BadPlan(
            "the instruction is empty: say what is asked for, such as 'Write in Chinese.'"
        )
    found: list[Content] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            found.append(f"{ask}\n{prompt}")
        elif isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
            first, *rest = prompt
            if first.get("role") == "system":
                first = {**first, "content": f"{first['content']}\n{ask}"}
                found.append([first, *rest])
            else:
                found.append([{"role": "system", "content": ask}, *prompt])
        else:
            raise BadPlan("prompts of token ids cannot be asked for anything: give texts or chats")
    return found


@torch.no_grad()
def mean_difference(
    model: Any, examples: Examples, layers: Iterable[int], tokenizer: Any = None
) -> dict[int, Tensor]:
    """The mean residual of the examples minus that of the others, per layer. `[d_model]` each

    Every text counts alike. First tokens and tokens of extreme norm are left out.
    """
    wanted = sorted(set(layers))
    texts = [*examples.positive, *examples.negative]
    sums: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    signs: dict[int, list[float]] = {layer: [] for layer in wanted}
    for read in iter_captures(model, texts, wanted, tokenizer=tokenizer, truncate=True):
        for number, doc in enumerate(read.doc_ids):
            one = read.doc(number)
            positive = doc < len(examples.positive)
            share = 1 / len(examples.positive) if positive else -1 / len(examples.negative)
            for layer in wanted:
                rows = one.residuals[layer][one.keep(layer)].float().cpu()
                if len(rows):
                    sums[layer].append(rows.mean(0))
                    signs[layer].append(share)
    found = {}
    for layer in wanted:
        if not sums[layer] or min(signs[layer]) > 0 or max(signs[layer]) < 0:
            raise TooLittleData(
                "the examples have no token that counts: give texts of several tokens each"
            )
        found[layer] = torch.tensor(signs[layer]) @ torch.stack(sums[layer])
    return found


@torch.no_grad()
def capability(
    model: Any,
    texts: Sequence[str],
    plan: Plan | None = None,
    saes: SAEs = None,
    *,
    control: Any = None,
    tokenizer: Any = None,
    allow_other_model: bool = False,
) -> float | None:
    """The perplexity of neutral texts, read by the model under a plan.

    The plan acts on all tokens that it selects, whether it was meant for prompts or generations.
    """
    tokenizer = find_tokenizer(model, tokenizer)
    rows = [_tokens(tokenizer, text)[:MOST_NEUTRAL] for text in texts]
    read = [Continuation(tuple(ids[:1]), tuple(ids[1:]), "") for ids in rows if len(ids) > 1]
    if plan is None:
        return perplexity(surprisals(model, read))
    everywhere = Plan(
        [replace(edit, where=replace(edit.where, phase="both")) for edit in plan.edits]
    )
    with steer(
        model,
        everywhere,
        saes,
        tokenizer=tokenizer,
        control=control,
        must_fire=False,
        allow_other_model=allow_other_model,
    ):
        return perplexity(surprisals(model, read, steered=True))


def likeness(model: Any, examples: Examples, tokenizer: Any = None) -> Measure:
    """The measure: nats per token that examples of the concept save, beside neutral texts.

    Above 0 the unsteered model expects the text more after the examples than after the others.
    """
    tokenizer = find_tokenizer(model, tokenizer)
    room = min(MOST_CONTEXT, context_length(model) // 3)
    contexts = [
        _context(tokenizer, texts, room) for texts in (examples.positive, examples.negative)
    ]

    def of(new: Continuation, old: Continuation) -> float:
        after = [Continuation(context, new.ids, new.text) for context in contexts]
        with_examples, without = surprisals(model, after)
        return without - with_examples if with_examples is not None and without is not None else 0.0

    return Measure(
        f"likeness={examples.sha256[:12]}",
        "nats per token by which examples of the concept make the text more likely",
        of,
    )


def _context(tokenizer: Any, texts: Sequence[str], room: int) -> tuple[int, ...]:
    """A part of every text, so that all of them count, as one text of at most `room` tokens."""
    each = max(4, room // len(texts))
    ids = [token for text in texts for token in _tokens(tokenizer, f"{text}\n")[:each]]
    return tuple(ids[:room])


def _tokens(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found
