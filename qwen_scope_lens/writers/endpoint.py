"""A generator behind any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a paid service.

Calls run concurrently and within limits per minute. They are tried again when the server is slow,
full (429) or broken (5xx, a cut connection, an answer that is empty or not JSON). The key is read
from an environment variable when requests are sent; it is never written anywhere, and whatever the
server says is masked before it is kept, printed or logged (`masking.py`). `transport.py` does one
exchange, and `answers.py` knows what an answer means.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import httpx2

from qwen_scope_lens.errors import BadPlan, GeneratorFailed
from qwen_scope_lens.writers.answers import completion_of, refusal_of
from qwen_scope_lens.writers.generator import Book, Completion, Request, digest
from qwen_scope_lens.writers.masking import Mask, bare
from qwen_scope_lens.writers.transport import Transport, Trouble

__all__ = ["KEY_VARIABLE", "Endpoint"]

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass
class Endpoint:
    """`POST {base_url}/chat/completions`, or `/completions` for raw requests."""

    base_url: str
    model: str
    key_variable: str = KEY_VARIABLE
    concurrency: int = 8
    timeout: float = 120.0  # seconds for one try: name, connection, headers and the last byte
    tries: int = 6
    charged_tries: int = 3  # the most tries that may be charged without a usable answer
    backoff: float = 1.0  # seconds before the second try; doubled each time, with jitter
    max_backoff: float = 60.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    failures_in_a_row: int = 10  # so many failed requests in a row end the run
    body: Mapping[str, Any] = field(default_factory=dict)  # further fields of every request

    def __post_init__(self) -> None:
        self._check_numbers()
        try:
            parts = urlsplit(self.base_url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            httpx2.URL(self.base_url)
        except (ValueError, httpx2.InvalidURL):
            good = False
        if not good:
            raise GeneratorFailed(
                f"{bare(self.base_url)!r} is not the address of an endpoint: expected something"
                " like http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise GeneratorFailed(
                f"the address of {parts.hostname} holds a password or a query: leave it out, and"
                f" put the key into the environment variable {self.key_variable}"
            )
        self.base_url = self.base_url.rstrip("/")
        self._answered = False
        self._failed_in_a_row = 0
        self._next_start = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def _check_numbers(self) -> None:
        for name in ("concurrency", "tries", "charged_tries", "failures_in_a_row"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise BadPlan(f"{name} is {value!r}: expected a whole number from 1")
        for name in ("timeout", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BadPlan(f"{name} is {value!r}: expected a number above zero")
        for name in ("backoff", "max_backoff"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise BadPlan(f"{name} is {value!r}: expected seconds, zero or more")
        try:
            json.dumps(dict(self.body), allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise BadPlan(
                f"the further fields of every request cannot be written as JSON ({error}): expected"
                " numbers, texts, lists and objects"
            ) from error

    @property
    def name(self) -> str:
        return f"openai:{self.model}"

    @property
    def server(self) -> str:
        """Host and port, for the ledger."""
        return urlsplit(self.base_url).netloc

    def generate(self, requests: Sequence[Request], book: Book) -> None:
        self._stop.clear()
        key = self._key()
        mask = Mask(key)
        with mask.logs(), Transport(self.concurrency, self.timeout) as transport:
            exchange = _Exchange(transport, key, mask)
            pool = ThreadPoolExecutor(self.concurrency)
            try:
                jobs = [
                    pool.submit(self._answer, exchange, request, number, _Masked(book, mask))
                    for number, request in enumerate(requests)
                ]
                for job in jobs:
                    job.result()
            except GeneratorFailed as error:
                raise GeneratorFailed(mask(str(error))) from None
            finally:
                # Calls in flight are paid for: wait for them, also after Ctrl-C.
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, exchange: _Exchange, request: Request, number: int, book: Book) -> None:
        """Carry one request to its end: answered, given up, or not started."""
        started = time.monotonic()
        what, charged = "", 0
        for trial in range(self.tries):
            self.keep_pace()
            if self._stop.is_set() or not book.start(number):
                return
            try:
                completion = self._send(exchange, request)
            except Trouble as trouble:
                what = trouble.what
                book.trouble(number, what, trouble.maybe_charged)
                if trouble.fatal:
                    self._stop.set()
                    raise GeneratorFailed(
                        f"{self.base_url} answered {what}. {trouble.advice}"
                    ) from None
                charged += trouble.maybe_charged
                unreachable = trouble.unreachable and not self._answered and trial > 0
                if trouble.final or unreachable or charged >= self.charged_tries:
                    break
                self.pause(trouble.wait, trial, everyone=trouble.wait is not None)
                continue
            with self._lock:
                self._answered, self._failed_in_a_row = True, 0
                if self.tokens_per_minute:
                    used = completion.prompt_tokens + completion.completion_tokens
                    start = max(self._next_start, time.monotonic())
                    self._next_start = start + 60 * used / self.tokens_per_minute
            seconds = round(time.monotonic() - started, 3)
            book.finish(number, replace(completion, seconds=seconds))
            return
        with self._lock:
            self._failed_in_a_row += 1
            too_many = self._failed_in_a_row >= self.failures_in_a_row
        book.finish(number, Completion(error=what))
        if too_many:
            self._stop.set()
            raise GeneratorFailed(
                f"{self.base_url}: {self.failures_in_a_row} requests in a row failed, the last with"
                f" {what}. What was answered is kept: see that the server runs and knows"
                f" {self.model!r}, then run the same command again"
            )

    def _send(self, exchange: _Exchange, request: Request) -> Completion:
        path, body = self._asked(request)
        headers = {
            "Idempotency-Key": digest(self.name, request),
            "Content-Type": "application/json",
        }
        if exchange.key:
            headers["Authorization"] = f"Bearer {exchange.key}"
        # UTF-8 has no lone surrogates: in a prompt they become question marks.
        content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        answer = exchange.transport.post(f"{self.base_url}/{path}", content, headers)
        if answer.status != 200:
            raise refusal_of(answer, exchange.mask, self.key_variable, self.model)
        return self._read(answer.content, request, exchange.mask)

    def _read(self, content: bytes, request: Request, mask: Mask) -> Completion:
        return completion_of(content, request, mask)

    def _asked(self, request: Request) -> tuple[str, dict[str, Any]]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": request.seed,
            **self.body,
        }
        if request.raw:
            return "completions", body | {"prompt": request.text}
        messages = [{"role": role, "content": content} for role, content in request.messages]
        return "chat/completions", body | {"messages": messages}

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise GeneratorFailed(
                f"the environment variable {self.key_variable} holds spaces or characters that"
                " cannot be in a key: set it again"
            )
        return key

    def keep_pace(self) -> None:
        """Wait until this call may start."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            if self.requests_per_minute:
                self._next_start = start + 60 / self.requests_per_minute
        self._stop.wait(min(max(0.0, start - now), threading.TIMEOUT_MAX))

    def pause(self, wait: float | None, trial: int, everyone: bool) -> None:
        """Wait before the next try: as the server says, else longer each time, with jitter."""
        if wait is None:
            grown = self.backoff * 2.0 ** min(trial, 60)
            wait = min(self.max_backoff, grown) * random.uniform(0.5, 1.0)
        wait = min(wait, 10 * self.max_backoff, threading.TIMEOUT_MAX)
        if everyone:  # the server is full: no other call may start before
            with self._lock:
                self._next_start = max(self._next_start, time.monotonic() + wait)
        self._stop.wait(wait)


@dataclass(frozen=True)
class _Exchange:
    """What all calls of one `generate` share."""

    transport: Transport
    key: str = field(repr=False)
    mask: Mask


class _Masked:
    """The only way from the endpoint to its book. It masks the key in everything."""

    def __init__(self, book: Book, mask: Mask) -> None:
        self._book, self._mask = book, mask

    def start(self, number: int) -> bool:
        return self._book.start(number)

    def finish(self, number: int, completion: Completion) -> None:
        texts: dict[str, Any] = {
            name: self._mask(v) for name, v in vars(completion).items() if type(v) is str
        }
        self._book.finish(number, replace(completion, **texts))

    def trouble(self, number: int, what: str, maybe_charged: bool) -> None:
        self._book.trouble(number, self._mask(what), maybe_charged)
