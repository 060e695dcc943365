"""Recipes: every choice of a synthesis run, among them the recipes of two papers.

`SCOPE` is section 6 of the Qwen-Scope report: a vanilla prompt and its adversarial rewrites for
each feature, replies by the feature's risk category, verification in the prompt, and features count
from above zero. `FAC` is FAC Synthesis: a stronger and a weaker example of each feature serve as
demonstrations, and features count from a threshold delta. `TEXT` is like `SCOPE`, for a base model
that continues texts. Choices that the papers leave open have a default here and a line in the file
that `qsl synth templates` writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from qwen_scope_lens.errors import BadFile, BadPlan, UnknownName
from qwen_scope_lens.files import load_yaml, read_text, whole_file
from qwen_scope_lens.synth.language import check_language
from qwen_scope_lens.writers.generator import Sampling

__all__ = [
    "FAC",
    "RECIPES",
    "SCOPE",
    "TEXT",
    "KindFrom",
    "Read",
    "Recipe",
    "read_recipe",
    "read_words",
    "write_recipe",
]

Read = Literal["prompt", "reply", "either", "none"]
KindFrom = Literal["feature", "turns"]


@dataclass(frozen=True)
class Recipe:
    """How examples are written, judged and kept."""

    name: str
    template: str = "prompt"  # `{template}_{kind}.txt`, or `{template}.txt` for every kind
    kinds: tuple[str, ...] = ("harmful", "benign")  # z; `reply_{kind}.txt` answers it
    kind_from: KindFrom = "feature"  # z is what the feature expresses, or each kind in turn
    variants: int = 1  # adversarial rewrites of each vanilla prompt; styles take turns
    check_rewrites: bool = False  # ask the judge whether a rewrite keeps the meaning
    replies: bool = True
    pairs: bool = False  # first find x+ and x-, then show both as demonstrations
    candidates: int = 1  # per round of a feature
    attempts: int = 4  # rounds per feature before it is given up
    per_feature: int = 1  # vanilla examples to keep per feature, and as many of each rewrite
    count_others: bool = False  # an example also counts for other targets that it activates
    threshold: float = 0.0  # a feature fires where it exceeds this; delta in FAC
    # where the feature has to fire: in the prompt, as the report says. With none the prompt is read
    # and nothing has to fire in it: undirected synthesis, to compare with
    read: Read = "prompt"
    as_chat: bool = False  # read through the chat template, whose tokens then count, too
    examples_shown: int = 5  # passages of a feature in a prompt
    language: str = ""  # a code such as en or zh; empty: any
    least_characters: int = 8
    most_characters: int = 8000
    near_duplicates: float = 0.8  # Jaccard similarity of character n-grams; 1: only exact ones
    caution: tuple[str, ...] = ()  # words that no benign prompt and no reply may contain
    seed: int = 0
    temperature: float = 0.8
    top_p: float = 1.0
    prompt_tokens: int = 256  # at most, of a prompt or a text
    reply_tokens: int = 768

    def __post_init__(self) -> None:
        for name in ("kinds", "caution"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise BadPlan(f"{name} is a single word, {value!r}: expected a list of words")
            object.__setattr__(self, name, tuple(value))
        counts = ("candidates", "attempts", "per_feature", "prompt_tokens", "reply_tokens")
        for name in counts:
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise BadPlan(f"{name} is {getattr(self, name)!r}: expected a whole number from 1")
        for name in ("variants", "examples_shown", "least_characters", "most_characters", "seed"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise BadPlan(f"{name} is {getattr(self, name)!r}: expected a whole number from 0")
        for name, choices in (("read", get_args(Read)), ("kind_from", get_args(KindFrom))):
            if getattr(self, name) not in choices:
                raise BadPlan(
                    f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}"
                )
        if self.read == "reply" and (self.as_chat or not self.replies):
            raise BadPlan("read is 'reply': that needs replies, and not as_chat")
        if self.pairs and self.candidates < 2:
            raise BadPlan("pairs needs candidates of 2 or more: a stronger and a weaker one")
        if not self.kinds:
            raise BadPlan("kinds is empty: expected at least one")
        for name in ("threshold", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise BadPlan(f"{name} is {value!r}: expected a finite number, zero or more")
        if not 0 < self.top_p <= 1:
            raise BadPlan(f"top_p is {self.top_p!r}: expected above 0, at most 1")
        if not 0 < self.near_duplicates <= 1:
            raise BadPlan(f"near_duplicates is {self.near_duplicates!r}: expected 0 to 1")
        check_language(self.language)

    def sampling(self, reply: bool = False) -> Sampling:
        tokens = self.reply_tokens if reply else self.prompt_tokens
        return Sampling(self.temperature, self.top_p, tokens)

    def for_steering(self) -> Recipe:
        """The same recipe for a steered writer, with prompts that do not describe the feature."""
        steered = {"prompt": "steered", "text": "opening"}
        return replace(self, template=steered.get(self.template, self.template))

    def at_least(self, threshold: float) -> Recipe:
        """With at least the threshold by which targets were found to be missing."""
        return replace(self, threshold=max(self.threshold, threshold))

    def to_dict(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def change(self, **changes: Any) -> Recipe:
        """The same recipe with other values; a value of None changes nothing."""
        return replace(self, **{key: v for key, v in changes.items() if v is not None})


SCOPE = Recipe("scope")
FAC = Recipe(
    "fac",
    template="fac",
    kinds=("task",),
    variants=0,
    pairs=True,
    candidates=2,
    threshold=1.0,
    read="prompt",
)
TEXT = Recipe("text", template="text", kinds=("text",), variants=0, replies=False, read="prompt")
RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (SCOPE, FAC, TEXT)}


def read_recipe(name: str) -> Recipe:
    """A recipe of the package by name, or a YAML file that changes one of them."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UnknownName(f"no recipe is named {name!r}: {', '.join(RECIPES)}, or a .yaml file")
    import yaml

    try:
        content = load_yaml(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise BadFile(f"{path} cannot be read as YAML ({reason})") from error
    known = {field.name: field.type for field in fields(Recipe)}
    if not isinstance(content, dict):
        raise BadFile(f"{path}: expected `name: value` lines, found {str(content)[:40]!r}")
    if unknown := sorted(set(map(str, content)) - set(known)):
        raise BadFile(f"{path}: a recipe has no {unknown[0]!r}: it has {', '.join(known)}")
    base = RECIPES.get(str(content.get("name")), SCOPE)
    try:
        return replace(base, **content)
    except (BadPlan, UnknownName, TypeError, OverflowError) as error:
        raise BadFile(f"{path}: {error}") from error


def read_words(path: Path) -> tuple[str, ...]:
    """The words or phrases of a file, one per line. Lines that begin with # are comments."""
    try:
        lines = read_text(path, "utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{path} cannot be read as UTF-8 text ({error})") from error
    words = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not words:
        raise BadFile(f"{path} is empty: expected one word per line")
    return words


def write_recipe(recipe: Recipe, path: Path) -> Path:
    import yaml

    with whole_file(path) as partial:
        partial.write_text(
            yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
    return path
