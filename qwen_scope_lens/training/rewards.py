"""The metrics as reward functions in TRL's shape: `reward(completions, completion_ids, **rest)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qwen_scope_lens.training.metrics import find_repeats, has_script

__all__ = ["Reward", "no_repetition", "no_script", "reply_text"]

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
