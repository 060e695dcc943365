"""`/v1/completions` and `/v1/chat/completions`: from a request to its answer or its stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

from qwen_scope_lens.serve.answers import Answers
from qwen_scope_lens.serve.asking import Asked
from qwen_scope_lens.serve.faults import fault_of
from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.recorder import Recorder
from qwen_scope_lens.serve.records import Records
from qwen_scope_lens.serve.rows import Row, Step, Wanted

__all__ = ["Completion", "events"]


class ClientGone(Exception):
    """The client went away."""


class Completion:
    """One request under way. Use it in an `async with`, which frees its rows in any case."""

    def __init__(self, lens: Lens, asked: Asked, recorder: Recorder | None) -> None:
        self._lens, self._asked, self._recorder = lens, asked, recorder
        self.identity = ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12)
        self.answers = Answers(lens, asked, self.identity)
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[tuple[Row, Step]] = asyncio.Queue()
        self.rows: list[Row] = []

    async def __aenter__(self) -> Completion:
        await self.begin()
        return self

    async def begin(self) -> None:
        """Ask the engine, once. Raises where its queue is full."""
        if self.rows:
            return
        wanted: Sequence[Wanted] = self._asked.wanted
        if self._recorder is not None:
            wanted = [self._recorder.watched(one) for one in wanted]
        self.rows = self._lens.engine.submit(wanted, self._told)

    async def __aexit__(self, *error: object) -> None:
        self._lens.engine.cancel([row for row in self.rows if row.reason is None])

    def _told(self, row: Row, step: Step) -> None:
        """Called by the engine's thread, and at last for every row, whoever still waits for it."""
        if step.reason is not None and self._recorder is not None and row.read:
            self._recorder.add(row, f"{self.identity}/{row.number}", self._asked)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._steps.put_nowait, (row, step))

    def give_up(self) -> None:
        """The client went away: nobody waits for the next step any more."""
        self._lens.engine.cancel([row for row in self.rows if row.reason is None])
        if self.rows:
            self._steps.put_nowait((self.rows[0], Step(error=ClientGone())))

    async def _ended(self) -> AsyncIterator[tuple[int, Row, Step]]:
        """Every step, until all rows have had their last one."""
        left = len(self.rows)
        while left:
            row, step = await self._steps.get()
            if step.error is not None:
                raise step.error
            if step.reason is not None:
                left -= 1
                if row.wanted.layers and not row.residuals:
                    await asyncio.to_thread(self._lens.read_again, row)
            yield row.number, row, step

    async def whole(self) -> dict[str, Any]:
        async for _ in self._ended():
            pass
        if not self._asked.watching.layers:
            return self.answers.whole(self.rows, [([], [])] * len(self.rows))

        def work() -> dict[str, Any]:
            found = [Records(self._lens, row, self._asked.watching).more() for row in self.rows]
            return self.answers.whole(self.rows, found)

        return await asyncio.to_thread(work)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream, without its end."""
        asked, answers = self._asked, self.answers
        watched = bool(asked.watching.layers)
        records = [Records(self._lens, row, asked.watching) for row in self.rows]
        tools = [answers.parts(index) for index in range(len(self.rows))]
        begun: set[int] = set()
        told = False
        offsets = [0] * len(self.rows)
        async for index, row, step in self._ended():
            found = await asyncio.to_thread(records[index].more) if watched else ([], [])
            head: dict[str, Any] = {}
            if not begun or (found[0] and not told):  # another engine's prompt is read at last
                head["qsl"] = answers.beginning([found[0]])
                told = bool(found[0])
            if index not in begun:
                begun.add(index)
                echo = answers.echoed(index) if asked.echo else ""
                if asked.chat or echo:
                    yield answers.chunk(index, echo, True) | head
                    head = {}
                offsets[index] = len(echo)
            more: dict[str, Any] = {}
            if step.logprobs:
                shown = [one for one in step.logprobs if one.token in step.tokens or not asked.chat]
                ids = [one.token for one in shown]
                if asked.chat:
                    more["logprobs"] = answers.chat_logprobs(shown)
                else:
                    more["logprobs"] = answers.table(ids, shown, offsets[index])
            offsets[index] += len(step.text)
            parts: list[Any] = [step.text] if step.text else []
            if (own := tools[index]) is not None:
                parts = own.add(step.text) + (own.end() if step.reason is not None else [])
            if step.reason is not None:
                called = own is not None and own.found and step.reason == "stop"
                more["finish_reason"] = "tool_calls" if called else step.reason
                more["qsl"] = answers.ending(row, found[1])
            elif watched:
                more["qsl"] = {"tokens": found[1]}
            elif not (parts or step.logprobs):
                continue  # a character, or a call, that is not complete
            *before, last = parts or [""]
            for part in before:
                yield answers.chunk(index, part) | head
                head = {}
            yield answers.chunk(index, last, **more) | head
        if asked.include_usage:
            yield answers.last(self.rows)


async def events(completion: Completion, gone: Awaitable[None]) -> AsyncIterator[bytes]:
    """A stream as server-sent events, until the client goes away. A failure is an event, too."""

    async def watch() -> None:
        await gone
        completion.give_up()

    watcher = asyncio.ensure_future(watch())
    try:
        async with completion:
            async for chunk in completion.chunks():
                yield _event(chunk)
    except ClientGone:
        return
    except Exception as error:
        yield _event(fault_of(error).content)
    finally:
        watcher.cancel()
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
