"""The page of a recipe: our figures beside the paper's, what differs, and how it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.pages import Page
from qwen_scope_lens.recipes.recipe import Figure
from qwen_scope_lens.version import __version__

if TYPE_CHECKING:
    from qwen_scope_lens.recipes.engine import Run, State

__all__ = ["COLUMNS", "figure_rows", "make_page", "not_found"]

COLUMNS = ("figure", "ours", "from", "to", "paper", "tolerance", "reading", "note")

ABSENT = "absent"
OTHER = "not the recipe's value"

SMOKE = (
    "This is a smoke run: a toy model on a few texts. It shows that every stage works. Its figures"
    " say nothing about the paper's."
)


def make_page(run: Run, states: Sequence[State]) -> Page:
    """The page of a run whose stages are all finished."""
    recipe = run.recipe
    results = {state.name: state.result for state in states if state.result is not None}
    page = Page(recipe.title)
    if recipe.is_smoke:
        page.text(SMOKE)
    page.text(f"Recipe {recipe.name}: {recipe.paper}.")
    page.heading("Our figures beside the paper's")
    page.table(COLUMNS, figure_rows(recipe.figures, results, not compares(run)))
    page.text(
        "From and to are the ends of 95% intervals. The tolerances are ours, because the paper"
        " gives rounded figures without errors."
        + (
            ""
            if compares(run)
            else " The model, the SAEs or the data are not those of the recipe, so the paper's"
            " figures are shown for orientation and no reading is given."
        ),
        quiet=True,
    )
    import_module(f"qwen_scope_lens.recipes.{recipe.kind}").draw(page, results)
    changed = {key.split(".")[0] for key, _, _ in recipe.changed}
    changed |= set(recipe.smoke.get("settings", ())) if recipe.is_smoke else set()
    page.heading("What the paper does not say")
    page.table(
        ("setting", "here", "why"),
        [
            (
                key,
                _short(recipe.settings[key]),
                OTHER if key in changed else why,
            )
            for key, why in recipe.open.items()
        ],
    )
    page.heading("How this was made")
    if recipe.changed:
        page.text("Changed against the recipe:")
        page.table(
            ("setting", "in the recipe", "here"),
            [(key, str(was), str(now)) for key, was, now in recipe.changed],
        )
    page.table(
        ("setting", "value"), [(key, _short(value)) for key, value in recipe.settings.items()]
    )
    page.table(
        ("source", "read from"),
        [(name, _source(run, source)) for name, source in recipe.data.items()],
    )
    for facts in [found["model"] for found in results.values() if "model" in found][:1]:
        page.table(("the model that was read", ""), [(k, str(v)) for k, v in facts.items()])
    page.table(
        ("stage", "seconds"), [(state.name, float(state.seconds or 0.0)) for state in states]
    )
    return page.text(f"qwen-scope-lens {__version__}", quiet=True)


def compares(run: Run) -> bool:
    """Whether model, SAEs and data are the recipe's, so that the paper's figures may be tested."""
    changed = {key.split(".")[0] for key, _, _ in run.recipe.changed}
    return not (run.recipe.is_smoke or run.data or changed & {"model", "sae", "data"})


def figure_rows(
    figures: Sequence[Figure], results: Mapping[str, Any], only_shown: bool
) -> list[tuple[Any, ...]]:
    """One row per figure: our value with its interval, the paper's, and what follows."""
    rows = []
    for figure in figures:
        value, low, high = found(results, figure.ours)
        paper = f"> {figure.paper:g}" if figure.above else figure.paper
        missing = f"not found: {figure.ours}" if figure in not_found((figure,), results) else ""
        reading = missing or ("" if only_shown else _reading(figure, value, low, high))
        rows.append((figure.name, value, low, high, paper, figure.tolerance, reading, figure.note))
    return rows


def not_found(figures: Sequence[Figure], results: Mapping[str, Any]) -> list[Figure]:
    """The figures whose place no result has, or where a mapping without a value stands.

    A place that holds None or nan was looked at and not measured, which is another thing.
    """
    return [figure for figure in figures if not _is_place(results, figure.ours)]


def _is_place(results: Mapping[str, Any], place: str) -> bool:
    value: Any = results
    for key in place.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    inner = value.get("value", ABSENT) if isinstance(value, Mapping) else value
    return inner is None or (isinstance(inner, (int, float)) and not isinstance(inner, bool))


def found(
    results: Mapping[str, Any], place: str
) -> tuple[float | None, float | None, float | None]:
    """A value and its interval where the recipe says that it stands; None for what is not there."""
    value: Any = results
    for key in place.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return value.get("value"), value.get("low"), value.get("high")
    number = isinstance(value, (int, float)) and math.isfinite(value)
    return (float(value) if number else None), None, None


def _reading(figure: Figure, value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "not measured"
    if figure.paper is None:
        return ""
    if figure.above:
        return "as in the paper" if value > figure.paper else "lower than in the paper"
    if figure.tolerance is not None and abs(value - figure.paper) <= figure.tolerance:
        return "within the tolerance"
    if low is not None and high is not None and low <= figure.paper <= high:
        return "outside the tolerance, but our interval holds the paper's figure"
    return "differs from the paper"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]} .."


def _source(run: Run, source: Mapping[str, Any]) -> str:
    if run.data is not None and "file" in source:
        return f"{source['file']} (local file)"
    if "rows" in source:
        return f"{len(source['rows'])} rows in the recipe"
    if "task" in source:
        return f"lm-eval's task {source['task']}"
    return f"{source.get('hub')}, revision {source.get('revision') or 'the newest'}"
