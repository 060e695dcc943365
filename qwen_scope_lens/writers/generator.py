"""The interface of all text generators: requests in, completions out.

An endpoint over HTTP (`endpoint.py`) and a model in memory, steered or not (`local.py`), implement
`Generator`. A generator reports each call to a `Book` (`ledger.py`) at once, so that no paid answer
is lost when the process dies.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from qwen_scope_lens.address import FeatureRef

__all__ = ["Book", "Completion", "Generator", "Request", "Sampling", "clean", "digest"]

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "«": "»", "「": "」"}

Messages = tuple[tuple[str, str], ...]
"""The messages of a chat, each as (role, content)."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. The temperature is that of FAC Synthesis; no paper gives the other values."""

    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 512


@dataclass(frozen=True)
class Request:
    """One call: a chat to be answered, or with `raw` a text to be continued."""

    messages: Messages
    purpose: str  # prompt, rewrite, reply, judge, describe or detect: for the ledger's sums
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    raw: bool = False
    target: FeatureRef | None = None  # the feature that a steered generator amplifies

    @property
    def text(self) -> str:
        """The text that a raw request continues."""
        return "\n\n".join(content for _, content in self.messages)


@dataclass(frozen=True)
class Completion:
    """The answer to a request; `error` says why there is none."""

    text: str = ""
    finish: str = ""  # stop, length or content_filter, as the server says
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False  # the server did not count: four characters per token
    seconds: float = 0.0
    error: str = ""


class Book(Protocol):
    """Keeps account of the calls, each by its number in the list of requests."""

    def start(self, number: int) -> bool:
        """Called before a request is sent. False: the spending limit is reached, do not send."""

    def finish(self, number: int, completion: Completion) -> None:
        """Called with an answer, which is kept before anything else happens."""

    def trouble(self, number: int, what: str, maybe_charged: bool) -> None:
        """Called after a try without a usable answer, for which the server may have charged."""


class Generator(Protocol):
    """Writes text. Its `name` is part of every row that it wrote and of the ledger's keys."""

    @property
    def name(self) -> str: ...

    def generate(self, requests: Sequence[Request], book: Book) -> None:
        """Answer the requests in any order, and report each to `book`.

        A request that fails is a completion with an error. Raises `GeneratorFailed` where no
        further request can succeed.
        """


def digest(generator: str, request: Request) -> str:
    """The identity of a call: calls with the same digest are paid only once."""
    content: dict[str, Any] = asdict(request) | {
        "generator": generator,
        "target": str(request.target) if request.target else None,
    }
    del content["purpose"]  # a name for sums only
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def clean(text: str) -> str:
    """A model's text without thoughts, a code fence or quotes around it, or a broken end."""
    text = _THOUGHT.sub("", text).strip().rstrip("�").strip()
    if fenced := re.fullmatch(r"```\w*\n(.*)\n```", text, re.DOTALL):
        text = fenced[1].strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text
