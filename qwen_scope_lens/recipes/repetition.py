"""The stages of `repetition-rl` (section 8): the model's own loops, the features that rise in them
and cause them, gates, GRPO with and without rare negatives, and the repeat ratio as it goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.files import whole_file, write_rows
from qwen_scope_lens.models.open import open_model
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.recipes.data import text_rows
from qwen_scope_lens.recipes.engine import Work
from qwen_scope_lens.steering.generate import Sampling, generate
from qwen_scope_lens.stores.corpus import read_corpus
from qwen_scope_lens.stores.extract import extract
from qwen_scope_lens.stores.store import FeatureStore
from qwen_scope_lens.train.causes import amplified, own_loops, screen_causes
from qwen_scope_lens.train.metrics import repeat_ratio
from qwen_scope_lens.train.repetition_features import find_repetition_features
from qwen_scope_lens.train.runs import run_grpo

__all__ = ["causes", "draw", "gates", "loops", "ratios", "rises", "train"]

ARMS = {"rare negatives": 1, "vanilla": 0}
"""How many rollouts of a group are steered."""


def loops(work: Work) -> Mapping[str, Any]:
    """Replies of the model itself that end in a loop."""
    prompts = [row["text"] for row in text_rows(work, "prompts")]
    prompts = prompts[: work["loop_prompts"]]
    found = own_loops(
        work.model(),
        prompts,
        samples=work["samples"],
        sampling=_sampling(work),
        batch=work["batch"],
    )
    asked = len(prompts) * work["samples"]
    if len(found) < 4:
        raise TooLittleData(
            f"{len(found)} of {asked} replies end in a loop, and four are needed: give more or"
            " longer replies (loop_prompts, samples, new_tokens), or a lower temperature"
        )
    rows = ({"text": prompt + reply.text} for prompt, reply in found)
    write_rows(work.path("loops", "loops.jsonl"), rows)
    return {"loops": len(found), "replies": asked}


def rises(work: Work) -> Mapping[str, Any]:
    """The features that rise most from the first to the last copy of a repeated token."""
    work.result("loops")
    store = extract(
        read_corpus(work.path("loops", "loops.jsonl"), text="text"),
        model=work.model(),
        group=work["sae"],
        layers=work.layers,
        out=work.path("rises", "store"),
        sae_revision=work["sae_revision"],
        progress=not work.is_smoke,
        **work.options,
    )
    found = find_repetition_features(
        FeatureStore.open(store.path),
        context=work["context"],
        min_times=work["min_times"],
        top=work["top"],
        seed=work["seed"],
    )
    found.save(work.path("rises", "features.json"))
    return {
        "model": store.manifest.model,
        "features": [
            {"feature": str(f.ref), "rise": f.rise, "held_out": f.held_out, "z": f.z}
            for f in found.features[: work["candidates"]]
        ],
    }


def causes(work: Work) -> Mapping[str, Any]:
    """Which of the candidates make the model loop, beside random directions of the same norm."""
    from qwen_scope_lens.address import FeatureRef

    refs = [FeatureRef.parse(row["feature"]) for row in work.result("rises")["features"]]
    found = screen_causes(
        work.model(),
        refs,
        _others(work)[: work["screen_prompts"]],
        strength=work["strength"],
        samples=work["samples"],
        controls=work["controls"],
        sampling=_sampling(work),
        batch=work["batch"],
    )
    return {
        "untouched": found.untouched.interval,
        "controls": [control.value for control in found.controls],
        "candidates": [
            {
                "feature": str(c.ref),
                "ratio": c.ratio.interval,
                "above": c.above,
                "low": c.low,
                "kept": c.kept,
            }
            for c in found.candidates
        ],
    }


def gates(work: Work) -> Mapping[str, Any]:
    """Before training, on prompts of their own: steered replies loop, random directions do not."""
    screened = work.result("causes")["candidates"]
    kept = [row["feature"] for row in screened if row["kept"]]
    if not kept and work["gates"]:
        raise TooLittleData(
            "no candidate makes the model loop more often than random directions, so there is no"
            " rare negative to train with. Try more candidates, another strength or other layers;"
            " --set gates=false trains with the best candidate all the same"
        )
    from qwen_scope_lens.address import FeatureRef

    best = FeatureRef.parse((kept or [screened[0]["feature"]])[0])
    plan = amplified([best], work["strength"])
    prompts = _others(work)[work["screen_prompts"] :][: work["gate_prompts"]]
    model, sampling = work.model(), _sampling(work)
    found = {}
    for name, used, control in (
        ("untouched", None, None),
        ("steered", plan, None),
        ("random direction", plan, work["seed"]),
    ):
        replies = generate(
            model, prompts, used, sampling=sampling, batch=work["batch"], control=control,
            must_fire=False,
        )  # fmt: skip
        found[name] = repeat_ratio([reply.ids for reply in replies]).interval
    low, high = work["gate_steered"], work["gate_random"]
    passed = found["steered"].value > low and found["random direction"].value < high
    if work["gates"] and not passed:
        raise TooLittleData(
            f"the gates before training are not passed: steered replies loop in"
            f" {found['steered']} (above {low:g} is wanted), with a random direction in"
            f" {found['random direction']} (below {high:g}). Change strength, layers or prompts, or"
            " --set gates=false"
        )
    plan.save(work.path("gates", "plan.json"))
    return {**found, "passed": passed, "feature": str(best), "prompts": len(prompts)}


def train(work: Work) -> Mapping[str, Any]:
    """GRPO with one steered rollout in each group, and without. A stopped run goes on."""
    work.trained_model()
    plan = work.path("gates", "plan.json").resolve()
    data = work.path("train", "prompts.jsonl")
    prompts = [row["text"] for row in text_rows(work, "train")]
    write_rows(data, ({"prompt": text} for text in prompts))
    for arm, steered in ARMS.items():
        work.say(arm)
        trainer = {"steered_per_group": steered, "save_strategy": "steps"}
        more = {"plan": str(plan), "rewards": work["rewards"]}
        run_grpo(work.training_run(arm.replace(" ", "-"), data, trainer, **more))
    return {"arms": {arm: arm.replace(" ", "-") for arm in ARMS}, "prompts": len(prompts)}


def ratios(work: Work) -> Mapping[str, Any]:
    """The repeat ratio on held-out prompts, before training and at every checkpoint."""
    prompts = [row["text"] for row in text_rows(work, "heldout")][: work["heldout_prompts"]]
    sampling = _sampling(work)
    done = work.path("ratios", "replies.json")
    found: dict[str, Any] = json.loads(done.read_text()) if done.exists() else {}
    jobs: list[tuple[str, int, Path | None]] = [("before", 0, None)]
    for arm, folder in work.result("train")["arms"].items():
        places = work.path("train", folder).glob("checkpoint-*")
        steps = {int(re.sub(r"\D", "", place.name)): place for place in places}
        jobs += [(arm, step, steps[step]) for step in sorted(steps)]
    for arm, step, place in jobs:
        if str(step) in found.get(arm, {}):
            continue  # a stopped stage keeps the checkpoints that are measured
        work.say(f"{arm}, step {step}")
        device = work.options.get("device")
        model = work.model() if place is None else open_model(place, device=device)
        replies = generate(model, prompts, sampling=sampling, batch=work["batch"])
        ratio = repeat_ratio([reply.ids for reply in replies]).interval
        mine = found.setdefault(arm, {})
        mine[str(step)] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
        with whole_file(done) as path:
            path.write_text(json.dumps(found))
    last = {arm: list(mine.values())[-1] for arm, mine in found.items()}
    return {"curves": found, "last": last, "prompts": len(prompts), "tasks": work["tasks"]}


def _sampling(work: Work) -> Sampling:
    return Sampling(work["new_tokens"], work["temperature"], work["top_p"], work["seed"])


def _others(work: Work) -> list[str]:
    """Prompts on which no loop was collected."""
    return [row["text"] for row in text_rows(work, "prompts")][work["loop_prompts"] :]


def draw(page: Page, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The part of the page that only this recipe has."""
    found, gate = results["causes"], results["gates"]
    page.heading("Loops and their features")
    page.text(
        f"{results['loops']['loops']} of {results['loops']['replies']} replies of the model end in"
        " a loop. The features that rise most in them:"
    )
    page.table(
        ("feature", "rise", "held out", "z"),
        [tuple(row.values()) for row in results["rises"]["features"]],
    )
    page.text("Repeat ratio while each of them is amplified:")
    page.table(
        ("feature", "ratio", "from", "to", "above random", "at least", "kept"),
        [
            (
                row["feature"],
                *(row["ratio"][key] for key in ("value", "low", "high")),
                row["above"],
                row["low"],
                "yes" if row["kept"] else "no",
            )
            for row in found["candidates"]
        ],
    )
    page.text(
        f"Random directions: {', '.join(f'{value:.3f}' for value in found['controls'])}; untouched:"
        f" {found['untouched']['value']:.3f}."
    )
    page.heading("Gates before training")
    names = ("untouched", "steered", "random direction")
    page.table(
        ("replies", "repeat ratio", "from", "to"),
        [(name, *(gate[name][key] for key in ("value", "low", "high"))) for name in names],
    )
    page.text(
        f"{gate['feature']}, {gate['prompts']} prompts: "
        + ("passed." if gate["passed"] else "not passed, and the recipe went on (gates: false).")
    )
    page.heading("Repeat ratio on held-out prompts")
    curves = results["ratios"]["curves"]
    page.figure(chart(partial(_curves, curves)), "At every checkpoint, with 95% intervals")
    page.table(
        ("arm", "step", "repeat ratio", "from", "to"),
        [
            (arm, int(step), *(cell[key] for key in ("value", "low", "high")))
            for arm, mine in curves.items()
            for step, cell in mine.items()
        ],
    )
    if results["ratios"]["tasks"]:
        page.heading("Capabilities")
        page.text("They are measured by lm-eval, with one command per arm in this folder:")
        page.verbatim(_commands(results["train"]["arms"], results["ratios"]["tasks"]))


def _commands(arms: Mapping[str, str], tasks: Sequence[str]) -> str:
    return "\n".join(
        f"lm-eval run --model hf --model_args pretrained=train/{place}/final"
        f" --tasks {','.join(tasks)}"
        for place in arms.values()
    )


def _curves(curves: Mapping[str, Mapping[str, Any]], axes: Any) -> None:
    before = curves["before"]["0"]
    for number, arm in enumerate(name for name in curves if name != "before"):
        points = {0: before, **{int(step): cell for step, cell in curves[arm].items()}}
        x = sorted(points)
        axes.plot(x, [points[i]["value"] for i in x], "o-", ms=4, color=f"C{number}", label=arm)
        low, high = ([points[i][end] for i in x] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=f"C{number}", alpha=0.15, lw=0)
    axes.set(xlabel="step", ylabel="repeat ratio", ylim=(0, None))
    axes.legend(fontsize=7)
