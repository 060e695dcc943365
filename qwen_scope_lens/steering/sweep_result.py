"""The result of a sweep: doses of several arms, as an object, a file, a table and a page.

`sweep.py` runs them, and `arms.py` says what the arms are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.steering.plan import OLD_UNITS

__all__ = ["ASKED", "CONTROL", "DIFFERENCE", "FORMAT", "PLAN", "VERSION", "Dose", "Guard", "Sweep"]

FORMAT, VERSION = "qsl-sweep", 3
OLDER = (1, 2)  # 1: the unit `typical` was called `sigma`; 2: two arms, no capability
PLAN, CONTROL = "the plan", "control: random directions"
DIFFERENCE, ASKED = "mean difference of activations", "prompt only"
ARMS = (PLAN, CONTROL, DIFFERENCE)
COLOURS = {PLAN: "#4a7ebb", CONTROL: "#999999", DIFFERENCE: "#5a9e6f"}


@dataclass(frozen=True)
class Guard:
    """Until when a text counts as coherent, compared with the unsteered texts. The defaults are our
    own; no paper gives numbers."""

    perplexity_ratio: float = 2.0
    more_repetition: float = 0.15
    neutral_ratio: float = 1.5  # of the perplexity of neutral texts, where it was measured

    def holds(self, dose: Dose, plain: Dose) -> bool:
        if dose.perplexity is None or plain.perplexity is None:
            return False
        return (
            dose.perplexity <= self.perplexity_ratio * plain.perplexity
            and dose.repetition <= plain.repetition + self.more_repetition
            and self.capable(dose, plain)
        )

    def capable(self, dose: Dose, plain: Dose) -> bool:
        """Whether neutral texts stay about as predictable as before."""
        if dose.capability is None or plain.capability is None:
            return True
        return dose.capability <= self.neutral_ratio * plain.capability


@dataclass(frozen=True)
class Dose:
    """The result of one strength of one arm, over all prompts."""

    arm: str
    strength: float
    effect: float
    low: float  # 95% interval of the effect, bootstrap over the prompts
    high: float
    perplexity: float | None  # of what was written, under the unsteered model
    repetition: float
    sample: str  # what came after the first prompt
    capability: float | None = None  # perplexity of neutral texts that the steered model reads


@dataclass(frozen=True)
class Sweep:
    """The doses of a sweep; the unsteered one has strength 0."""

    plan: str
    unit: str
    measure: str
    meaning: str
    settings: dict[str, Any]
    doses: tuple[Dose, ...]
    guard: Guard = Guard()
    asked: Dose | None = None  # `ASKED`: no steering, the prompts ask for the effect

    @property
    def plain(self) -> Dose:
        return next(dose for dose in self.doses if dose.strength == 0)

    def arm(self, name: str) -> tuple[Dose, ...]:
        """The doses of an arm in the order of their strengths, with the unsteered one."""
        own = [dose for dose in self.doses if dose.arm == name and dose.strength != 0]
        return tuple(sorted([*own, self.plain], key=lambda dose: dose.strength))

    def coherent(self, dose: Dose) -> bool:
        return self.guard.holds(dose, self.plain)

    def best(self, arm: str = PLAN) -> tuple[Dose | None, Dose | None]:
        """The coherent doses of an arm with the smallest and the largest effect."""
        fine = [d for d in self.arm(arm) if d.strength != 0 and self.coherent(d)]
        if not fine:
            return None, None
        return min(fine, key=lambda d: d.effect), max(fine, key=lambda d: d.effect)

    def save(self, path: Path) -> None:
        write_json(path, FORMAT, VERSION, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> Sweep:
        content = read_json(path, FORMAT, VERSION, "qsl sweep", OLDER)
        doses = tuple(Dose(**row) for row in content.pop("doses"))
        named: dict[str, Any] = {"unit": "/".join(map(_unit, content["unit"].split("/")))}
        for row in content["settings"]["edits"]:
            row |= {"unit": _unit(row["unit"])}
        if content.get("asked") is not None:
            named["asked"] = Dose(**content["asked"])
        return cls(**{**content, **named, "doses": doses, "guard": Guard(**content["guard"])})

    def page(self) -> Page:
        """The report: pictures, numbers and samples. `page().save(path)` writes it."""
        page = Page("Dose and response")
        prompts = self.settings["prompts"]
        page.text(f"{self.plan}, on {self.settings['model']['id']}, {prompts} prompts.")
        page.figure(
            chart(lambda axes: _draw_effect(axes, self)),
            f"Effect: {self.meaning}, with 95% intervals over the prompts. Hollow points are"
            f" incoherent: their perplexity is over {self.guard.perplexity_ratio:g} times that of"
            f" the unsteered texts, or {self.guard.more_repetition:g} more of their 4-grams are"
            " repeated.",
        )
        page.figure(
            chart(lambda axes: _draw_cost(axes, self)),
            "Perplexity of the texts under the unsteered model.",
        )
        page.heading("Numbers")
        strength = f"strength ({self.unit})"
        numbers = (strength, "effect", "95% from", "to", "perplexity", "repetition")
        steered = [dose for arm in ARMS for dose in self.arm(arm) if dose.strength != 0]
        asked = [self.asked] if self.asked else []
        page.table(
            ("texts", *numbers, "neutral texts", "coherent"),
            [self._row(dose) for dose in (self.plain, *steered, *asked)],
        )
        page.text(
            "The control makes changes of the same size along random directions. Repetition is the"
            " share of 4-grams that a text has had before."
            + (
                " The mean difference pushes as far along the difference of the mean residuals of"
                " the two kinds of examples."
                if self.arm(DIFFERENCE)[1:]
                else ""
            )
            + (
                " Prompt only: nothing is pushed, and each prompt comes after"
                f" {self.settings['ask']!r}."
                if self.asked
                else ""
            )
            + (
                " Neutral texts: their perplexity while the model that reads them is steered; above"
                f" {self.guard.neutral_ratio:g} times the unsteered one the dose is incoherent."
                if self.plain.capability is not None
                else ""
            ),
            quiet=True,
        )
        page.heading("What followed the first prompt")
        samples: list[tuple[float | str, str]] = [(d.strength, d.sample) for d in self.arm(PLAN)]
        samples += [(ASKED, self.asked.sample)] if self.asked else []
        page.table((strength, "text"), samples)
        page.heading("How these figures were made")
        return page.table(("setting", "value"), list(_flat(self.settings)))

    def _row(self, dose: Dose) -> tuple[Any, ...]:
        arm = dose.arm if dose.strength != 0 or dose is self.asked else "unsteered"
        strength = None if dose is self.asked else dose.strength
        numbers = (strength, dose.effect, dose.low, dose.high, dose.perplexity)
        coherent = "yes" if self.coherent(dose) else "no"
        return (arm, *numbers, dose.repetition, dose.capability, coherent)

    def __str__(self) -> str:
        lines = [
            f"{self.plan}; strength ({self.unit}); effect: {self.meaning}",
            f"{'strength':>9}  {'effect':>6} {'95% interval':>14}  {'control':>7}"
            f"  {'perplexity':>10}  {'repeats':>7}",
        ]
        control = {dose.strength: dose for dose in self.doses if dose.arm == CONTROL}
        for dose in self.arm(PLAN):
            other = control.get(dose.strength)
            pushed = "-" if other is None else f"{other.effect:.3f}"
            height = "-" if dose.perplexity is None else f"{dose.perplexity:.1f}"
            mark = "" if dose.strength == 0 or self.coherent(dose) else "  incoherent"
            lines.append(
                f"{dose.strength:>+9g}  {dose.effect:>6.3f} [{dose.low:.3f}, {dose.high:.3f}]"
                f"  {pushed:>7}  {height:>10}  {dose.repetition:>7.2f}{mark}"
            )
        for other in self._others():
            low, high = f"{other.low:.3f}", f"{other.high:.3f}"
            at = "" if other is self.asked else f" at {other.strength:+g}"
            lines.append(f"{other.arm}{at}: {other.effect:.3f} [{low}, {high}]")
        if self.plain.capability is not None:
            ratios = [
                f"{dose.strength:+g}: {dose.capability / self.plain.capability:.2f}"
                for dose in self.arm(PLAN)[:]
                if dose.strength != 0 and dose.capability is not None
            ]
            lines.append(f"perplexity of neutral texts, times the unsteered: {', '.join(ratios)}")
        return "\n".join(lines)

    def _others(self) -> list[Dose]:
        """The arms beside the plan and the control: the best dose of each."""
        best = self.best(DIFFERENCE)[1]
        return [dose for dose in (best, self.asked) if dose is not None]


def _unit(name: str) -> str:
    return OLD_UNITS.get(name, name)


def _flat(settings: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings as rows of name and value: `model.dtype`, `edits.0.ref`."""
    parts = settings.items() if isinstance(settings, dict) else enumerate(settings)
    for key, value in parts:
        whole = f"{name}.{key}" if name else str(key)
        if isinstance(value, (dict, list)):
            yield from _flat(value, whole)
        else:
            yield whole, str(value)


def _draw_effect(axes: Any, found: Sweep) -> None:
    for arm in reversed(ARMS):
        doses = found.arm(arm)
        if len(doses) == 1 and arm == DIFFERENCE:
            continue
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
    if found.asked:
        axes.axhline(found.asked.effect, color="#b07aa1", lw=1, ls=":", label=ASKED)
    axes.set_xlabel(f"strength ({found.unit})")
    axes.set_ylabel("effect")
    axes.legend()


def _draw_cost(axes: Any, found: Sweep) -> None:
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
        axes.axhline(limit, color="#bb5544", lw=0.8, ls="--", label="limit of coherence")
    axes.set_yscale("log")
    for axis_of in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_of(lambda value, at: f"{value:g}")
    axes.set_xlabel(f"strength ({found.unit})")
    axes.set_ylabel("perplexity")
    axes.legend()
