"""Sweeps: what a plan does at every strength, and what it costs in coherence.

Each strength is run on all prompts, with the plan and with a control that makes changes of the same
size along random directions. Where they are asked for, there are two more arms (`arms.py`): the
same push along the mean difference of activations, and the prompt that simply asks for the effect.
Finished doses are kept, so a sweep that was stopped goes on where it ended. `Sweep.page` is the
report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.errors import BadPlan, StoreMismatch
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.stats import between, draws_of_groups
from qwen_scope_lens.steering.arms import Examples, asking, capability, mean_difference
from qwen_scope_lens.steering.doses import Measure
from qwen_scope_lens.steering.generate import Continuation, Sampling, generate
from qwen_scope_lens.steering.plan import Edit, Plan, check_seed
from qwen_scope_lens.steering.readers import SAEs, with_readers
from qwen_scope_lens.steering.sweep_result import (
    ASKED,
    CONTROL,
    DIFFERENCE,
    FORMAT,
    PLAN,
    VERSION,
    Dose,
    Guard,
    Sweep,
)
from qwen_scope_lens.steering.text_quality import perplexity, repetition, surprisals
from qwen_scope_lens.stores.facts import model_facts
from qwen_scope_lens.version import versions

__all__ = [
    "ASKED",
    "CONTROL",
    "DIFFERENCE",
    "FORMAT",
    "PLAN",
    "VERSION",
    "Dose",
    "Guard",
    "Sweep",
    "sweep",
]


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
    ask: str | None = None,
    examples: Examples | None = None,
    neutral: Sequence[str] = (),
    keep: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    allow_other_model: bool = False,
) -> Sweep:
    """Run a plan and its control at every strength, each edit in its own unit.

    `ask` adds the arm in which nothing is pushed and each prompt comes after this instruction.
    `examples` add the arm that pushes as far along their mean difference. With `neutral` texts
    every dose says how well the steered model still reads these, and one that reads them badly does
    not count as coherent.

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
    if ask is not None:
        settings["ask"] = ask
    if examples is not None:
        settings["examples_sha256"] = examples.sha256
    if neutral:
        settings["neutral_sha256"] = hashlib.sha256(repr(list(neutral)).encode()).hexdigest()
    units = "/".join(sorted({edit.unit for edit in plan.edits}))
    empty = Sweep(plan_text, units, measure.name, measure.meaning, settings, (), guard)
    doses, asked = _kept(empty, keep)
    asked_prompts = None if ask is None else asking(prompts, ask)
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
    controls: dict[str, Any] = {PLAN: None, CONTROL: seed}
    if examples is not None:
        controls[DIFFERENCE] = mean_difference(model, examples, plan.layers, tokenizer)
    jobs = [(PLAN, 0.0)] + [(arm, strength) for strength in wanted for arm in controls]
    jobs += [] if asked_prompts is None else [(ASKED, 0.0)]
    done = {(dose.arm, dose.strength) for dose in doses} | ({(ASKED, 0.0)} if asked else set())
    for number, (arm, strength) in enumerate(jobs):
        if (arm, strength) not in done:
            texts, cost = plain, None
            if strength:
                how: dict[str, Any] = {"control": controls[arm], **options}
                texts = generate(model, prompts, plans[strength], must_fire=False, **how)
            elif asked_prompts is not None and arm == ASKED:
                texts = generate(model, asked_prompts, None, **options)
            if neutral and arm not in (CONTROL, ASKED):
                cost = capability(
                    model,
                    neutral,
                    plans.get(strength),
                    saes,
                    control=controls[arm],
                    tokenizer=tokenizer,
                    allow_other_model=allow_other_model,
                )
            dose = _dose(model, arm, strength, measure, texts, plain, cost)
            if arm == ASKED:
                asked = dose
            else:
                doses.append(dose)
            if keep is not None:
                _with(empty, doses, asked).save(keep)
        if progress is not None:
            progress(number + 1, len(jobs))
    return _with(empty, doses, asked)


def _dose(
    model: Any,
    arm: str,
    strength: float,
    measure: Measure,
    texts: Sequence[Continuation],
    plain: Sequence[Continuation],
    cost: float | None,
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
        capability=cost,
    )


def _with(empty: Sweep, doses: Sequence[Dose], asked: Dose | None) -> Sweep:
    return Sweep(**{**vars(empty), "doses": tuple(doses), "asked": asked})


def _kept(empty: Sweep, keep: Path | None) -> tuple[list[Dose], Dose | None]:
    if keep is None or not keep.exists():
        return [], None
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
    return list(before.doses), before.asked
