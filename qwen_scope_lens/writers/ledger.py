"""The ledger: every paid call and every measurement, so that nothing is paid or measured twice.

A synthesis run is a function of its settings and of the answers that it got. The ledger keeps the
answers, each as a line of JSON that is on disk before the answer is used. A run that was killed can
therefore be started again: it finds its answers and continues where it ended. Calls that were in
flight when the process died may have been charged; they are counted and sent again. Keys and
headers of requests are never written here. A generator is known by its model's name, because one
server has many addresses over time; a warning says where answers of another server are used again.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from qwen_scope_lens.errors import BadFile, BadPlan, CannotWrite
from qwen_scope_lens.files import exclusive, open_own
from qwen_scope_lens.writers.generator import Completion, Generator, Request, digest
from qwen_scope_lens.writers.masking import whole_characters

__all__ = ["Ledger", "Prices", "Spent"]


@dataclass(frozen=True)
class Prices:
    """Prices per million tokens, in the currency of the bill, and the limits of spending.

    Without prices every call costs 0.
    """

    prompt: float = 0.0
    completion: float = 0.0
    max_cost: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise BadPlan(f"{name} is {value!r}: expected a finite number, zero or more")

    def cost(self, completion: Completion) -> float:
        prompt = self.prompt * completion.prompt_tokens
        return (prompt + self.completion * completion.completion_tokens) / 1e6


@dataclass
class Spent:
    """Sums over the whole life of a ledger."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    estimated: int = 0  # calls whose tokens the server did not count
    reused: int = 0  # answers of this run that the ledger had already
    troubles: Counter[str] = field(default_factory=Counter)
    maybe_charged: int = 0  # tries without a usable answer that the server may have charged
    calls_by_purpose: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        lines = [
            f"{self.calls} calls, {self.prompt_tokens:,} prompt and {self.completion_tokens:,}"
            f" completion tokens, cost {self.cost:.4f}"
            + (f" ({self.estimated} calls estimated)" if self.estimated else "")
        ]
        if self.reused:
            lines.append(f"{self.reused} answers were in the ledger already and cost nothing again")
        if self.troubles:
            what = ", ".join(f"{n} x {name}" for name, n in self.troubles.most_common())
            lines.append(f"tries that failed: {what}")
        if self.maybe_charged:
            lines.append(f"{self.maybe_charged} tries without an answer may have been charged")
        return "\n".join(lines)


class Ledger:
    """An append-only file in its own folder, which one process at a time can hold."""

    def __init__(self, path: Path, prices: Prices, file: IO[bytes]) -> None:
        self.path, self.prices, self.spent = path, prices, Spent()
        self._file, self._lock = file, threading.Lock()
        self._answers: dict[str, Completion] = {}
        self._measured: dict[str, Any] = {}
        self._servers: dict[str, str] = {}  # of the answers; those of older ledgers have none
        self._told: set[str] = set()
        open_calls: set[str] = set()
        for row in _rows(path):
            self._take(row, open_calls)
        self.spent.maybe_charged += len(open_calls)

    @classmethod
    @contextmanager
    def open(cls, folder: Path, prices: Prices | None = None) -> Iterator[Ledger]:
        path = folder / "ledger.jsonl"
        with exclusive(folder):
            try:
                _mend_end(path)
                file = open_own(path, "ab", buffering=0)  # what fails is not written later
            except OSError as error:
                raise CannotWrite(f"cannot write {path}: {error.strerror}") from error
            with file:
                yield cls(path, prices or Prices(), file)

    def ask(self, generator: Generator, requests: Sequence[Request]) -> list[Completion | None]:
        """The answers in order: from the ledger where it has them, else from the generator.

        None stands for a request that was not sent because of the spending limit.
        """
        keys = [digest(generator.name, request) for request in requests]
        new = [i for i, key in enumerate(keys) if key not in self._answers]
        new = list({keys[i]: i for i in reversed(new)}.values())[::-1]  # each question once
        self.spent.reused += len(requests) - len(new)
        self._tell_servers(generator, keys)
        failed: dict[str, Completion] = {}
        if new:
            book = _Book(self, generator, [keys[i] for i in new], [requests[i] for i in new])
            generator.generate([requests[i] for i in new], book)
            failed = book.failed
        return [self._answers.get(key) or failed.get(key) for key in keys]

    def _tell_servers(self, generator: Generator, keys: Sequence[str]) -> None:
        """Warn where answers of another server with the same model name are used again."""
        here = _server(generator)
        found = Counter(self._servers[key] for key in dict.fromkeys(keys) if key in self._servers)
        for server, count in found.items():
            if server != here and server not in self._told:
                self._told.add(server)
                warnings.warn(
                    f"{count} answers of {generator.name} in {self.path} came from {server}, and"
                    f" this run names {here}: they are used again. If another model answers there,"
                    " name it differently (#NAME), or begin with another ledger",
                    stacklevel=3,
                )

    def unanswered(self, generator: str, requests: Sequence[Request]) -> list[Request]:
        """Those whose answers are not here yet, each once: what `ask` would send."""
        found = {digest(generator, request): request for request in requests}
        return [request for key, request in found.items() if key not in self._answers]

    def measured(self, key: str) -> Any | None:
        """What was measured under a key, or None."""
        return self._measured.get(key)

    def measure(self, rows: Mapping[str, Any]) -> None:
        """Keep measurements, because computing time costs, too."""
        with self._lock:
            self._write(
                [{"event": "measure", "key": key, "value": value} for key, value in rows.items()]
            )
            self._measured.update(rows)

    @property
    def limit_reached(self) -> str:
        """Why no further call may start; empty while calls may."""
        prices, spent = self.prices, self.spent
        if prices.max_cost is not None and spent.cost >= prices.max_cost:
            return f"the cost limit of {prices.max_cost} is reached"
        if prices.max_tokens is not None and spent.tokens >= prices.max_tokens:
            return f"the limit of {prices.max_tokens:,} tokens is reached"
        return ""

    def _record(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._write([row])
            self._take(row, set())

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write all rows to disk, or none of them and raise."""
        content = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # the next line must not follow half of this one
                os.ftruncate(self._file.fileno(), end)
            raise CannotWrite(
                f"cannot write {self.path}: {error.strerror}. No further call is made, because its"
                " answer could not be kept: free some space and run the same command again"
            ) from error

    def _take(self, row: dict[str, Any], open_calls: set[str]) -> None:
        event, key = row["event"], row["key"]
        if event == "start":
            self.spent.maybe_charged += key in open_calls  # in flight when a process died
            open_calls.add(key)
        elif event == "answer":
            open_calls.discard(key)
            names = Completion.__dataclass_fields__
            completion = Completion(**{k: v for k, v in row.items() if k in names})
            self._answers[key] = completion
            if server := row.get("server"):
                self._servers[key] = server
            self.spent.calls += 1
            self.spent.calls_by_purpose[row["purpose"]] += 1
            self.spent.prompt_tokens += completion.prompt_tokens
            self.spent.completion_tokens += completion.completion_tokens
            self.spent.cost += row["cost"]
            self.spent.estimated += completion.estimated
        elif event == "trouble":
            open_calls.discard(key)
            self.spent.troubles[row["what"]] += 1
            self.spent.maybe_charged += row["maybe_charged"]
        elif event == "measure":
            self._measured[key] = row["value"]


class _Book:
    """Reports the calls of one `ask` to the ledger."""

    def __init__(
        self, ledger: Ledger, generator: Generator, keys: list[str], requests: list[Request]
    ) -> None:
        self.failed: dict[str, Completion] = {}
        self._ledger, self._generator, self._keys, self._requests = (
            ledger,
            generator,
            keys,
            requests,
        )

    def start(self, number: int) -> bool:
        if self._ledger.limit_reached:
            return False
        self._ledger._record({"event": "start", "key": self._keys[number], "at": time.time()})
        return True

    def finish(self, number: int, completion: Completion) -> None:
        key = self._keys[number]
        texts: dict[str, Any] = {
            k: whole_characters(v) for k, v in vars(completion).items() if type(v) is str
        }
        completion = replace(completion, **texts)  # of any generator
        if completion.error:  # asked again by the next run
            self.failed[key] = completion
            return
        head: dict[str, Any] = {
            "event": "answer",
            "key": key,
            "generator": self._generator.name,
            "purpose": self._requests[number].purpose,
            "cost": self._ledger.prices.cost(completion),
        }
        if server := _server(self._generator):
            head["server"] = server
        self._ledger._record(head | asdict(completion))

    def trouble(self, number: int, what: str, maybe_charged: bool) -> None:
        row = {"event": "trouble", "key": self._keys[number], "what": what}
        self._ledger._record(row | {"maybe_charged": maybe_charged})


def _server(generator: Generator) -> str:
    """Host and port of the server that answers; empty for a model in memory."""
    return str(getattr(generator, "server", ""))


_NUMBER = (int, float)
MOST = 2**63
"""A line with a number of this size or more is damaged. A larger one may not fit into a float."""
_FIELDS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "start": {},
    "answer": {
        "purpose": str,
        "cost": _NUMBER,
        "text": str,
        "finish": str,
        "prompt_tokens": int,
        "completion_tokens": int,
        "estimated": bool,
        "seconds": _NUMBER,
        "error": str,
    },
    "trouble": {"what": str, "maybe_charged": bool},
    "measure": {"value": object},
}
"""The fields that a line of each event needs besides its key."""


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if wrong := _wrong(line):
                raise BadFile(
                    f"{path}, line {number} is damaged ({wrong}). It may hold an answer that was"
                    " paid for: repair or delete that line, then run the same command again"
                )
            yield json.loads(line)


def _wrong(line: bytes) -> str:
    """What is wrong with a line; empty where nothing is."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error!s:.80}"
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        return "expected an object with a key"
    if not isinstance(row.get("event"), str) or row["event"] not in _FIELDS:
        return f"unknown event {row.get('event')!r:.40}"
    if not isinstance(row.get("server", ""), str):  # rows of older ledgers have none
        return f"server is {row['server']!r:.40}"
    for name, kind in _FIELDS[row["event"]].items():
        value = row.get(name)
        if name not in row or not isinstance(value, kind):
            return f"{name} is {value!r:.40}"
        if isinstance(value, _NUMBER) and not -MOST < value < MOST:  # NaN, too
            return f"{name} is a number that cannot be summed up"
    return ""


def _mend_end(path: Path) -> None:
    """Mend a last line that a killed process did not finish: remove it, or add the line break where
    only that is missing."""
    if not path.exists():
        return
    with open_own(path, "r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            end = content.rfind(b"\n") + 1
            if _wrong(content[end:]):
                file.truncate(end)
            else:
                file.write(b"\n")
