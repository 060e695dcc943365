"""Continues one prompt with and without a plan, and shows the texts as they grow.

The work is done in a thread that holds the model's lock. Its iterator gives the texts so far, and
at the end what the plan did and whether the text is still language.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qwen_scope_lens.app.workbench import Workbench
from qwen_scope_lens.models.architecture import input_device, unwrap
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.steering.generate import (
    Continuation,
    Sampling,
    continue_batch,
    encode_prompts,
)
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.sweep import Dose, Guard
from qwen_scope_lens.steering.text_quality import perplexity, repetition, surprisals

__all__ = ["Outcome", "Step", "run_steering"]

TOP_TOKENS = 10


@dataclass(frozen=True)
class Step:
    """The state so far: `tokens` of `most` are written; None while another session runs."""

    tokens: int | None
    most: int
    plain: str = ""
    steered: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run."""

    plain: str
    steered: str
    report: str  # what every edit did
    fired: bool
    perplexities: tuple[float | None, float | None]  # plain, steered; under the unsteered model
    repetitions: tuple[float | None, float | None]
    coherent: bool
    next_tokens: tuple[list[tuple[str, float]], list[tuple[str, float]]]  # after the prompt


class _Stopped(Exception):
    pass


def run_steering(
    bench: Workbench,
    prompt: Content,
    plan: Plan,
    sampling: Sampling,
    *,
    enable_thinking: bool | None = None,
    guard: Guard | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Step | Outcome]:
    """Setting `stop` or closing the iterator ends the run at its next token, without an Outcome."""
    plan = bench.calibrated(plan)
    events: queue.Queue[Step | Outcome | BaseException | None] = queue.Queue()
    stop = stop or threading.Event()
    waits = bench.lock.locked()

    def work() -> None:
        try:
            with bench.lock:
                if not stop.is_set():
                    job = _Job(bench, plan, sampling, events, stop)
                    events.put(job.run(prompt, enable_thinking, guard or Guard()))
        except _Stopped:
            pass
        except BaseException as error:  # told where it is awaited
            events.put(error)
        finally:
            events.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield Step(None if waits else 0, sampling.new_tokens)
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            while not events.empty() and isinstance(event, Step):  # only the newest is of interest
                newer = events.get()
                if newer is None:
                    return
                if isinstance(newer, BaseException):
                    raise newer
                event = newer
            yield event
    finally:
        stop.set()
        thread.join()


@dataclass
class _Job:
    bench: Workbench
    plan: Plan
    sampling: Sampling
    events: queue.Queue[Any]
    stop: threading.Event

    def run(self, prompt: Content, enable_thinking: bool | None, guard: Guard) -> Outcome:
        model, tokenizer = self.bench.model, self.bench.model.tokenizer
        [ids] = encode_prompts(model, [prompt], tokenizer, self.sampling, enable_thinking)
        saes = self.bench.saes_of(self.plan)
        plans = [None, self.plan]
        grown: list[list[int]] = [[], []]

        def on_step(tokens: list[list[int]]) -> None:
            if self.stop.is_set():
                raise _Stopped
            for own, new in zip(grown, tokens, strict=True):
                own += new
            texts = [_text(tokenizer, own) for own in grown]
            self.events.put(Step(len(grown[0]), self.sampling.new_tokens, *texts))

        with torch.random.fork_rng():
            torch.manual_seed(self.sampling.seed)
            with steer(model, plans, saes, tokenizer=tokenizer, must_fire=False) as report:
                found = continue_batch(model, [ids, ids], tokenizer, self.sampling, on_step)
            with steer(model, plans, saes, tokenizer=tokenizer, must_fire=False):
                following = self._next_tokens(ids)
        heights = [perplexity([one]) for one in surprisals(model, found)]
        repeats = [repetition(one.ids) for one in found]
        plain, steered = (
            Dose("", 0.0, 0.0, 0.0, 0.0, height, repeat or 0.0, "")
            for height, repeat in zip(heights, repeats, strict=True)
        )
        return Outcome(
            found[0].text,
            found[1].text,
            str(report),
            report.fired,
            (heights[0], heights[1]),
            (repeats[0], repeats[1]),
            _short(found) or guard.holds(steered, plain),
            following,
        )

    @torch.no_grad()
    def _next_tokens(self, ids: tuple[int, ...]) -> Any:
        inner = unwrap(self.bench.model)
        rows = torch.tensor([ids, ids], device=input_device(self.bench.model))
        logits = inner(input_ids=rows, use_cache=False).logits[:, -1].float()
        best = logits.softmax(-1).topk(TOP_TOKENS)
        text = self.bench.vocabulary.text
        return tuple(
            [(text(token), share) for token, share in zip(tokens, shares, strict=True)]
            for tokens, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )


def _short(found: list[Continuation]) -> bool:
    """Whether both texts ended at once, so that there is nothing to call incoherent."""
    return not any(one.ids for one in found)


def _text(tokenizer: Any, ids: list[int]) -> str:
    """The text so far, without half a character at its end."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd")
