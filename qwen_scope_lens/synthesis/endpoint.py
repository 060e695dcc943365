"""A generator behind any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a paid service.

Concurrent, paced, and patient with servers: slow ones, full ones (429), broken ones (5xx, cut
connections, answers that are no JSON or empty). The key is read from an environment variable when a
request is sent; it is written nowhere, and taken out of any message of the server that repeats it.
What is asked is decided elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from qwen_scope_lens.errors import GeneratorFailed
from qwen_scope_lens.synthesis.generator import Book, Completion, Request, digest

__all__ = ["KEY_VARIABLE", "Endpoint"]

KEY_VARIABLE = "OPENAI_API_KEY"

MOST_BYTES = 16 * 2**20
"""The largest answer that is read."""

CHARACTERS_PER_TOKEN = 4
"""For servers that do not count; marked as an estimate in the ledger."""

FATAL = {401: "the key is refused", 403: "access is refused", 404: "no such address or model"}
PASSING = {408, 409, 425, 429}  # and every 5xx


@dataclass
class Endpoint:
    """`POST {base_url}/chat/completions`, or `/completions` for raw requests."""

    base_url: str
    model: str
    key_variable: str = KEY_VARIABLE
    concurrency: int = 8
    timeout: float = 120.0  # seconds for one answer, from sending to its last byte
    tries: int = 6
    charged_tries: int = 3  # of those, how many may be answers that are no use but may be charged
    backoff: float = 1.0  # seconds before the second try, doubled each time, with jitter
    max_backoff: float = 60.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    failures_in_a_row: int = 10  # requests given up one after the other before all is given up
    body: Mapping[str, Any] = field(default_factory=dict)  # further fields of every request

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise GeneratorFailed(
                f"{_bare(self.base_url)!r} is no address of an endpoint: expected something like"
                " http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise GeneratorFailed(
                f"the address of {parts.hostname} has a password or a query in it: put the key"
                f" into the environment variable {self.key_variable} instead, and leave it out"
            )
        self.base_url = self.base_url.rstrip("/")
        self._answered = False
        self._failed_in_a_row = 0
        self._next_start = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def name(self) -> str:
        return f"openai:{self.model}"

    def generate(self, requests: Sequence[Request], book: Book) -> None:
        self._stop.clear()
        limits = httpx.Limits(max_connections=self.concurrency)
        timeout = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        with httpx.Client(limits=limits, timeout=timeout, follow_redirects=False) as client:
            pool = ThreadPoolExecutor(self.concurrency)
            try:
                jobs = [
                    pool.submit(self._answer, client, request, number, book)
                    for number, request in enumerate(requests)
                ]
                for job in jobs:
                    job.result()
            finally:
                # Calls in flight are paid for: wait for them, also after Ctrl-C.
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, client: httpx.Client, request: Request, number: int, book: Book) -> None:
        """One request to its end: answered, given up, or not started."""
        started = time.monotonic()
        what, charged = "", 0
        for trial in range(self.tries):
            self._pace()
            if self._stop.is_set() or not book.start(number):
                return
            try:
                completion = self._send(client, request)
            except _Trouble as trouble:
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
                self._pause(trouble.wait, trial, everyone=trouble.wait is not None)
                continue
            with self._lock:
                self._answered, self._failed_in_a_row = True, 0
                if self.tokens_per_minute:
                    used = completion.prompt_tokens + completion.completion_tokens
                    start = max(self._next_start, time.monotonic())
                    self._next_start = start + 60 * used / self.tokens_per_minute
            seconds = round(time.monotonic() - started, 3)
            book.finish(number, Completion(**{**vars(completion), "seconds": seconds}))
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

    def _send(self, client: httpx.Client, request: Request) -> Completion:
        path, body = self._body(request)
        headers = {"Idempotency-Key": digest(self.name, request)}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            url = f"{self.base_url}/{path}"
            with client.stream("POST", url, json=body, headers=headers) as response:
                content = self._read(response)
        except httpx.TimeoutException as error:
            unreachable = isinstance(error, (httpx.ConnectTimeout, httpx.PoolTimeout))
            raise _Trouble("no answer in time", not unreachable, unreachable=unreachable) from None
        except httpx.ConnectError:
            raise _Trouble("no connection", False, unreachable=True) from None
        except httpx.HTTPError as error:
            raise _Trouble(f"connection cut ({type(error).__name__})", True) from None
        if response.status_code != 200:
            raise self._refused(response, content, key)
        return self._parse(content, request, key)

    def _body(self, request: Request) -> tuple[str, dict[str, Any]]:
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
        if not key.isascii() or any(character.isspace() for character in key):
            raise GeneratorFailed(
                f"the environment variable {self.key_variable} holds spaces or characters that no"
                " key has: set it again"
            )
        return key

    def _read(self, response: httpx.Response) -> bytes:
        """The whole answer, within `timeout` also when it comes byte by byte."""
        end = time.monotonic() + self.timeout
        content = b""
        for chunk in response.iter_bytes():
            content += chunk
            if time.monotonic() > end:
                raise _Trouble("no answer in time", True)
            if len(content) > MOST_BYTES:
                raise _Trouble(f"an answer of more than {MOST_BYTES:,} bytes", True, final=True)
        return content

    def _refused(self, response: httpx.Response, content: bytes, key: str) -> _Trouble:
        status = response.status_code
        said = _clean(content.decode("utf-8", "replace"), key)[:200]
        what = f"HTTP {status}"
        if status == 429 and "insufficient_quota" in said:
            return _Trouble(what, False, fatal=True, advice=f"The account is empty: {said}")
        if status in PASSING or status >= 500:
            return _Trouble(what, False, wait=_retry_after(response.headers))
        if 300 <= status < 400:
            where = _bare(response.headers.get("location", ""))
            advice = f"It wants to redirect to {where!r}: give the final address"
            return _Trouble(what, False, fatal=True, advice=advice)
        if status in FATAL:
            advice = (
                f"That means {FATAL[status]}. The key comes from {self.key_variable}, the model is"
                f" {self.model!r}. The server says: {said}"
            )
            return _Trouble(what, False, fatal=True, advice=advice)
        return _Trouble(f"{what}: {said}", False, final=True)

    def _parse(self, content: bytes, request: Request, key: str) -> Completion:
        try:
            answer = json.loads(content.decode("utf-8", "replace"))
            if isinstance(answer.get("error"), Mapping):
                said = _clean(str(answer["error"].get("message", "")), key)[:200]
                raise _Trouble(f"an error in the answer: {said}", False)
            choice = answer["choices"][0]
            found = choice["text"] if request.raw else choice["message"].get("content")
        except IndexError:
            raise _Trouble("no choices in the answer", True) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _Trouble("an answer that is not of the API", True) from None
        if isinstance(found, list):  # content in parts
            found = "".join(str(part.get("text", "")) for part in found if isinstance(part, dict))
        text = _clean(found if isinstance(found, str) else "", key)
        usage = answer.get("usage")
        counted = usage if isinstance(usage, dict) else {}
        prompt, completion = counted.get("prompt_tokens"), counted.get("completion_tokens")
        if known := isinstance(prompt, int) and isinstance(completion, int):
            tokens = max(0, prompt), max(0, completion)
        else:
            tokens = _estimate(request.text), _estimate(text)
        finish = str(choice.get("finish_reason") or "")
        return Completion(text, finish, *tokens, estimated=not known)

    def _pace(self) -> None:
        """Wait for this call's turn."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            if self.requests_per_minute:
                self._next_start = start + 60 / self.requests_per_minute
        self._stop.wait(max(0.0, start - now))

    def _pause(self, wait: float | None, trial: int, everyone: bool) -> None:
        """Before the next try: as long as the server says, else longer each time, with jitter."""
        if wait is None:
            wait = min(self.max_backoff, self.backoff * 2**trial) * random.uniform(0.5, 1.0)
        wait = min(wait, 10 * self.max_backoff)
        if everyone:  # the server is full: nobody else need try
            with self._lock:
                self._next_start = max(self._next_start, time.monotonic() + wait)
        self._stop.wait(wait)


class _Trouble(Exception):
    """A try that gave no usable answer."""

    def __init__(
        self,
        what: str,
        maybe_charged: bool,
        *,
        wait: float | None = None,
        final: bool = False,  # this request will not succeed
        fatal: bool = False,  # no request will
        unreachable: bool = False,
        advice: str = "",
    ) -> None:
        super().__init__(what)
        self.what, self.maybe_charged, self.wait = what, maybe_charged, wait
        self.final, self.fatal, self.unreachable, self.advice = final, fatal, unreachable, advice


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from either form of the header."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _clean(text: str, key: str) -> str:
    """Without the key, and without halves of characters, which no file can hold."""
    text = text.replace(key, "[key]") if key else text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _estimate(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def _bare(url: str) -> str:
    """An address without the places where a key may stand."""
    return url.rpartition("@")[2].partition("?")[0]
