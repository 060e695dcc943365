"""Selection by cause: does a feature move the model towards a concept, and more than other ways do?

A feature that fires on a concept need not cause it. Each feature is added in a few doses while the
model continues a few prompts (`sweep`), beside random directions of the same size, the mean
difference of activations, and the prompt that simply asks. Of every arm the strongest coherent dose
counts, so that each way of steering is judged at its best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.models.verify import sample_texts
from qwen_scope_lens.steering.arms import Examples, likeness
from qwen_scope_lens.steering.doses import Measure
from qwen_scope_lens.steering.generate import Sampling
from qwen_scope_lens.steering.plan import Edit
from qwen_scope_lens.steering.sweep import sweep
from qwen_scope_lens.steering.sweep_result import CONTROL, DIFFERENCE, PLAN, Sweep
from qwen_scope_lens.tables import Table, View

__all__ = ["DOSES", "PROMPTS", "Cause", "Causes", "causes"]

PROMPTS = (
    "The most important thing to know is",
    "Yesterday in the morning",
    "Here is what happened:",
    "She looked at the letter and",
    "There are two ways to do this.",
    "At the end of the day",
)
DOSES = (0.1, 0.2, 0.4)
"""In parts of the residual's length, so that no calibration is needed."""
LEAST_PROMPTS = 4
NEUTRAL = 12
"""How many of the bundled texts the steered model reads."""


@dataclass(frozen=True)
class Cause:
    """What adding one feature did, beside the other arms; None: no dose of that arm is coherent."""

    ref: str
    dose: float | None  # in parts of the residual's length
    effect: float | None
    low: float | None  # 95% interval over the prompts
    high: float | None
    unsteered: float
    random: float | None
    difference: float | None
    asked: float | None
    cost: float | None  # perplexity of neutral texts, times the unsteered one
    verdict: str


@dataclass(frozen=True, repr=False)
class Causes(View):
    """The features in the order in which they move the concept."""

    rows: tuple[Cause, ...]
    meaning: str
    prompts: int
    doses: tuple[float, ...]
    ask: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self, most: int | None = None) -> Table:
        """A row per feature, the strongest effect first."""
        rows = self.rows if most is None else self.rows[:most]
        columns = ("feature", "dose", "effect", "95% from", "to", "unsteered", "random")
        more = ("mean difference", "asked", "neutral texts", "verdict")
        return Table.of(
            (*columns, *more),
            [
                (
                    row.ref,
                    row.dose,
                    row.effect,
                    row.low,
                    row.high,
                    row.unsteered,
                    row.random,
                    row.difference,
                    row.asked,
                    row.cost,
                    row.verdict,
                )
                for row in rows
            ],
            above=(
                f"effect: {self.meaning}; {self.prompts} prompts",
                f"doses of {', '.join(f'{dose:g}' for dose in self.doses)} of the residual's"
                " length; of each arm the strongest coherent one",
            ),
            below=(
                *(() if self.ask is None else (f"asked: each prompt after {self.ask!r}",)),
                "neutral texts: their perplexity under the plan, times the unsteered one",
            ),
            more=len(self.rows) - len(rows),
            formats={"dose": "g", "neutral texts": ".2f"},
        )

    def __str__(self) -> str:
        return self.table().text()


def causes(
    model: Any,
    refs: Iterable[FeatureRef | str],
    measure: Measure | str | None = None,
    *,
    examples: Examples | None = None,
    ask: str | None = None,
    prompts: Sequence[Content] = PROMPTS,
    doses: Sequence[float] = DOSES,
    sampling: Sampling | None = None,
    seed: int = 0,
    enable_thinking: bool | None = None,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
    allow_other_model: bool = False,
) -> Causes:
    """Test features by adding them, one at a time.

    `measure` says what the concept is in a text; by default it is `likeness` to the examples.
    Without `examples` there is no arm for their mean difference, and without `ask` none for the
    prompt.
    """
    wanted = [FeatureRef.parse(ref) for ref in refs]
    if measure is None:
        if examples is None:
            raise BadPlan("there is nothing to measure: give a measure, or examples of the concept")
        measure = likeness(model, examples, tokenizer)
    measure = Measure.parse(measure) if isinstance(measure, str) else measure
    rows = []
    for number, ref in enumerate(wanted):

        def step(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(number * total + done, len(wanted) * total)

        found = sweep(
            model,
            Edit(ref, "add", 1.0, unit="norm"),
            doses,
            prompts,
            measure,
            sampling=sampling or Sampling(new_tokens=24),
            seed=seed,
            enable_thinking=enable_thinking,
            tokenizer=tokenizer,
            ask=ask,
            examples=examples,
            neutral=sample_texts()[:NEUTRAL],
            progress=step,
            allow_other_model=allow_other_model,
        )
        rows.append(cause_of(ref, found))
    rows.sort(key=lambda row: -(row.effect if row.effect is not None else -float("inf")))
    return Causes(tuple(rows), measure.meaning, len(prompts), tuple(map(float, doses)), ask)


def cause_of(ref: FeatureRef, found: Sweep) -> Cause:
    best = {arm: found.best(arm)[1] for arm in (PLAN, CONTROL, DIFFERENCE)}
    mine, chance, mean = best[PLAN], best[CONTROL], best[DIFFERENCE]
    cost = None
    if mine and mine.capability is not None and found.plain.capability:
        cost = mine.capability / found.plain.capability
    nothing = max(found.plain.effect, chance.effect if chance else found.plain.effect)
    if mine is None:
        verdict = "no dose is coherent"
    elif found.settings["prompts"] < LEAST_PROMPTS:
        verdict = f"{LEAST_PROMPTS} prompts are needed for a verdict"
    elif mine.low <= nothing:
        verdict = "no effect beyond random directions"
    else:
        better = [
            name
            for name, dose in (("asking", found.asked), ("the mean difference", mean))
            if dose is not None and dose.effect > mine.effect
        ]
        moves = "moves" if len(better) == 1 else "move"
        verdict = f"moves it; {' and '.join(better)} {moves} it more" if better else "moves it"
    return Cause(
        ref=str(ref),
        dose=mine.strength if mine else None,
        effect=mine.effect if mine else None,
        low=mine.low if mine else None,
        high=mine.high if mine else None,
        unsteered=found.plain.effect,
        random=chance.effect if chance else None,
        difference=mean.effect if mean else None,
        asked=found.asked.effect if found.asked else None,
        cost=cost,
        verdict=verdict,
    )
