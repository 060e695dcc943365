"""The report of a sweep: dose and response as a picture, what it cost, and samples to read."""

from __future__ import annotations

from typing import Any

from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.steering.sweep import CONTROL, PLAN, Dose, Sweep

__all__ = ["sweep_page"]

COLOURS = {PLAN: "#4a7ebb", CONTROL: "#999999"}


def sweep_page(found: Sweep) -> Page:
    """One page; `page.save(path)` writes it."""
    page = Page("Dose and response")
    model = found.settings["model"]["id"]
    page.text(f"{found.plan}, on {model}, {found.settings['prompts']} prompts.")
    page.figure(
        chart(lambda axes: _effect(axes, found)),
        f"Effect: {found.meaning}, with 95% intervals over the prompts. Hollow: incoherent, by"
        f" perplexity over {found.guard.perplexity_ratio:g} times the unsteered texts' or"
        f" {found.guard.more_repetition:g} more repeated 4-grams.",
    )
    page.figure(
        chart(lambda axes: _cost(axes, found)),
        "Perplexity of the texts, under the unsteered model.",
    )
    page.heading("Numbers")
    columns = ["arm", "strength", "effect", "from", "to", "perplexity", "repetition", "coherent"]
    page.table(columns, [_row(found, dose) for dose in _in_order(found)])
    page.heading("What followed the first prompt")
    page.table(["strength", "text"], [(d.strength, d.sample) for d in found.arm(PLAN)])
    return page.text(f"Settings: {found.settings}", quiet=True)


def _in_order(found: Sweep) -> list[Dose]:
    """Unsteered, then each arm by strength."""
    steered = [dose for arm in (PLAN, CONTROL) for dose in found.arm(arm) if dose.strength != 0]
    return [found.plain, *steered]


def _row(found: Sweep, dose: Dose) -> tuple[Any, ...]:
    arm = dose.arm if dose.strength != 0 else "unsteered"
    coherent = "yes" if found.coherent(dose) else "no"
    return (arm, dose.strength, dose.effect, dose.low, dose.high, dose.perplexity,
            dose.repetition, coherent)  # fmt: skip


def _effect(axes: Any, found: Sweep) -> None:
    for arm in (CONTROL, PLAN):
        doses = found.arm(arm)
        x = [dose.strength for dose in doses]
        colour = COLOURS[arm]
        axes.plot(x, [dose.effect for dose in doses], color=colour, label=arm)
        axes.fill_between(
            x, [d.low for d in doses], [d.high for d in doses], color=colour, alpha=0.2, lw=0
        )
        for whole in (True, False):
            marked = [d for d in doses if found.coherent(d) == whole]
            axes.plot(
                [d.strength for d in marked],
                [d.effect for d in marked],
                "o",
                color=colour,
                markersize=5,
                markerfacecolor=colour if whole else "none",
            )
    axes.set_xlabel(f"strength ({found.unit})")
    axes.set_ylabel("effect")
    axes.legend()


def _cost(axes: Any, found: Sweep) -> None:
    for arm in (CONTROL, PLAN):
        doses = [dose for dose in found.arm(arm) if dose.perplexity is not None]
        axes.plot(
            [d.strength for d in doses],
            [d.perplexity for d in doses],
            color=COLOURS[arm],
            label=arm,
        )
    limit = found.plain.perplexity
    if limit is not None:
        limit *= found.guard.perplexity_ratio
        axes.axhline(limit, color="#bb5544", lw=0.8, ls="--", label="guard")
    axes.set_yscale("log")
    for axis_of in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_of(lambda value, at: f"{value:g}")
    axes.set_xlabel(f"strength ({found.unit})")
    axes.set_ylabel("perplexity")
    axes.legend()
