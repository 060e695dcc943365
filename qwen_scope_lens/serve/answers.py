"""Answers of the completion endpoints as OpenAI writes them, with the `qsl` objects beside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from qwen_scope_lens.serve.asking import Asked
from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.rows import Row
from qwen_scope_lens.serve.sampling import Logprob
from qwen_scope_lens.serve.text import Characters
from qwen_scope_lens.serve.tool_calls import ToolCalls
from qwen_scope_lens.steering.report import Report

__all__ = ["Answers", "told"]

Json = dict[str, Any]


def told(report: Report) -> list[Json]:
    """What each edit of a plan did."""
    return [
        {
            "edit": str(one.edit),
            "selected": one.selected,
            "fired": one.fired,
            "moved": one.moved,
            "share": one.share,
        }
        for one in report.edits
    ]


def without_index(call: Json) -> Json:
    """A tool call as it stands in a message; only streams number them."""
    return {key: value for key, value in call.items() if key != "index"}


class Answers:
    """Writes the answer to one request, whole or in chunks."""

    def __init__(self, lens: Lens, asked: Asked, identity: str) -> None:
        self._lens, self._asked = lens, asked
        kind = "chat.completion" if asked.chat else "text_completion"
        self._head: Json = {
            "id": identity,
            "object": kind,
            "created": int(time.time()),
            "model": asked.model,
        }
        self._chunk = {**self._head, "object": kind + (".chunk" if asked.chat else "")}

    # Whole.

    def whole(self, rows: Sequence[Row], records: Sequence[tuple[list[Json], list[Json]]]) -> Json:
        choices = []
        for index, (row, (_, tokens)) in enumerate(zip(rows, records, strict=True)):
            text, reason = row.text.text, row.reason
            choice: Json = {"index": index, "finish_reason": reason, "logprobs": None}
            if self._asked.chat:
                message: Json = {"role": "assistant", "content": text}
                if (tools := self.parts(index)) is not None:
                    found = [*tools.add(text), *tools.end()]
                    calls = [part for part in found if not isinstance(part, str)]
                    texts = "".join(part for part in found if isinstance(part, str))
                    message["content"] = texts or (None if calls else "")
                    if calls:
                        message["tool_calls"] = [without_index(call) for call in calls]
                        choice["finish_reason"] = "tool_calls" if reason == "stop" else reason
                choice["message"] = message
                if row.wanted.top_logprobs is not None:
                    choice["logprobs"] = self.chat_logprobs(row.logprobs[: len(row.tokens)])
            else:
                head = self.echoed(index) if self._asked.echo else ""
                choice["text"] = head + text
                if row.wanted.top_logprobs is not None:
                    choice["logprobs"] = self.text_logprobs(row)
            choice["qsl"] = self.ending(row, tokens)
            choices.append(choice)
        return {
            **self._head,
            "choices": choices,
            "usage": self.usage(rows),
            "qsl": self.beginning([prompt for prompt, _ in records]),
        }

    def echoed(self, index: int) -> str:
        n = len(self._asked.wanted) // len(self._asked.prompts)
        given = self._asked.prompts[index // n]
        ids = self._asked.wanted[index].prompt
        return self._lens.tokenizer.decode(ids) if given is None else given

    # In chunks.

    def chunk(self, index: int, part: str | Json, first: bool = False, **more: Any) -> Json:
        """One chunk of a choice: some text, or a tool call with its number."""
        text = part if isinstance(part, str) else ""
        choice: Json = {"index": index, "logprobs": None, "finish_reason": None, **more}
        if self._asked.chat:
            delta: Json = {"role": "assistant"} if first else {}
            choice["delta"] = delta | ({"content": text} if text or first else {})
            if not isinstance(part, str):
                choice["delta"]["tool_calls"] = [part]
        else:
            choice["text"] = text
        return {**self._chunk, "choices": [choice]}

    def last(self, rows: Sequence[Row]) -> Json:
        return {**self._chunk, "choices": [], "usage": self.usage(rows)}

    # Parts of both.

    def beginning(self, prompts: Sequence[list[Json]]) -> Json:
        """The `qsl` object of the whole answer: the plan, and the records of the prompt."""
        asked = self._asked
        n = len(asked.wanted) // len(asked.prompts)
        records: Any = None
        if asked.watching.layers:
            records = (prompts[0] or None) if len(asked.prompts) == 1 else list(prompts[::n])
        return {
            "plan": None if asked.plan is None else asked.plan.to_dict(),
            "plan_name": asked.plan_name,
            "prompt": records,
        }

    def ending(self, row: Row, tokens: list[Json]) -> Json:
        """The `qsl` object of a finished choice."""
        report = row.report
        return {
            "token_ids": list(row.tokens),
            "seed": row.wanted.seed,
            "tokens": tokens if self._asked.watching.layers else None,
            "plan": None if report is None else told(report),
            "fired": None if report is None else report.fired,
        }

    def usage(self, rows: Sequence[Row]) -> Json:
        each = max(1, len(self._asked.wanted) // len(self._asked.prompts))
        prompt = sum(len(row.wanted.prompt) for row in rows[::each])
        new = sum(len(row.tokens) for row in rows)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(row.cached for row in rows[::each])},
        }

    def parts(self, index: int) -> ToolCalls | None:
        """What takes the tool calls out of a choice; None where there are no tools."""
        if not self._asked.tools:
            return None
        prompt = self._asked.prompts[index // (len(self._asked.wanted) // len(self._asked.prompts))]
        thinking = (prompt or "").rstrip().endswith("<think>")
        return ToolCalls(self._asked.tools, f"{self._head['id'][-12:]}_{index}", thinking)

    def chat_logprobs(self, found: Sequence[Logprob]) -> Json:
        def entry(token: int, value: float) -> Json:
            raw = self._lens.vocabulary.bytes_of(token) or b""
            return {
                "token": self._lens.vocabulary.text(token),
                "logprob": value,
                "bytes": list(raw),
            }

        return {
            "content": [
                {**entry(one.token, one.value), "top_logprobs": [entry(*pair) for pair in one.top]}
                for one in found
            ],
            "refusal": None,
        }

    def text_logprobs(self, row: Row) -> Json:
        """Of the prompt, too, where it is echoed; of the end token, too."""
        found: list[Logprob | None] = list(row.prompt_logprobs or [])
        ids = list(row.wanted.prompt) if found else []
        found += row.logprobs
        ids += [one.token for one in row.logprobs]
        return self.table(ids, found, 0)

    def table(self, ids: Sequence[int], found: Sequence[Logprob | None], offset: int) -> Json:
        characters, offsets = Characters(self._lens.vocabulary), []
        for token in ids:
            offsets.append(offset)
            offset += len(characters.add(token))
        words = self._lens.vocabulary.text
        return {
            "tokens": [words(token) for token in ids],
            "token_logprobs": [None if one is None else one.value for one in found],
            "top_logprobs": [
                None if one is None else {words(token): value for token, value in one.top}
                for one in found
            ],
            "text_offset": offsets,
        }
