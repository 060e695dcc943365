"""Who writes, answers and judges in `safety-synthesis`, and where paid answers are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from qwen_scope_lens.errors import BadFile, GeneratorFailed, ScopeError
from qwen_scope_lens.models.open import open_model
from qwen_scope_lens.recipes.engine import Work
from qwen_scope_lens.synth.pipeline import Counts
from qwen_scope_lens.synth.recipe import SCOPE, Recipe
from qwen_scope_lens.writers.ledger import Ledger, Prices
from qwen_scope_lens.writers.roles import Roles

__all__ = [
    "check_choices",
    "check_roles",
    "loader",
    "open_roles",
    "paid_folder",
    "synth_recipe",
    "templates_folder",
    "within_limit",
]

ROLES = ("generator", "random_generator", "replier", "judge", "describer", "reply_judge")


PARTS = ("safety", "feature", "random")
"""What an arm may be trained on beside the general instructions."""


def check_choices(work: Work) -> None:
    """Settings that are a choice, or a mapping of a mapping."""
    if not (way := str(work["relevance"])) or (way not in ("judge", "all") and "=" not in way):
        raise BadFile(f"relevance is {way!r:.60}: expected judge, all, or LABEL=VALUE")
    if (counts := work["budget_counts"]) not in get_args(Counts):
        raise BadFile(f"budget_counts is {counts!r:.60}: expected {' or '.join(get_args(Counts))}")
    for key in ("types", "arms"):
        if not isinstance(work[key], Mapping) or not work[key]:
            raise BadFile(f"{key} is {work[key]!r:.60}: expected a mapping of names")
    for arm, amounts in work["arms"].items():
        good = isinstance(amounts, Mapping) and set(amounts) <= set(PARTS)
        if not good or not all(type(number) is int and number >= 0 for number in amounts.values()):
            raise BadFile(
                f"arm {arm} is {amounts!r:.60}: expected numbers of examples of"
                f" {', '.join(PARTS)}, such as {{safety: 4000, feature: 4000}}"
            )


def check_roles(work: Work, needed: Sequence[str]) -> Mapping[str, Any]:
    """Every role's generator, by its form only; no model is loaded and nothing is sent."""
    opened = open_roles(work, open_model)
    for role in ROLES:
        spec = work[role]
        if spec is None and role in needed:
            raise BadFile(
                f"recipe {work.run.recipe.name} has no {role}: name one, such as --set"
                f" {role}=openai:http://localhost:8000/v1#NAME"
            )
        kind, _, name = str(spec).partition(":")
        if spec is not None and (kind not in ("hf", "steer") or not name):
            opened.open(str(spec))  # an endpoint, or an error that says what is expected
    settings(work, "prices", Prices)
    return {role: work[role] for role in ROLES}


def open_roles(work: Work, load: Callable[[str], Any]) -> Roles:
    """Generators by their text form, with the recipe's settings of endpoints."""
    if not isinstance(work["endpoint"], Mapping):
        raise BadFile(f"endpoint is {work['endpoint']!r:.60}: expected a mapping of settings")
    return Roles(load, strength=work["strength"], endpoint=work["endpoint"])


def loader(work: Work) -> Callable[[str], Any]:
    """Loads a model by name; the recipe's own model is loaded once for all stages."""

    @lru_cache
    def load(name: str) -> Any:
        if name == work["model"]:
            return work.model()
        return open_model(name, device=work.options.get("device"))

    return load


def synth_recipe(work: Work) -> Recipe:
    """The recipe of `qsl synth` called scope, with the settings of this one."""
    own: Recipe = settings(work, "synthesis", lambda **changes: SCOPE.change(**changes))
    return own.change(seed=work["seed"], kind_from=work["kind_from"])


def settings(work: Work, key: str, make: Callable[..., Any]) -> Any:
    """What a setting with settings in it describes; an unknown one becomes a named error."""
    try:
        return make(**work[key])
    except (TypeError, ScopeError) as error:
        raise BadFile(f"recipe {work.run.recipe.name}: {key} cannot be used: {error}") from error


def templates_folder(work: Work) -> Path | None:
    """The user's templates, where the recipe names a folder of them."""
    return None if work["templates"] is None else work.uses(Path(work["templates"]).expanduser())


def paid_folder(work: Work, name: str, *decides: Any) -> Path:
    """Where paid answers are kept: a folder for what decides them, which no stage clears."""
    text = json.dumps(decides, sort_keys=True, default=str)
    return work.run.folder / "paid" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def within_limit(book: Ledger) -> None:
    """A stage that the spending limit cut off is not finished."""
    if book.limit_reached:
        raise GeneratorFailed(
            f"{book.limit_reached} in {book.path}: raise it with --set prices.max_cost=N (or"
            " max_tokens) and run again. What was paid for is kept"
        )
