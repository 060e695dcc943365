"""A generator that runs a model in memory, either as it is or steered towards a feature.

Steered, the model writes while the decoder row of the request's target feature is added to the
residual, so that it needs neither a description nor a second model. The unsteered model then reads
its texts like all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan, WrongTokenizer
from qwen_scope_lens.models.architecture import (
    Model,
    context_length,
    input_device,
    places_of,
    unwrap,
)
from qwen_scope_lens.models.tokenize import find_tokenizer
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.readers import SAEs
from qwen_scope_lens.writers.generator import Book, Completion, Request, Sampling, digest

__all__ = ["Local", "Push"]


@dataclass(frozen=True)
class Push:
    """How strongly a target is amplified: `strength` times its typical activation.

    `typical` has the typical activation (the mean where it fires) of each feature. For a feature
    that is not in it the strength itself is added, in raw activations.
    """

    strength: float
    typical: Mapping[FeatureRef, float]

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise BadPlan(f"strength is {self.strength!r}: expected a finite number")

    def plan(self, ref: FeatureRef) -> Plan:
        return Plan([Edit(ref, "add", self.strength * self.typical.get(ref, 1.0))])


class Local:
    """Calls a model's `generate` in batches. `saes` are SAEs that are loaded already."""

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        tokenizer: Any = None,
        push: Push | None = None,
        saes: SAEs = None,
        batch: int = 16,
    ) -> None:
        self._model, self._label, self._push, self._saes = model, name, push, saes
        self._tokenizer, self._batch = find_tokenizer(model, tokenizer), batch

    @property
    def name(self) -> str:
        if self._push is None:
            return f"hf:{self._label}"
        return f"steer:{self._label} x {self._push.strength:g}"

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def generate(self, requests: Sequence[Request], book: Book) -> None:
        ids = [self._ids(request) for request in requests]
        for group in self._groups(requests, ids):
            group = [number for number in group if book.start(number)]
            if not group:
                return
            chosen = [requests[number] for number in group]
            for number, completion in zip(
                group, self._answers(chosen, [ids[number] for number in group]), strict=True
            ):
                book.finish(number, completion)

    def _ids(self, request: Request) -> list[int]:
        """The token ids of a prompt; its beginning is cut off where the context is too short."""
        if request.raw:
            ids = self._tokenizer(request.text, add_special_tokens=False)["input_ids"]
        else:
            if not getattr(self._tokenizer, "chat_template", None):
                raise WrongTokenizer(
                    f"{self._label} has no chat template, so it cannot answer prompts: use a recipe"
                    " whose template is a [text], such as `text`, or another model"
                )
            messages = [{"role": role, "content": text} for role, text in request.messages]
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        room = max(1, context_length(self._model) - request.sampling.max_tokens)
        return list(ids[-room:])

    def _groups(self, requests: Sequence[Request], ids: Sequence[list[int]]) -> Iterator[list[int]]:
        """Numbers of requests that may share a batch, which has one sampling.

        In a batch for a hybrid model all prompts have one length, because its recurrent layers
        would read pads.
        """
        hybrid = places_of(self._model).is_hybrid
        groups: dict[tuple[Sampling, int, bool], list[int]] = {}
        for number, request in enumerate(requests):
            length = len(ids[number]) if hybrid else 0
            steered = self._push is not None and request.target is not None
            groups.setdefault((request.sampling, length, steered), []).append(number)
        for group in groups.values():
            group.sort(key=lambda number: len(ids[number]))
            for start in range(0, len(group), self._batch):
                yield group[start : start + self._batch]

    @torch.no_grad()
    def _answers(
        self, requests: Sequence[Request], ids: Sequence[list[int]]
    ) -> Iterator[Completion]:
        inner: Any = unwrap(self._model)  # which generates
        device = input_device(self._model)
        pad = self._tokenizer.pad_token_id or 0
        width = max(map(len, ids))
        rows = torch.tensor([[pad] * (width - len(one)) + one for one in ids])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids])
        sampling = requests[0].sampling
        choice: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
            choice["top_p"] = sampling.top_p
        # The seed of a batch depends on its first request, so equal batches give equal texts.
        seed = int(digest(self.name, requests[0])[:8], 16)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(_gpus(device)))
            torch.manual_seed(seed)
            targets = [request.target for request in requests]
            if self._push is not None and None not in targets:
                plans = [self._push.plan(target) for target in targets if target is not None]
                stack.enter_context(steer(self._model, plans, self._saes))
            out = inner.generate(
                input_ids=rows.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=sampling.max_tokens,
                pad_token_id=pad,
                **choice,
            )
        for row, one in zip(out[:, width:].tolist(), ids, strict=True):
            text = self._tokenizer.decode(row, skip_special_tokens=True)
            ended = pad in row or (row and row[-1] in self._tokenizer.all_special_ids)
            used = row.index(pad) if pad in row else len(row)
            yield Completion(text, "stop" if ended else "length", len(one), used)


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
