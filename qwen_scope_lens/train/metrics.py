"""Code-switching ratio and repeat ratio, as figures and as reward functions for TRL.

Both look at finished replies and at nothing else, so they measure any model, steered, trained or
served elsewhere. As rewards for TRL they are in `metrics.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from qwen_scope_lens.errors import TooLittleData, UnknownName

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
"""What shows a language by its script alone. Japanese text also has Han: to ask for Chinese in
replies that should be Japanese this is no test, and the paper does not use it as one."""


def has_script(text: str, language: str) -> bool:
    """Whether any character of the language's script stands in a text."""
    if language not in SCRIPTS:
        raise UnknownName(
            f"{language!r} has no script of its own here: expected one of {', '.join(SCRIPTS)}"
        )
    return regex.search(SCRIPTS[language], text) is not None


@dataclass(frozen=True)
class Share:
    """A share of replies with an interval."""

    count: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.total

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] ({self.count} of {self.total})"


def share(
    hits: Sequence[bool],
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Share:
    """How many are true, with a Wilson interval.

    Several replies to one prompt are not independent: with `groups` (the prompt of each reply)
    whole groups are resampled instead, and the interval is that of the bootstrap.
    """
    if not len(hits):
        raise TooLittleData("no replies were given: a share needs at least one")
    flags = np.asarray(hits, dtype=bool)
    if groups is None:
        low, high = _wilson(int(flags.sum()), len(flags), level)
    else:
        low, high = _by_group(flags, groups, level, resamples, seed)
    return Share(int(flags.sum()), len(flags), low, high)


def code_switching_ratio(
    replies: Sequence[str], language: str, groups: Sequence[Hashable] | None = None
) -> Share:
    """Eq. 24: the share of replies that hold any character of the unwanted language's script."""
    return share([has_script(reply, language) for reply in replies], groups)


@dataclass(frozen=True)
class Repeats:
    """The loop that a sequence ends in: `times` x `period` of its last items."""

    period: int
    times: float


def find_repeats(
    items: Sequence[Hashable],
    *,
    min_times: float = 4.0,
    min_items: int = 16,
    max_period: int = 128,
) -> Repeats | None:
    """The loop at the end of a sequence of tokens (or characters), if it ends in one.

    The paper does not say how endless repetition is detected; this is our rule. The sequence ends
    in a loop when its last items are `min_times` or more copies of one unit of at most
    `max_period` items, the last copy possibly cut off, and `min_items` items or more in all. The
    shortest such unit is returned.
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


def _wilson(count: int, total: int, level: float) -> tuple[float, float]:
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + level / 2))
    p = count / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _by_group(
    flags: np.ndarray, groups: Sequence[Hashable], level: float, resamples: int, seed: int
) -> tuple[float, float]:
    if len(groups) != len(flags):
        raise ValueError(f"{len(flags)} replies and {len(groups)} groups: expected one a reply")
    codes: dict[Hashable, int] = {}
    rows = np.array([codes.setdefault(group, len(codes)) for group in groups])
    if len(codes) < 2:
        raise TooLittleData("all replies answer one prompt: an interval over prompts needs two")
    hits = np.bincount(rows, weights=flags, minlength=len(codes))
    sizes = np.bincount(rows, minlength=len(codes))
    picks = np.random.default_rng(seed).integers(len(codes), size=(resamples, len(codes)))
    shares = hits[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


Reward = Callable[..., list[float]]


def no_repetition(value: float = -1.0, **rule: Any) -> Reward:
    """`value` for a reply that ends in a loop of tokens, else 0. `rule` as of `find_repeats`."""
    find_repeats((), **rule)  # a wrong rule is refused now, not in the first step
    value = float(value)

    def no_repetition_reward(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        return [value if find_repeats(ids, **rule) else 0.0 for ids in completion_ids]

    return no_repetition_reward


def no_script(language: str, value: float = -1.0) -> Reward:
    """`value` for a reply with any character of the language's script, else 0."""
    has_script("", language)  # an unknown language is refused now, not in the first step
    value = float(value)

    def no_script_reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [value if has_script(reply_text(reply), language) else 0.0 for reply in completions]

    return no_script_reward


def reply_text(reply: Any) -> str:
    """A completion as TRL hands it over, a string or a list of messages, as text."""
    if isinstance(reply, str):
        return reply
    return "\n".join(str(message.get("content") or "") for message in reply)
