"""What every part of a recipe may hold: one row per setting, with its kind and its range.

A recipe is checked whole before any stage runs, so that a typo costs a second and not a night.
Mappings whose parts other rooms know (`cases`, `arms`, `trainer`) are checked there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_scope_lens.errors import BadFile

__all__ = ["ESTIMATE", "FIGURE", "SETTINGS", "SOURCE", "Rule", "check", "check_all"]

MOST = 10**9
KINDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "whole": ("a whole number", (int,)),
    "number": ("a number", (int, float)),
    "text": ("a text", (str,)),
    "switch": ("true or false", (bool,)),
    "scalar": ("a text, a number, true or false", (str, int, float, bool)),
    "mapping": ("a mapping of names to values", (dict,)),
    "any": ("a plain value", (str, int, float, bool, list, dict, type(None))),
}
"""What a kind is called, and its types. A boolean is not a number here, as it is in Python."""


@dataclass(frozen=True)
class Rule:
    """What one value may be. `least` and `most` are allowed themselves unless `open` is set."""

    kind: str
    least: float | None = None
    most: float | None = None
    open: tuple[bool, bool] = (False, False)  # whether the ends of the range are left out
    null: bool = False
    also: tuple[str, ...] = ()  # words that are allowed besides
    only: tuple[str, ...] = ()  # the only texts that are allowed
    many: bool = False  # a list of such values, each once
    empty: bool = True  # whether a list or a text may be empty

    def __str__(self) -> str:
        what = " or ".join(self.only) if self.only else KINDS[self.kind][0]
        if self.least is not None:
            what += f" above {self.least:g}" if self.open[0] else f" of at least {self.least:g}"
        if self.most is not None:
            what += f" below {self.most:g}" if self.open[1] else f" of at most {self.most:g}"
        if self.many:
            what = f"a list{'' if self.empty else ' that is not empty'}, each {what} and there once"
        more = (*self.also, *(["null"] if self.null else []))
        return " or ".join([what, *more]) + ("" if self.many or self.empty else ", not empty")

    def takes(self, value: Any) -> bool:
        """Whether a value is allowed."""
        if (value is None and self.null) or (isinstance(value, str) and value in self.also):
            return True
        if not self.many:
            return self._takes_one(value)
        if not isinstance(value, list) or not (value or self.empty):
            return False
        once = len({(type(one), one) for one in value if isinstance(one, str | int | float)})
        known = all(map(self._takes_one, value))
        return known and (self.kind == "mapping" or once == len(value))

    def _takes_one(self, value: Any) -> bool:
        if type(value) not in KINDS[self.kind][1] or not is_plain(value):
            return False
        if isinstance(value, str):
            return (not self.only or value in self.only) and bool(value.strip() or self.empty)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = self.least, self.most
            return (low is None or (value > low if self.open[0] else value >= low)) and (
                high is None or (value < high if self.open[1] else value <= high)
            )
        return True


TEXT, WORD = Rule("text"), Rule("text", empty=False)
MAYBE = Rule("text", null=True, empty=False)
WORDS = Rule("text", many=True, empty=False)
SWITCH, PARTS, ANY = Rule("switch"), Rule("mapping"), Rule("any")
COUNT, FROM_ZERO = Rule("whole", 1, MOST), Rule("whole", 0, MOST)
SHARE = Rule("number", 0, 1)
SOME_SHARE = Rule("number", 0, 1, open=(True, False))
SIZE = Rule("number", 0, 1e9)

SETTINGS: Mapping[str, Rule] = {
    # of every kind
    "model": WORD,
    "model_revision": MAYBE,
    "dtype": Rule("text", null=True, only=("float32", "float16", "bfloat16")),
    "sae": WORD,
    "sae_revision": MAYBE,
    "layers": Rule("whole", 0, MOST, many=True, empty=False, also=("all",)),
    "seed": Rule("whole", 0, 2**32 - 1),
    "max_tokens": COUNT,
    "new_tokens": COUNT,
    "samples": COUNT,
    "temperature": SIZE,
    "top_p": SOME_SHARE,
    "chat": SWITCH,
    "draws": COUNT,
    "tasks": Rule("text", many=True),
    "trainer": PARTS,
    "lora": Rule("mapping", null=True),
    "strength": Rule("number", -1e6, 1e6),
    "threshold": Rule("number", 0, 1e9, also=("mean", "zero")),
    "languages": WORDS,
    # toxicity
    "label": WORD,
    "toxic_values": Rule("scalar", many=True, empty=False),
    "per_class": COUNT,
    "test_share": Rule("number", 0, 1, open=(True, True)),
    "split_by": MAYBE,
    "top_k": Rule("whole", 1, 1000, many=True, empty=False),
    "several_layers": Rule("whole", 1, 1000, many=True),
    "transfer_k": Rule("whole", 1, 1000),
    "overlap_top": COUNT,
    "shares": Rule("number", 0, 1, open=(True, False), many=True, empty=False),
    "baselines": SWITCH,
    "baseline_share": SOME_SHARE,
    "residuals": SWITCH,
    # bench
    "layer": FROM_ZERO,
    "benchmarks": WORDS,
    "thinking": Rule("switch", null=True),
    "limit": Rule("whole", 1, MOST, null=True),
    "resamples": COUNT,
    "panel": MAYBE,
    "most_missing": SHARE,
    "least_spread": SIZE,
    "control": MAYBE,
    # steering
    "cases": ANY,
    "strengths": Rule("number", -1e6, 1e6, many=True, empty=False),
    "where": WORD,
    # repetition
    "loop_prompts": COUNT,
    "batch": COUNT,
    "context": COUNT,
    "min_times": COUNT,
    "top": COUNT,
    "candidates": COUNT,
    "screen_prompts": COUNT,
    "controls": FROM_ZERO,
    "gates": SWITCH,
    "gate_prompts": COUNT,
    "gate_steered": SHARE,
    "gate_random": SHARE,
    "rewards": Rule("text", many=True),
    "heldout_prompts": COUNT,
    # sasft
    "target": WORD,
    "texts": COUNT,
    "features_per_layer": COUNT,
    "lambdas": Rule("number", 0, 1e9, many=True, empty=False),
    "lam": SIZE,
    # safety
    "generator": MAYBE,
    "random_generator": MAYBE,
    "replier": MAYBE,
    "judge": MAYBE,
    "describer": MAYBE,
    "reply_judge": MAYBE,
    "labels": MAYBE,
    "templates": MAYBE,
    "endpoint": PARTS,
    "prices": PARTS,
    "types": PARTS,
    "seed_per_type": COUNT,
    "anchor_per_type": COUNT,
    "relevance": WORD,
    "least_relevance": SHARE,
    "least_documents": COUNT,
    "weak_below": SIZE,
    "passages": COUNT,
    "task": WORD,
    "kind_from": WORD,
    "kind_rest": WORD,
    "synthesis": PARTS,
    "budget": COUNT,
    "budget_counts": WORD,
    "wave": COUNT,
    "base": FROM_ZERO,
    "arms": ANY,
    "test_prompts": COUNT,
    "judge_prompt": WORD,
}

TOKENS = Rule("number", 0, 1e18)
ESTIMATE: Mapping[str, Rule] = {
    **dict.fromkeys(("tokens", "generated", "trained", "stored"), TOKENS),
    "full": SHARE,
    "tflops": Rule("number", 1e-3, 1e6),
}

SOURCE: Mapping[str, Rule] = {
    "rows": Rule("mapping", many=True),
    "configs": Rule("text", many=True, null=True),
    "fewshot": Rule("whole", 0, MOST, null=True),
    "where": Rule("mapping", null=True),
    "columns": Rule("mapping", null=True),
    "file": WORD,
    **dict.fromkeys(("hub", "split", "revision", "task", "template", "column", "by"), MAYBE),
}
"""What a source of data may say; `data.py` reads it."""

FIGURE: Mapping[str, Rule] = {
    "name": WORD,
    "ours": WORD,
    "paper": Rule("number", null=True),
    "tolerance": Rule("number", 0, 1e18, null=True),
    "above": SWITCH,
    "note": TEXT,
}


def check(where: object, key: str, value: Any, rule: Rule) -> None:
    """Raise BadFile for a value that a row does not allow, with what was expected and found."""
    if not rule.takes(value):
        raise BadFile(f"{where}: {key} is {repr(value)[:60]}: expected {rule}")


def check_all(where: object, name: str, values: Any, rules: Mapping[str, Rule]) -> None:
    """Check a mapping of a recipe, part by part. Parts without a row have to be plain values."""
    if not isinstance(values, dict):
        check(where, name, values, PARTS)
    for key, value in values.items():
        check(where, key if name == "settings" else f"{name}.{key}", value, rules.get(key, ANY))


def is_plain(value: Any) -> bool:
    """Whether JSON has a value, too: no date, set, bytes, nan or infinity, however deep."""
    if isinstance(value, dict):
        return all(isinstance(k, str | int) and is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= 2**63
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool)
