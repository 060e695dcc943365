"""Code-switching ratio and repeat ratio, as figures and as reward functions for TRL.

Both need only finished replies, so they measure any model, whether it is steered, trained or served
by other software.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex

from qwen_scope_lens.errors import BadCorpus, TooLittleData, UnknownName
from qwen_scope_lens.stats import Interval, between, draws_of_groups, proportion
from qwen_scope_lens.stores.corpus import read_rows

__all__ = [
    "SCRIPTS",
    "Repeats",
    "Reward",
    "Share",
    "code_switching_ratio",
    "find_repeats",
    "has_script",
    "no_repetition",
    "no_script",
    "read_replies",
    "repeat_ratio",
    "reply_text",
    "share",
]

SCRIPTS = {
    "zh": r"\p{Han}",
    "ko": r"\p{Hangul}",
    "ru": r"\p{Cyrillic}",
    "ja": r"[\p{Hiragana}\p{Katakana}]",
    "ar": r"\p{Arabic}",
    "th": r"\p{Thai}",
    "hi": r"\p{Devanagari}",
    "he": r"\p{Hebrew}",
    "el": r"\p{Greek}",
}
"""Languages that their script alone shows. Japanese text also has Han characters, so this cannot
find Chinese in replies that should be Japanese, and the paper does not use it for that."""


def has_script(text: str, language: str) -> bool:
    """Whether the text has any character of the language's script."""
    if language not in SCRIPTS:
        raise UnknownName(
            f"{language!r} has no script of its own here: expected one of {', '.join(SCRIPTS)}"
        )
    return regex.search(SCRIPTS[language], text) is not None


@dataclass(frozen=True)
class Share:
    """A share of replies with its 95% interval."""

    count: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> Interval:
        return Interval(self.value, self.low, self.high)

    def __str__(self) -> str:
        return f"{self.interval} ({self.count} of {self.total})"


def share(hits: Sequence[bool], groups: Sequence[Hashable] | None = None, seed: int = 0) -> Share:
    """The share of hits that are true, with a Wilson interval.

    Several replies to one prompt are not independent. With `groups` (the prompt of each reply) the
    interval is a bootstrap that resamples whole groups.
    """
    if not len(hits):
        raise TooLittleData("no replies were given: a share needs at least one")
    flags = np.asarray(hits, dtype=bool)
    count, total = int(flags.sum()), len(flags)
    if groups is None:
        found = proportion(count, total)
    else:
        if len(groups) != total:
            raise ValueError(f"{total} replies and {len(groups)} groups: expected one per reply")
        if len(set(groups)) < 2:
            raise TooLittleData("all replies answer one prompt: an interval over prompts needs two")
        found = between(count / total, draws_of_groups(flags, groups, seed=seed))
    return Share(count, total, found.low, found.high)


def code_switching_ratio(
    replies: Sequence[str], language: str, groups: Sequence[Hashable] | None = None
) -> Share:
    """Eq. 24: the share of replies with any character of the unwanted language's script."""
    return share([has_script(reply, language) for reply in replies], groups)


@dataclass(frozen=True)
class Repeats:
    """The loop at the end of a sequence: its last `period` items are repeated `times` times."""

    period: int
    times: float


def find_repeats(
    items: Sequence[Hashable],
    *,
    min_times: float = 4.0,
    min_items: int = 16,
    max_period: int = 128,
) -> Repeats | None:
    """The loop at the end of a sequence of tokens or characters; None if there is no loop.

    The paper does not say how endless repetition is detected, so this rule is ours. The sequence
    ends in a loop if its last `min_items` or more items are `min_times` or more copies of one unit
    of at most `max_period` items; the last copy may be incomplete. The shortest such unit counts.
    """
    if min_times < 2 or min_items < 2 or max_period < 1:
        raise ValueError("min_times and min_items have to be 2 or more, max_period 1 or more")
    codes: dict[Hashable, int] = {}
    ids = np.array([codes.setdefault(item, len(codes)) for item in items], dtype=np.int64)
    for period in range(1, min(max_period, len(ids) // 2) + 1):
        breaks = np.flatnonzero(ids[period:] != ids[:-period])
        start = int(breaks[-1]) + 1 if len(breaks) else 0
        length = len(ids) - start
        if length >= max(min_items, min_times * period):
            return Repeats(period, length / period)
    return None


def repeat_ratio(
    replies: Sequence[Sequence[Hashable]],
    groups: Sequence[Hashable] | None = None,
    detect: Callable[[Sequence[Hashable]], object | None] = find_repeats,
) -> Share:
    """The share of replies (token ids, or strings as characters) that end in a loop."""
    return share([detect(reply) is not None for reply in replies], groups)


Reward = Callable[..., list[float]]


def no_repetition(value: float = -1.0, **rule: Any) -> Reward:
    """`value` for a reply that ends in a loop of tokens, else 0. `rule` as of `find_repeats`."""
    find_repeats((), **rule)  # refuse a wrong rule now, not in the first step
    value = float(value)

    def no_repetition_reward(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        return [value if find_repeats(ids, **rule) else 0.0 for ids in completion_ids]

    return no_repetition_reward


def no_script(language: str, value: float = -1.0) -> Reward:
    """`value` for a reply with any character of the language's script, else 0."""
    has_script("", language)  # refuse an unknown language now, not in the first step
    value = float(value)

    def no_script_reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [value if has_script(reply_text(reply), language) else 0.0 for reply in completions]

    return no_script_reward


def reply_text(reply: Any) -> str:
    """The text of a completion, which TRL passes as a string or as a list of messages."""
    if isinstance(reply, str):
        return reply
    return "\n".join(str(message.get("content") or "") for message in reply)


REPLY_COLUMNS = ("text", "reply", "completion")


def read_replies(
    path: Path, text: str | None, prompt: str | None
) -> tuple[list[str], list[str] | None]:
    """Read the replies of a file, and their prompts if a column is named.

    `text` is the column of the replies. Without it that is text, reply or completion, or the last
    message of the assistant in `messages`; rows of `qsl synth run` that have none, because only
    their prompt was written, are left out.
    """
    replies, prompts = [], []
    for where, row in read_rows(path):
        try:
            reply = _last_reply(row) if text is None else reply_text(row[text])
            if reply is None:
                continue
            replies.append(reply)
            if prompt is not None:
                prompts.append(str(row[prompt]))
        except (KeyError, TypeError, AttributeError) as error:
            wanted = text or f"{', '.join(REPLY_COLUMNS)} or messages"
            wanted += f", and {prompt}" if prompt else ""
            raise BadCorpus(f"{where}: expected an object with {wanted}; {error!r}") from error
    return replies, prompts if prompt is not None else None


def _last_reply(row: Mapping[str, Any]) -> str | None:
    column = next((name for name in REPLY_COLUMNS if name in row), None)
    if column is not None:
        return reply_text(row[column])
    said = [one["content"] for one in row["messages"] if one["role"] == "assistant"]
    return str(said[-1]) if said else None
