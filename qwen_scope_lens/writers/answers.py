"""Answers of the OpenAI API: what an answer means. Nothing in an answer is trusted.

Every text that leaves this module has gone through the `Mask` that it was given. `endpoint.py`
decides whether to try again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from qwen_scope_lens.writers.generator import Completion, Request
from qwen_scope_lens.writers.masking import Mask, bare
from qwen_scope_lens.writers.transport import Answer, Trouble

__all__ = ["completion_of", "refusal_of", "retry_after"]

CHARACTERS_PER_TOKEN = 4
"""The estimate for servers that do not count tokens; the ledger marks it as an estimate."""

MOST_TOKENS = 10_000_000
"""A count above this for one call cannot be true, and is replaced by the estimate."""

FATAL = {
    401: "the key is refused",
    403: "access is refused",
    404: "the address or the model does not exist",
}
PASSING = {408, 409, 425, 429}  # and every 5xx


def completion_of(content: bytes, request: Request, mask: Mask) -> Completion:
    """The completion in an answer with status 200. Raises `Trouble` for anything else in it."""
    try:
        answer = json.loads(content.decode("utf-8", "replace"))
        if isinstance(answer.get("error"), Mapping):
            said = mask.excerpt(answer["error"].get("message", ""))
            raise Trouble(f"an error in the answer: {said}", False)
        choice = answer["choices"][0]
        found = choice["text"] if request.raw else choice["message"].get("content")
    except IndexError:
        raise Trouble("an answer without choices", True) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Trouble("an answer that is not in the form of the API", True) from None
    if isinstance(found, list):  # content in parts
        parts = [part.get("text") for part in found if isinstance(part, dict)]
        found = "".join(part for part in parts if isinstance(part, str))
    text = mask(found) if isinstance(found, str) else ""
    usage = answer.get("usage")
    counted: Mapping[str, Any] = usage if isinstance(usage, dict) else {}
    pair = (counted.get(name) for name in ("prompt_tokens", "completion_tokens"))
    tokens = [count for count in pair if type(count) is int and 0 <= count <= MOST_TOKENS]
    known = len(tokens) == 2
    prompt, written = tokens if known else (_estimate(request.text), _estimate(text))
    finish = choice.get("finish_reason")
    return Completion(
        text,
        mask.excerpt(finish) if isinstance(finish, str) else "",
        prompt,
        written,
        estimated=not known,
    )


def refusal_of(answer: Answer, mask: Mask, key_variable: str, model: str) -> Trouble:
    """The trouble that an answer with any other status means."""
    status = answer.status
    said = mask.excerpt(answer.content)
    what = f"HTTP {status}"
    if status == 429 and "insufficient_quota" in said:
        return Trouble(what, False, fatal=True, advice=f"The account is empty: {said}")
    if status in PASSING or status >= 500:
        return Trouble(what, False, wait=retry_after(answer.headers))
    if 300 <= status < 400:
        where = mask.excerpt(bare(mask(answer.headers.get("location", ""))))
        advice = (
            f"It wants to redirect to {where!r}. Redirects are not followed, since the key would go"
            " with them: give the final address"
        )
        return Trouble(what, False, fatal=True, advice=advice)
    if status in FATAL:
        advice = (
            f"That means {FATAL[status]}. The key comes from {key_variable}, the model is"
            f" {model!r}. The server says: {said}"
        )
        return Trouble(what, False, fatal=True, advice=advice)
    return Trouble(f"{what}: {said}", False, final=True)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from either form of the header; None where it is missing or invalid."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        pass
    else:
        return seconds if seconds >= 0 and not math.isnan(seconds) else None
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError, IndexError):
        return None


def _estimate(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
