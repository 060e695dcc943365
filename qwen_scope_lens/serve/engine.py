"""The engine: one thread that decodes all requests together.

Between two steps rows leave (finished, cancelled, too late) and others join, so nobody waits for
the longest reply of a batch. Other work with the model (reading a text, calibrating) is done by the
same thread between two steps, because hooks of a plan belong to the model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from qwen_scope_lens.errors import BadText, ScopeError
from qwen_scope_lens.models.architecture import context_length, input_device
from qwen_scope_lens.models.token_text import Vocabulary
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.serve.batch import Batch
from qwen_scope_lens.serve.engines.abilities import OWN
from qwen_scope_lens.serve.prefixes import PrefixCache
from qwen_scope_lens.serve.rows import Row, Sink, Step, Wanted
from qwen_scope_lens.serve.sampling import Chooser, Logprob, logprobs
from qwen_scope_lens.serve.text import GrowingText
from qwen_scope_lens.steering.generate import end_tokens
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.rows import RowSteering

__all__ = ["Engine", "QueueFull", "Stopping", "TooLate"]

T = TypeVar("T")
log = logging.getLogger(__name__)


class QueueFull(ScopeError):
    """More requests wait than the queue holds."""


class TooLate(ScopeError):
    """A request took longer than it may."""


class Stopping(ScopeError):
    """The server is being shut down."""


class Engine:
    """Decodes on one model. Its methods may be called from any thread."""

    abilities = OWN

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sae_of: Callable[[str], LayerSAE],
        *,
        rows: int = 16,
        queue: int = 256,
        seconds: float = 600,
        prefix_tokens: int = 8192,
        allow_other_model: bool = False,
    ) -> None:
        self.context = context_length(model)
        self.rows, self.queue, self.seconds = rows, queue, seconds
        self.vocabulary = Vocabulary(tokenizer)
        self.special = special_tokens(tokenizer)
        self.counts: Counter[str] = Counter()
        self._model, self._ends, self._device = model, end_tokens(model), input_device(model)
        self._prefixes = PrefixCache(prefix_tokens)

        def steering() -> RowSteering:
            return RowSteering(model, tokenizer, sae_of, allow_other_model)

        self._steering = steering()  # checks plans, in the threads of the requests
        self._batch = Batch(model, steering, self._prefixes)
        self._waiting: deque[Row] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="qsl-engine", daemon=True)
        self._thread.start()

    # For other threads.

    def check(self, plan: Plan) -> None:
        """Raise now what the plan would raise when it acts."""
        self._steering.check(plan)

    def submit(self, wanted: Sequence[Wanted], sink: Sink) -> list[Row]:
        """Ask for some replies, all of them or (`QueueFull`) none."""
        refuse_long(wanted, self.context)
        rows = [self._row(one, number, sink) for number, one in enumerate(wanted)]
        with self._wake:
            if self._closing:
                raise Stopping("the server is being shut down")
            # An idle engine takes a request of any size: it could never be answered otherwise.
            if self._waiting and len(self._waiting) + len(rows) > self.queue:
                raise QueueFull(
                    f"{len(self._waiting)} replies wait and the queue holds {self.queue}: ask again"
                    " later"
                )
            self._waiting.extend(rows)
            self._wake.notify()
        return rows

    def cancel(self, rows: Sequence[Row]) -> None:
        """Stop some replies. Their sinks are told that they were cut, and nothing else any more."""
        for row in rows:
            row.cancelled = True
        with self._wake:
            self._wake.notify()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do some other work with the model, between two steps."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise Stopping("the server is being shut down")
            if len(self._jobs) >= self.queue:
                raise QueueFull(f"{len(self._jobs)} questions are waiting: ask again later")
            self._jobs.append((work, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Stop. Whoever waits is told."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=30)

    @property
    def gauges(self) -> dict[str, int]:
        return {
            "rows": len(self._batch.rows),
            "waiting": len(self._waiting),
            "prefix_tokens": self._prefixes.tokens,
        }

    # The engine's own thread.

    def _row(self, wanted: Wanted, number: int, sink: Sink) -> Row:
        text = GrowingText(self.vocabulary, self.special, wanted.stop)
        chooser = None
        if wanted.temperature:
            chooser = Chooser(wanted.temperature, wanted.top_p, wanted.seed, self._device)
        return Row(wanted, number, sink, text, chooser, time.monotonic() + self.seconds)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._jobs or self._waiting or self._batch.rows or self._closing):
                    self._wake.wait()
                if self._closing:
                    break
                job = self._jobs.popleft() if self._jobs else None
            if job is not None:
                _do(*job)
            try:
                self._let_go()
                self._admit()
                if self._batch.rows:
                    self._advance()
            except Exception as error:  # whatever a kernel raises; the next requests are served
                log.exception("a step failed")
                self._fail(self._batch.clear(), error)
        self._let_go()  # what was cut on the way out is recorded as far as it went
        stopping = Stopping("the server is being shut down")
        self._fail([*self._batch.rows, *self._waiting], stopping)
        for _, future in self._jobs:
            future.set_exception(stopping)

    def _let_go(self) -> None:
        now = time.monotonic()
        late = [row for row in self._batch.rows if row.deadline < now and not row.cancelled]
        gone = [row for row in self._batch.rows if row.cancelled]
        self._fail(late, TooLate(f"took longer than {self.seconds:g} s: ask for fewer tokens"))
        if late or gone:
            self._batch.leave([*late, *gone])
        for row in gone:
            self._cut(row)

    def _admit(self) -> None:
        ready: list[Row] = []
        kept: list[Any] = []
        while len(self._batch.rows) + len(ready) < self.rows:
            with self._wake:
                row = self._waiting.popleft() if self._waiting else None
            if row is None:
                break
            if row.cancelled:
                self._cut(row)
                continue
            if row.deadline < time.monotonic():
                self._fail(
                    [row], TooLate(f"waited longer than {self.seconds:g} s: ask again later")
                )
                continue
            try:
                logits, cache = self._batch.prefill(row)
                self.counts["prompt_tokens"] += len(row.wanted.prompt)
                self.counts["cached_tokens"] += row.cached
                stays = self._begin(row, logits)
            except Exception as error:
                if not isinstance(error, ScopeError):
                    log.exception("a prompt failed")
                self._fail([row], error)
                continue
            if stays:
                ready.append(row)
                kept.append(cache)
        if ready:
            try:
                self._batch.join(ready, kept)
            except Exception as error:
                self._fail(ready, error)
                raise

    def _begin(self, row: Row, logits: Tensor) -> bool:
        """Choose the first token. Whether there is more to do."""
        if row.wanted.new_tokens == 0:
            self._finish(row, Step(reason="length"))
            return False
        done = self._take([row], logits[None])
        for _, step in done:
            self._finish(row, step)
        return not done

    def _advance(self) -> None:
        rows = self._batch.rows
        logits = self._batch.step()
        self.counts["steps"] += 1
        going = [i for i, row in enumerate(rows) if row.reason is None]
        # Of the others only the last token was still to be read.
        done = [(row, Step(reason=row.reason)) for row in rows if row.reason is not None]
        if going:
            some = logits if len(going) == len(rows) else logits[going]
            done += self._take([rows[i] for i in going], some)
        if done:
            self._batch.leave([row for row, _ in done])  # their reports are complete now
        for row, step in done:
            self._finish(row, step)

    def _take(self, rows: Sequence[Row], logits: Tensor) -> list[tuple[Row, Step]]:
        """Choose the next token of each row. The rows that are done, with their last step."""
        best, done = logits.argmax(-1).tolist(), []
        self.counts["new_tokens"] += len(rows)
        for i, row in enumerate(rows):
            wanted = row.wanted
            token = best[i] if row.chooser is None else row.chooser.choose(logits[i])
            row.next, row.first_token = token, row.first_token or time.monotonic()
            found: tuple[Logprob, ...] = ()
            if wanted.top_logprobs is not None:
                found = tuple(logprobs(logits[i : i + 1], [token], wanted.top_logprobs))
                row.logprobs += found
            if token in self._ends:
                row.reason = "stop"
                done.append((row, Step(row.text.end(), (), found, "stop")))
                continue
            row.tokens.append(token)
            text = row.text.add(token)
            if row.text.stopped or len(row.tokens) == wanted.new_tokens:
                row.reason = "stop" if row.text.stopped else "length"
                text += row.text.end()
            step = Step(text, (token,), found)
            if row.reason and not wanted.layers:
                done.append((row, replace(step, reason=row.reason)))
            elif wanted.streams:
                row.sink(row, step)
        return done

    def _finish(self, row: Row, step: Step) -> None:
        if row.cancelled:
            self._cut(row)
            return
        self.counts["finished"] += 1
        row.reason = step.reason
        row.sink(row, step)

    def _cut(self, row: Row) -> None:
        """A row whose client went away, and which nothing writes to any more."""
        self.counts["cancelled"] += 1
        row.reason = "cut"
        row.sink(row, Step(reason="cut"))

    def _fail(self, rows: Sequence[Row], error: BaseException) -> None:
        for row in rows:
            if not row.cancelled:
                self.counts["failed"] += 1
                row.cancelled = True  # nothing more is told
                row.sink(row, Step(error=error))


def refuse_long(wanted: Sequence[Wanted], context: int) -> None:
    """Raise for a prompt and reply that do not fit into the context together."""
    for one in wanted:
        if len(one.prompt) + one.new_tokens > context:
            raise BadText(
                f"the prompt has {len(one.prompt)} tokens and {one.new_tokens} are to follow; the"
                f" context of the model is {context}"
            )


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that are not shown in a reply's text."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset({*tokenizer.all_special_ids, *(int(n) for n, t in added if t.special)})


def _do(work: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        with torch.no_grad():
            found = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(found)
