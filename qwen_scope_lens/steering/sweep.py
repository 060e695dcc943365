"""Sweeps: what a plan does at every strength, and what it costs in coherence.

Each strength is run on all prompts, with the plan and with a control that makes changes of the same
size along random directions. Finished doses are kept, so a sweep that was stopped goes on where it
ended. `Sweep.page` is the report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.errors import BadPlan, StoreMismatch
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.stats import between, draws_of_groups
from qwen_scope_lens.steering.doses import Measure
from qwen_scope_lens.steering.generate import Continuation, Sampling, generate
from qwen_scope_lens.steering.plan import OLD_UNITS, Edit, Plan, check_seed
from qwen_scope_lens.steering.readers import SAEs, with_readers
from qwen_scope_lens.steering.text_quality import perplexity, repetition, surprisals
from qwen_scope_lens.stores.facts import model_facts, versions

__all__ = [
    "CONTROL",
    "PLAN",
    "Dose",
    "Guard",
    "Sweep",
    "sweep",
]

FORMAT, VERSION = "qsl-sweep", 2
OLDER = (1,)  # the unit `typical` was called `sigma`
PLAN, CONTROL = "the plan", "control: random directions"
COLOURS = {PLAN: "#4a7ebb", CONTROL: "#999999"}


@dataclass(frozen=True)
class Guard:
    """Until when a text counts as coherent, compared with the unsteered texts. The defaults are our
    own; no paper gives numbers."""

    perplexity_ratio: float = 2.0
    more_repetition: float = 0.15

    def holds(self, dose: Dose, plain: Dose) -> bool:
        if dose.perplexity is None or plain.perplexity is None:
            return False
        return (
            dose.perplexity <= self.perplexity_ratio * plain.perplexity
            and dose.repetition <= plain.repetition + self.more_repetition
        )


@dataclass(frozen=True)
class Dose:
    """The result of one strength of one arm (`PLAN` or `CONTROL`), over all prompts."""

    arm: str
    strength: float
    effect: float
    low: float  # 95% interval of the effect, bootstrap over the prompts
    high: float
    perplexity: float | None  # of what was written, under the unsteered model
    repetition: float
    sample: str  # what came after the first prompt


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

    @property
    def plain(self) -> Dose:
        return next(dose for dose in self.doses if dose.strength == 0)

    def arm(self, name: str) -> tuple[Dose, ...]:
        """The doses of an arm in the order of their strengths, with the unsteered one."""
        own = [dose for dose in self.doses if dose.arm == name and dose.strength != 0]
        return tuple(sorted([*own, self.plain], key=lambda dose: dose.strength))

    def coherent(self, dose: Dose) -> bool:
        return self.guard.holds(dose, self.plain)

    def best(self) -> tuple[Dose | None, Dose | None]:
        """The coherent doses of the plan with the smallest and the largest effect."""
        fine = [d for d in self.arm(PLAN) if d.strength != 0 and self.coherent(d)]
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
        named = {"unit": "/".join(map(_unit, content["unit"].split("/")))}
        for row in content["settings"]["edits"]:
            row |= {"unit": _unit(row["unit"])}
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
        steered = [dose for arm in (PLAN, CONTROL) for dose in self.arm(arm) if dose.strength != 0]
        page.table(
            ("texts", *numbers, "coherent"), [self._row(dose) for dose in (self.plain, *steered)]
        )
        page.text(
            "The control makes changes of the same size along random directions. Repetition is the"
            " share of 4-grams that a text has had before.",
            quiet=True,
        )
        page.heading("What followed the first prompt")
        page.table((strength, "text"), [(d.strength, d.sample) for d in self.arm(PLAN)])
        page.heading("How these figures were made")
        return page.table(("setting", "value"), list(_flat(self.settings)))

    def _row(self, dose: Dose) -> tuple[Any, ...]:
        arm = dose.arm if dose.strength != 0 else "unsteered"
        numbers = (dose.strength, dose.effect, dose.low, dose.high, dose.perplexity)
        coherent = "yes" if self.coherent(dose) else "no"
        return (arm, *numbers, dose.repetition, coherent)

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
        return "\n".join(lines)


def sweep(
    model: Any,
    plan: Plan | Edit | str,
    strengths: Iterable[float],
    prompts: Sequence[Content],
    measure: Measure | str = "change",
    saes: SAEs = None,
    *,
    tokenizer: Any = None,
    sampling: Sampling | None = None,
    batch: int = 16,
    guard: Guard | None = None,
    seed: int = 0,
    enable_thinking: bool | None = None,
    keep: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    allow_other_model: bool = False,
) -> Sweep:
    """Run a plan and its control at every strength, each edit in its own unit.

    `keep` is a file that is rewritten after every dose: a sweep of the same settings continues from
    it, a sweep of other settings raises. The unsteered texts (strength 0) are always made, once.
    """
    check_seed(seed)
    plan = Plan.of(plan)
    measure = Measure.parse(measure) if isinstance(measure, str) else measure
    sampling, guard = sampling or Sampling(), guard or Guard()
    wanted = sorted({float(strength) for strength in strengths} - {0.0})
    if not wanted:
        raise BadPlan(
            "the only strength is 0, which is unsteered: give at least one other strength"
        )
    plans = {strength: plan.at(strength) for strength in wanted}
    plan_text = "; ".join(f"{e.ref}:{e.op}@{e.where}" for e in plan.edits)
    settings = {
        "model": asdict(model_facts(model, plan.layers)),
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(repr(list(prompts)).encode()).hexdigest(),
        "sampling": asdict(sampling),
        "seed": seed,
        "edits": plan.at(wanted[-1]).to_dict()["edits"],
        "versions": versions(),
    }
    units = "/".join(sorted({edit.unit for edit in plan.edits}))
    empty = Sweep(plan_text, units, measure.name, measure.meaning, settings, (), guard)
    doses = list(_kept(empty, keep))
    saes = with_readers(plan.edits, saes)
    options: dict[str, Any] = {
        "saes": saes,
        "tokenizer": tokenizer,
        "sampling": sampling,
        "batch": batch,
        "enable_thinking": enable_thinking,
        "allow_other_model": allow_other_model,
    }
    plain = generate(model, prompts, None, **options)
    jobs = [(PLAN, 0.0)] + [(arm, strength) for strength in wanted for arm in (PLAN, CONTROL)]
    done = {(dose.arm, dose.strength) for dose in doses}
    for number, (arm, strength) in enumerate(jobs):
        if (arm, strength) not in done:
            texts = plain
            if strength:
                chance = seed if arm == CONTROL else None
                texts = generate(
                    model, prompts, plans[strength], control=chance, must_fire=False, **options
                )
            doses.append(_dose(model, arm, strength, measure, texts, plain))
            if keep is not None:
                _with(empty, doses).save(keep)
        if progress is not None:
            progress(number + 1, len(jobs))
    return _with(empty, doses)


def _dose(
    model: Any,
    arm: str,
    strength: float,
    measure: Measure,
    texts: Sequence[Continuation],
    plain: Sequence[Continuation],
) -> Dose:
    effects = np.array([measure.of(new, old) for new, old in zip(texts, plain, strict=True)])
    effect = between(effects.mean(), draws_of_groups(effects, range(len(effects))))
    repeats = [r for text in texts if (r := repetition(text.ids)) is not None]
    return Dose(
        arm=arm,
        strength=strength,
        effect=effect.value,
        low=effect.low,
        high=effect.high,
        perplexity=perplexity(surprisals(model, texts)),
        repetition=float(np.mean(repeats)) if repeats else 0.0,
        sample=texts[0].text,
    )


def _with(empty: Sweep, doses: Sequence[Dose]) -> Sweep:
    return Sweep(**{**vars(empty), "doses": tuple(doses)})


def _unit(name: str) -> str:
    return OLD_UNITS.get(name, name)


def _kept(empty: Sweep, keep: Path | None) -> tuple[Dose, ...]:
    if keep is None or not keep.exists():
        return ()
    before = Sweep.load(keep)

    def facts(one: Sweep) -> str:
        edits = [{**row, "strength": None} for row in one.settings["edits"]]
        settings = {**one.settings, "edits": edits, "versions": None}
        return json.dumps([one.plan, one.measure, settings], sort_keys=True)

    if facts(before) != facts(empty):
        raise StoreMismatch(
            f"{keep} holds a sweep of other edits, prompts, model or settings: choose another file,"
            " or delete this one"
        )
    return before.doses


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
