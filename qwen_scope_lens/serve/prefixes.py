"""The prefix cache: prompts that begin alike are read once.

An entry is what a text left behind: its tokens, the model's cache, the residuals that were wanted
of it, and what its plan did. It serves another prompt that begins with the same tokens. A plan that
acts on prompts shares entries with no other plan and takes only whole ones, so that its report is
complete; of a model with linear attention, too, only whole entries can be used.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from qwen_scope_lens.serve import caches
from qwen_scope_lens.serve.rows import Wanted
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.where import Gate

__all__ = ["Prefix", "PrefixCache"]

LEAST = 8
"""Shorter beginnings are read again: that is quicker than copying."""


@dataclass(frozen=True)
class Prefix:
    """What is known of the first `length` tokens of a prompt."""

    length: int
    cache: Any
    logits: Tensor | None  # after the last of them, where all of the prompt is known
    residuals: dict[int, Tensor]  # layer -> [length, d_model]
    opened: dict[Gate, int] = field(default_factory=dict)
    did: Tensor | None = None  # the sums of the plan's report


class PrefixCache:
    """Holds at most `room` tokens; the entry used longest ago goes first. 0 keeps none."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], Prefix] = OrderedDict()
        self.tokens = 0

    def find(self, wanted: Wanted) -> Prefix | None:
        """The longest known beginning of a prompt, as copies."""
        plan, ids = _acting_on_prompts(wanted.plan), wanted.prompt
        if plan is None:
            return None
        best: tuple[int, tuple[str, tuple[int, ...]]] | None = None
        for key, entry in self._entries.items():
            if key[0] != plan or not set(wanted.layers) <= set(entry.residuals):
                continue
            shared = _shared(ids, key[1])
            whole = shared == len(key[1])
            if shared == len(ids) and not whole:
                shared -= 1  # the last token is read again, for its logits
            if not whole and (plan or not caches.is_croppable(entry.cache)):
                continue
            if shared >= LEAST and (best is None or shared > best[0]):
                best = shared, key
        if best is None:
            return None
        length, key = best
        entry = self._entries[key]
        self._entries.move_to_end(key)
        return replace(
            entry,
            length=length,
            cache=caches.cropped(entry.cache, length),
            logits=entry.logits if length == len(ids) else None,
            residuals={layer: entry.residuals[layer][:length] for layer in wanted.layers},
        )

    def keep(self, wanted: Wanted, ids: tuple[int, ...], prefix: Prefix) -> None:
        """Keep a copy of what a text left behind."""
        plan = _acting_on_prompts(wanted.plan)
        if plan is None or not LEAST <= prefix.length <= self._room:
            return
        key = (plan, ids)
        before = self._entries.pop(key, None)
        if before is not None:
            self.tokens -= before.length
            if not set(before.residuals) <= set(prefix.residuals):
                prefix = before  # it serves more
        if before is not prefix:
            prefix = replace(prefix, cache=caches.cropped(prefix.cache, prefix.length))
        self._entries[key] = prefix
        self.tokens += prefix.length
        while self.tokens > self._room:
            self.tokens -= self._entries.popitem(last=False)[1].length


def _acting_on_prompts(plan: Plan | None) -> str | None:
    """The plan as a key: "" where it leaves prompts alone, None where what it does to a prompt
    depends on how long that is."""
    edits = () if plan is None else plan.edits
    if any(start < 0 for edit in edits for start, _ in edit.where.positions or ()):
        return None
    if all(edit.where.phase == "generation" and edit.where.gate is None for edit in edits):
        return ""
    return "; ".join(f"{edit} {edit.typical}" for edit in edits)


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])
