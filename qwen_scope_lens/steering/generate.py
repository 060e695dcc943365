"""Continuations with and without a plan, batch by batch, for sweeps and the command line.

The model's own `generate` does the work. Prompts are padded on the left, each row can have its own
plan, and a callback can watch the new tokens of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from qwen_scope_lens.errors import BadPlan, BadText, PlanNeverFired, WrongModel
from qwen_scope_lens.models.architecture import (
    context_length,
    describe,
    input_device,
    places_of,
    text_config,
    unwrap,
)
from qwen_scope_lens.models.tokenize import Content, encode, find_tokenizer
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.plan import Edit, Plan, check_seed
from qwen_scope_lens.steering.readers import SAEs, with_readers
from qwen_scope_lens.steering.report import Report
from qwen_scope_lens.steering.where import shown

__all__ = [
    "Continuation",
    "Sampling",
    "continue_batch",
    "encode_prompts",
    "end_tokens",
    "generate",
]

MOST_TEMPERATURE = 1e6
OnStep = Callable[[list[list[int]]], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; the model's own settings are ignored."""

    new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if (
            not isinstance(self.new_tokens, int)
            or not 1 <= self.new_tokens < 2**31
            or not 0 <= self.temperature <= MOST_TEMPERATURE
            or not 0 < self.top_p <= 1
        ):
            raise BadPlan(
                "expected new_tokens of 1 or more, temperature of 0 or more (to 1e6), top_p in"
                f" (0, 1]; found new_tokens={shown(self.new_tokens)},"
                f" temperature={shown(self.temperature)}, top_p={shown(self.top_p)}"
            )


@dataclass(frozen=True)
class Continuation:
    """The continuation of one prompt."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # without the end token and what pads behind it
    text: str


def generate(
    model: Any,
    prompts: Sequence[Content],
    plan: Plan | Edit | str | Sequence[Plan | Edit | str | None] | None = None,
    saes: SAEs = None,
    *,
    tokenizer: Any = None,
    sampling: Sampling | None = None,
    batch: int = 16,
    control: int | Mapping[int, torch.Tensor] | None = None,
    must_fire: bool = True,
    enable_thinking: bool | None = None,
    on_step: OnStep | None = None,
    allow_other_model: bool = False,
) -> list[Continuation]:
    """Continue every prompt (texts, chats or token ids), in the order given.

    `plan` is as for `steer`; a list has one plan for each prompt. `control` and
    `allow_other_model` are those of `steer`. `on_step` is called after every step with the new
    token of each row of the batch.
    """
    sampling = sampling or Sampling()
    if isinstance(prompts, (str, torch.Tensor)) or len(prompts) == 0:
        raise BadText("expected a sequence of prompts with at least one")
    tokenizer = find_tokenizer(model, tokenizer)
    encoded = encode_prompts(model, prompts, tokenizer, sampling, enable_thinking)
    if plan is None or isinstance(plan, (Plan, Edit, str)):
        given: list[Plan | Edit | str | None] = [plan] * len(prompts)
    else:
        given = list(plan)
    each = [None if one is None else Plan.of(one) for one in given]
    if len(each) != len(prompts):
        raise BadPlan(f"{len(each)} plans for {len(prompts)} prompts: give one per prompt, or one")
    edits = [edit for one in dict.fromkeys(each) if one for edit in one.edits]
    saes = with_readers(edits, saes)  # once, not for every batch
    found: list[Continuation] = []
    reports: list[Report] = []
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        for start in range(0, len(encoded), batch):
            rows = encoded[start : start + batch]
            plans = each[start : start + batch]
            if not any(plans):
                found += continue_batch(model, rows, tokenizer, sampling, on_step)
                continue
            one = plans[0] if plans[0] and all(p == plans[0] for p in plans) else plans
            with steer(
                model,
                one,
                saes,
                tokenizer=tokenizer,
                control=control,
                must_fire=False,
                allow_other_model=allow_other_model,
            ) as report:
                found += continue_batch(model, rows, tokenizer, sampling, on_step)
            reports.append(report)
    if must_fire and reports and not any(report.fired for report in reports):
        raise PlanNeverFired(
            "the plan never fired on any prompt: no token was selected, or the features were never"
            f" among the top k. Check layer, feature and where\n{reports[0]}"
        )
    return found


def encode_prompts(
    model: Any,
    prompts: Sequence[Content],
    tokenizer: Any,
    sampling: Sampling,
    enable_thinking: bool | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of every prompt. Prompts that leave no room for the new tokens are refused."""
    limit = context_length(model) - sampling.new_tokens
    if limit < 1:
        raise BadText(
            f"{sampling.new_tokens} new tokens leave no room for a prompt: the context of"
            f" {describe(model)} is {context_length(model)}"
        )
    encoded = encode(
        prompts, tokenizer, limit=limit, enable_thinking=enable_thinking, add_generation_prompt=True
    )
    return [document.ids for document in encoded]


def continue_batch(
    model: Any,
    rows: Sequence[Sequence[int]],
    tokenizer: Any,
    sampling: Sampling,
    on_step: OnStep | None = None,
) -> list[Continuation]:
    """Call the model's `generate` once, under the plan that is active, if any."""
    inner: Any = unwrap(model)
    if places_of(inner).head is None or not hasattr(inner, "generate"):
        raise WrongModel(f"{describe(inner)} has no unembedding: it cannot generate")
    ends = end_tokens(inner)
    pad = getattr(text_config(inner), "pad_token_id", None)
    pad = next(iter(ends), 0) if pad is None else int(pad)
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    device = input_device(model)
    settings: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "repetition_penalty": 1.0,
    }
    if sampling.temperature > 0:
        settings = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
    watch = transformers.StoppingCriteriaList()
    if on_step is not None:
        watch.append(_Watch(on_step))
    with torch.no_grad():
        out = inner.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=sampling.new_tokens,
            top_k=None if sampling.temperature == 0 else 0,
            pad_token_id=pad,
            stopping_criteria=watch,
            **settings,
        )
    return [
        _continuation(tokenizer, row, new[longest:].tolist(), ends)
        for row, new in zip(rows, out, strict=True)
    ]


class _Watch(transformers.StoppingCriteria):
    """Never stops anything: `generate` calls it at every step, so it can watch."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.on_step([[int(token)] for token in input_ids[:, -1]])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _continuation(
    tokenizer: Any, prompt: Sequence[int], new: list[int], ends: set[int]
) -> Continuation:
    stop = next((i for i, token in enumerate(new) if token in ends), len(new))
    text = str(tokenizer.decode(new[:stop], skip_special_tokens=True))
    return Continuation(tuple(prompt), tuple(new[:stop]), text)


def end_tokens(inner: Any) -> set[int]:
    """The tokens with which the model ends a text."""
    for holder in ("generation_config", "config"):
        found = getattr(getattr(inner, holder, None), "eos_token_id", None)
        if found is not None:
            return {int(found)} if isinstance(found, int) else {int(token) for token in found}
    return set()
