"""An engine outside of this package: what all of them share, so that the server sees one interface.

A subclass gives the tokens of a reply one by one. Here they become text, stop at stop texts and end
tokens, and are told to the sink, as `engine.py` does it for replies of our own. A loop in a thread
of its own waits for all replies together.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from typing import Any, ClassVar, TypeVar

from qwen_scope_lens.errors import EngineFailed, ScopeError
from qwen_scope_lens.models.checkpoint import Tokenizer
from qwen_scope_lens.models.token_text import Vocabulary
from qwen_scope_lens.serve.engine import (
    QueueFull,
    Stopping,
    TooLate,
    refuse_long,
    special_tokens,
)
from qwen_scope_lens.serve.engines.abilities import Abilities, refuse_edits
from qwen_scope_lens.serve.rows import Reason, Row, Sink, Step, Wanted
from qwen_scope_lens.serve.text import GrowingText
from qwen_scope_lens.steering.plan import Plan

__all__ = ["Outside"]

T = TypeVar("T")
log = logging.getLogger(__name__)


class Outside:
    """Replies that another engine decodes. Its methods may be called from any thread."""

    abilities: ClassVar[Abilities]

    def __init__(
        self,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        context: int,
        *,
        rows: int = 16,
        queue: int = 256,
        seconds: float = 600,
    ) -> None:
        self.context, self.rows, self.queue, self.seconds = context, rows, queue, seconds
        self.vocabulary, self.special = Vocabulary(tokenizer), special_tokens(tokenizer)
        self.counts: Counter[str] = Counter()
        self._ends = ends
        self._lock = threading.Lock()
        self._going: dict[Row, Future[None]] = {}
        self._writing = 0
        self._closing = False
        self._stopped: set[Row] = set()  # told that the server ends
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(rows)
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="qsl-outside", daemon=True
        )
        self._thread.start()

    # What a subclass does.

    @abstractmethod
    def tokens(self, wanted: Wanted) -> AsyncGenerator[int | Reason, None]:
        """The tokens of a reply, at last why it ends. Whoever stops asking frees its place."""

    def check_places(self, plan: Plan) -> None:
        """Raise `BadPlan` for a plan that the engine would not carry out as it says."""

    async def shut(self) -> None:
        """End what the engine has begun."""

    # What the server asks for.

    def check(self, plan: Plan) -> None:
        refuse_edits(self.abilities, plan.edits)
        self.check_places(plan)

    def submit(self, wanted: Sequence[Wanted], sink: Sink) -> list[Row]:
        """Ask for some replies, all of them or (`QueueFull`) none."""
        refuse_long(wanted, self.context)
        rows = [self._row(one, number, sink) for number, one in enumerate(wanted)]
        with self._lock:
            if self._closing:
                raise Stopping("the server is being shut down")
            waiting = len(self._going) - self._writing
            if waiting > 0 and waiting + len(rows) > self.queue:
                raise QueueFull(
                    f"{waiting} replies wait and the queue holds {self.queue}: ask again later"
                )
            for row in rows:
                self._going[row] = going = self._soon(self._serve(row))
                going.add_done_callback(partial(self._gone, row))
        return rows

    def _gone(self, row: Row, _: Future[None]) -> None:
        self._going.pop(row, None)

    def cancel(self, rows: Sequence[Row]) -> None:
        """Stop some replies. Their sinks are told that they were cut, and nothing else any more."""
        for row in rows:
            row.cancelled = True
            going = self._going.get(row)
            if going is not None:
                going.cancel()

    def close(self) -> None:
        """Stop. Whoever waits is told."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            left = list(self._going)
        stopping = Stopping("the server is being shut down")
        self._stopped = {row for row in left if not row.cancelled}
        for row in left:
            self._fail(row, stopping)
        self.cancel(left)
        self.waited(self.shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)

    @property
    def gauges(self) -> dict[str, int]:
        writing = self._writing
        return {"rows": writing, "waiting": max(0, len(self._going) - writing), "prefix_tokens": 0}

    def waited(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the engine's loop, and wait for it."""
        return self._soon(work).result()

    # In the loop.

    def _soon(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _row(self, wanted: Wanted, number: int, sink: Sink) -> Row:
        text = GrowingText(self.vocabulary, self.special, wanted.stop)
        row = Row(wanted, number, sink, text, None, time.monotonic() + self.seconds)
        row.report = None  # nobody has counted
        return row

    async def _serve(self, row: Row) -> None:
        began = False
        try:
            async with asyncio.timeout(row.deadline - time.monotonic()), self._places:
                self._writing, began = self._writing + 1, True
                self.counts["prompt_tokens"] += len(row.wanted.prompt)
                await self._write(row)
        except asyncio.CancelledError:
            if row.reason is None and row not in self._stopped:
                self.counts["cancelled"] += 1
                row.reason, row.read = "cut", len(row.ids) * bool(row.tokens)
                row.sink(row, Step(reason="cut"))
        except TimeoutError:
            self._fail(row, TooLate(f"took longer than {self.seconds:g} s: ask for fewer tokens"))
        except Exception as error:
            if not isinstance(error, ScopeError):
                log.exception("the engine %s failed", self.abilities.engine)
            self._fail(row, error)
        finally:
            self._writing -= began

    async def _write(self, row: Row) -> None:
        wanted, known = row.wanted, len(self.vocabulary)
        if wanted.new_tokens == 0:
            self._finish(row, Step(reason="length"))
            return
        async with aclosing(self.tokens(wanted)) as tokens:
            async for token in tokens:
                if isinstance(token, str) or token in self._ends:
                    row.reason = token if isinstance(token, str) else "stop"
                    self._finish(row, Step(row.text.end(), reason=row.reason))
                    return
                if not 0 <= token < known:
                    raise EngineFailed(
                        f"the engine {self.abilities.engine} wrote token {token}, and the tokenizer"
                        f" has {known}: it runs another model than --model names"
                    )
                self.counts["new_tokens"] += 1
                row.first_token = row.first_token or time.monotonic()
                row.tokens.append(token)
                text = row.text.add(token)
                if row.text.stopped or len(row.tokens) == wanted.new_tokens:
                    row.reason = "stop" if row.text.stopped else "length"
                    end = row.text.end()
                    self._finish(row, Step(text + end, (token,), reason=row.reason))
                    return
                if wanted.streams:
                    self._tell(row, Step(text, (token,)))
        raise EngineFailed(f"the engine {self.abilities.engine} ended a reply without a reason")

    def _tell(self, row: Row, step: Step) -> None:
        if not row.cancelled:
            row.sink(row, step)

    def _finish(self, row: Row, step: Step) -> None:
        self.counts["finished"] += 1
        row.reason, row.read = step.reason, len(row.ids)
        self._tell(row, step)

    def _fail(self, row: Row, error: BaseException) -> None:
        if not row.cancelled:
            self.counts["failed"] += 1
            row.cancelled = True  # nothing more is told
            row.sink(row, Step(error=error))
