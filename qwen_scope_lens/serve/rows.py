"""What is asked of the engine, and a reply that is being written.

A `Wanted` is one reply: a prompt, how to choose tokens, a plan, and which layers' residuals are
read on the way. The engine makes a `Row` of it and tells the row's `sink` what happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from qwen_scope_lens.serve.sampling import Chooser, Logprob
from qwen_scope_lens.serve.text import GrowingText
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.report import Report
from qwen_scope_lens.steering.where import Gate

__all__ = ["Reason", "Row", "Sink", "Step", "Wanted"]

Reason = Literal["stop", "length", "cut"]
"""Why a reply ends. One is cut where its client went away."""


@dataclass(frozen=True)
class Wanted:
    """One reply."""

    prompt: tuple[int, ...]
    new_tokens: int  # may be 0: then only the prompt is read
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    plan: Plan | None = None
    layers: tuple[int, ...] = ()  # whose residuals the sink gets
    top_logprobs: int | None = None  # None: no log probabilities
    prompt_logprobs: bool = False
    streams: bool = False  # the sink is told of every step, not only of the end
    written: int | None = None  # tokens at the end of the prompt that are a reply, read again


@dataclass(frozen=True)
class Step:
    """What has happened to a reply since the sink was told last."""

    text: str = ""  # certain new text
    tokens: tuple[int, ...] = ()  # chosen since then
    logprobs: tuple[Logprob, ...] = ()
    reason: Reason | None = None  # set in the last step
    error: BaseException | None = None  # set in the last step of a reply that failed


Sink = Callable[["Row", Step], None]


@dataclass(eq=False)
class Row:
    """A reply under way. Only the engine's thread writes to it, until its last step."""

    wanted: Wanted
    number: int  # its place among the replies that were asked for together
    sink: Sink
    text: GrowingText
    chooser: Chooser | None  # None: the most probable token each time
    deadline: float
    asked: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)  # of the reply, without the end token
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob | None] | None = None
    # layer -> one part [n, d_model] per pass, in the order of the text; only ever appended to
    residuals: dict[int, list[Tensor]] = field(default_factory=dict)
    cached: int = 0  # tokens of the prompt that the prefix cache had
    report: Report | None = None
    opened: dict[Gate, int] = field(default_factory=dict)  # position in the text
    next: int | None = None  # chosen, and not yet read by the model
    read: int = 0  # tokens that the model has read
    cancelled: bool = False
    first_token: float | None = None
    reason: Reason | None = None

    def __post_init__(self) -> None:
        if self.wanted.plan is not None:
            self.report = Report(self.wanted.plan.edits)

    @property
    def ids(self) -> list[int]:
        return [*self.wanted.prompt, *self.tokens]
