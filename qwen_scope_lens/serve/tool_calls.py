"""Tool calls in a reply's text, taken out of it as it grows.

Qwen writes `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and its coder models and
Qwen3.5 `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`. What is
neither stays text, and so does what the model only thinks of between `<think>` and `</think>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ToolCalls"]

Json = dict[str, Any]

OPEN, CLOSE, THINK, THOUGHT = "<tool_call>", "</tool_call>", "<think>", "</think>"
FUNCTION, PARAMETER = (re.compile(rf"\s*<{what}=([^>\s]+)>") for what in ("function", "parameter"))
FUNCTION_END, PARAMETER_END = "</function>", "</parameter>"


class ToolCalls:
    """The parts of one reply, in their order: texts, and calls as OpenAI writes them in streams."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], identity: str, thinking: bool) -> None:
        self._tools, self._identity, self._thinking = tools, identity, thinking
        self._held = self._gap = ""  # text that is not decided, and white space before a call
        self._calling = False
        self._looked = 0  # characters of what is held in which no mark begins
        self.found = 0

    def add(self, more: str) -> list[str | Json]:
        """What has become certain with some more text."""
        self._held += more
        parts: list[str | Json] = []
        while self._step(parts):
            pass
        return _joined(parts)

    def end(self) -> list[str | Json]:
        """The rest: a call that was begun and not ended is text."""
        rest = (OPEN if self._calling else "") + self._held
        gap = self._gap if rest or not self.found else ""
        self._held = self._gap = ""
        return _joined([gap + rest])

    def _step(self, parts: list[str | Json]) -> bool:
        """Go on to the next mark. Whether there was one."""
        marks = [CLOSE] if self._calling else [THOUGHT] if self._thinking else [OPEN, THINK]
        begin, self._looked = self._looked, 0
        places = [(at, mark) for mark in marks if (at := self._held.find(mark, begin)) >= 0]
        if not places:
            if self._calling:
                self._looked = max(0, len(self._held) - len(CLOSE) + 1)
            else:
                certain = len(self._held) - _begun(self._held, marks)
                self._say(parts, self._held[:certain])
                self._held = self._held[certain:]
            return False
        at, mark = min(places)
        before, self._held = self._held[:at], self._held[at + len(mark) :]
        if mark == CLOSE:
            self._calling = False
            call = self._call(before)
            if call is None:
                self._say(parts, f"{OPEN}{before}{CLOSE}")
            else:
                self._gap = ""
                parts.append(call)
        elif mark == OPEN:
            self._say(parts, before)
            self._calling = True
        else:
            self._say(parts, before + mark)
            self._thinking = mark == THINK
        return True

    def _say(self, parts: list[str | Json], text: str) -> None:
        """Text, without the white space at its end, which goes where a call follows."""
        text = self._gap + text
        shown = text.rstrip()
        self._gap = text[len(shown) :]
        parts.append(shown)

    def _call(self, text: str) -> Json | None:
        read = _as_json(text) or _as_functions(text, self._tools)
        if read is None:
            return None
        name, arguments = read
        index, self.found = self.found, self.found + 1
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        identity = f"call_{self._identity}_{index}"
        return {"index": index, "id": identity, "type": "function", "function": function}


def _as_json(text: str) -> tuple[str, Json] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = call.get("name") if isinstance(call, dict) else None
    arguments = call.get("arguments", {}) if isinstance(call, dict) else None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return name, arguments


def _as_functions(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, Json] | None:
    begun, text = FUNCTION.match(text), text.rstrip()
    if begun is None or not text.endswith(FUNCTION_END):
        return None
    kinds, at = _kinds(begun[1], tools), begun.end()
    last = len(text) - len(FUNCTION_END)
    arguments: Json = {}
    while (parameter := PARAMETER.match(text, at, last)) is not None:
        end = text.find(PARAMETER_END, parameter.end(), last)
        if end < 0:
            return None
        key, value = parameter[1], _inside(text[parameter.end() : end])
        arguments[key] = _value(value, kinds.get(key))
        at = end + len(PARAMETER_END)
    return None if text[at:last].strip() else (begun[1], arguments)


def _kinds(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The schemas of a tool's parameters, by name."""
    for tool in tools:
        function = tool["function"]
        if function.get("name") == name:
            parameters = function.get("parameters")
            known = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return known if isinstance(known, Mapping) else {}
    return {}


def _inside(value: str) -> str:
    """The text between two tags that stand on lines of their own."""
    return value.removeprefix("\n").removesuffix("\n")


def _value(text: str, schema: Any) -> Any:
    """A parameter as its schema wants it: a text stays as it is, and so does what is not JSON."""
    kind = schema.get("type") if isinstance(schema, Mapping) else "string"
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _begun(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a mark."""
    for size in range(min(max(map(len, marks)) - 1, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


def _joined(parts: Sequence[str | Json]) -> list[str | Json]:
    """Neighbouring texts as one, and no empty ones."""
    found: list[str | Json] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, str) and isinstance(last, str):
            found[-1] = last + part
        elif part:
            found.append(part)
    return found
