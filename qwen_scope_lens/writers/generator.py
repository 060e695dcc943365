"""What every text generator is: requests in, completions out, one small interface.

An endpoint over HTTP (`endpoint.py`) and a model in memory, steered or not (`local.py`), implement
`Generator`. What was paid is kept by a `Book` (`ledger.py`), which a generator tells of each call
at once, so that nothing is lost when the process dies. No prompt is written here.
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
"""(role, content) of a chat."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. The temperature is that of FAC synthesis; the rest no paper says."""

    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 512


@dataclass(frozen=True)
class Request:
    """One call: a chat, or with `raw` one text to be continued."""

    messages: Messages
    purpose: str  # prompt, rewrite, reply, judge, describe, detect: for the ledger's sums
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    raw: bool = False
    target: FeatureRef | None = None  # the feature that a steered generator amplifies

    @property
    def text(self) -> str:
        """The one text to be continued, of a raw request."""
        return "\n\n".join(content for _, content in self.messages)


@dataclass(frozen=True)
class Completion:
    """What came back; `error` says why nothing did."""

    text: str = ""
    finish: str = ""  # stop, length, content_filter: as the server says
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False  # the server did not say: four characters a token
    seconds: float = 0.0
    error: str = ""


class Book(Protocol):
    """Who wants to know of each call, by its number in the list of requests."""

    def start(self, number: int) -> bool:
        """About to send; False: the spending limit is reached, do not."""

    def finish(self, number: int, completion: Completion) -> None:
        """An answer, to be kept before anything else happens."""

    def trouble(self, number: int, what: str, maybe_charged: bool) -> None:
        """A try without a usable answer; the server may have charged for it."""


class Generator(Protocol):
    """Writes text. `name` stands in every row that it wrote and in the keys of the ledger."""

    @property
    def name(self) -> str: ...

    def generate(self, requests: Sequence[Request], book: Book) -> None:
        """Answer the requests in any order, telling `book` of each. Raises `GeneratorFailed` when
        going on makes no sense; a single request that fails is a completion with an error."""


def digest(generator: str, request: Request) -> str:
    """The identity of a call: the same digest is never paid twice."""
    content: dict[str, Any] = asdict(request) | {
        "generator": generator,
        "target": str(request.target) if request.target else None,
    }
    del content["purpose"]  # a name for sums only
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def clean(text: str) -> str:
    """What a model wrote without what it put around it: thoughts, a fence, quotes, a broken end."""
    text = _THOUGHT.sub("", text).strip().rstrip("�").strip()
    if fenced := re.fullmatch(r"```\w*\n(.*)\n```", text, re.DOTALL):
        text = fenced[1].strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text
