"""The stages of `steering-cases` (section 3): a named feature is found, blamed and steered.

The paper names features by number only, so the first stage looks in every layer of the recipe
whether that number fires on the case's texts and not on the texts beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.classify.feature_choice import rate_differences
from qwen_scope_lens.errors import BadFile, TooLittleData
from qwen_scope_lens.features.pool import pool
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.recipes.data import text_rows
from qwen_scope_lens.recipes.engine import Work
from qwen_scope_lens.steering.blame import Case
from qwen_scope_lens.steering.blame import blame as suspects
from qwen_scope_lens.steering.calibrate import calibrate_from_store
from qwen_scope_lens.steering.generate import Sampling
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.sweep import CONTROL, PLAN, Dose, sweep
from qwen_scope_lens.stores.extract import extract
from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["blame", "doses", "draw", "layers"]

TOP = 100
"""So many suspects of a bad reply are looked through for the feature."""


CASE = ("feature", "texts", "others", "suppress", "prompts", "chat", "measure")
"""What a case has to say. `layer` and `reply` may be missing."""
REPLY = ("prompt", "text", "classes")


def layers(work: Work) -> Mapping[str, Any]:
    """How often the feature of this number fires on the case's texts and on others, by layer."""
    _check_cases(work["cases"])
    rows = []
    for name, case in work["cases"].items():
        for source, positive in ((case["texts"], True), (case["others"], False)):
            texts = [row["text"] for row in text_rows(work, source)]
            rows += [{"text": text, "case": name, "positive": positive} for text in texts]
    store = extract(
        rows,
        model=work.model(),
        group=work["sae"],
        layers=work.layers,
        out=work.folder,
        max_tokens=work["max_tokens"],
        sae_revision=work["sae_revision"],
        progress=not work.is_smoke,
        **work.options,
    )
    cases, is_positive = store.labels("case"), store.labels("positive").astype(bool)
    found: dict[str, Any] = {}
    for name, case in work["cases"].items():
        docs, feature = np.flatnonzero(cases == name), case["feature"]
        table: list[dict[str, Any]] = []
        for layer in store.layers:
            x = pool(store, layer, how="max", docs=docs)
            truth = is_positive[docs]
            difference = rate_differences(x, truth)
            mine = x[:, [feature]].toarray()[:, 0]
            table.append(
                {
                    "layer": layer,
                    "rate": float((mine[truth] > 0).mean()),
                    "elsewhere": float((mine[~truth] > 0).mean()),
                    "mean": float(mine[truth].mean()),
                    "place": int((difference > difference[feature]).sum()) + 1,
                }
            )
        best = max(table, key=lambda row: (row["rate"] - row["elsewhere"], row["mean"]))
        if best["rate"] <= best["elsewhere"] and case.get("layer") is None:
            raise TooLittleData(
                f"case {name}: feature {feature} of {work['sae']} fires on its texts no more often"
                f" than on others, in none of the layers {work['layers']}: try other layers or the"
                f" other group, or name one with --set cases.{name}.layer=N"
            )
        layer = best["layer"] if case.get("layer") is None else case["layer"]
        found[name] = {"layers": table, "layer": layer}
    return {"cases": found, "model": store.manifest.model}


def blame(work: Work) -> Mapping[str, Any]:
    """The paper's way to a feature: the strongest on the bad tokens of a bad reply."""
    chosen = work.result("layers")["cases"]
    found = {}
    for name, case in work["cases"].items():
        if not case.get("reply"):
            continue
        ref = _sae(work, chosen[name]["layer"])
        ranked = suspects(
            work.model(),
            [ref],
            [Case(case["reply"]["prompt"], case["reply"]["text"])],
            classes=case["reply"]["classes"],
            top=TOP,
        )
        numbers = [one.ref.feature for one in ranked]
        place = numbers.index(case["feature"]) + 1 if case["feature"] in numbers else None
        found[name] = {"place": place, "first": [str(one.ref) for one in ranked[:5]]}
    return {"cases": found}


def doses(work: Work) -> Mapping[str, Any]:
    """Sweeps of every case; a stopped one goes on with the next dose."""
    chosen, model = work.result("layers")["cases"], work.model()
    store = FeatureStore.open(work.path("layers"))
    found: dict[str, Any] = {}
    for name, case in work["cases"].items():
        work.say(f"case {name}")
        ref = _sae(work, chosen[name]["layer"]).feature(case["feature"])
        prompts: list[Any] = [row["text"] for row in text_rows(work, case["prompts"])]
        if case["chat"]:
            prompts = [[{"role": "user", "content": text}] for text in prompts]
        plan = Plan([Edit(ref, "add", 1.0, "typical", work["where"])])
        plan = plan.calibrated(calibrate_from_store(store, [ref]))
        sign = -1 if case["suppress"] else 1
        swept = sweep(
            model,
            plan,
            [sign * strength for strength in work["strengths"]],
            prompts,
            case["measure"],
            sampling=Sampling(work["new_tokens"], seed=work["seed"]),
            seed=work["seed"],
            enable_thinking=False,
            keep=work.path("doses", f"{name}.json"),
        )
        fine = [d for d in swept.arm(PLAN) if d.strength and swept.coherent(d)]
        pick = min if case["suppress"] else max
        best = pick(fine or swept.arm(PLAN), key=lambda dose: dose.effect)
        control = {dose.strength: dose for dose in swept.arm(CONTROL)}[best.strength]
        found[name] = {
            "feature": str(ref),
            "measure": swept.meaning,
            "unsteered": _effect(swept.plain),
            "best": {**asdict(best), **_effect(best), "coherent": bool(fine)},
            "control": _effect(control),
            "doses": [
                {**asdict(dose), **_effect(dose), "coherent": swept.coherent(dose)}
                for arm in (PLAN, CONTROL)
                for dose in swept.arm(arm)
            ],
        }
    return found


def _check_cases(cases: Any) -> None:
    """Before a model is loaded: every case is a mapping with all its keys."""
    if not isinstance(cases, Mapping) or not cases:
        raise BadFile(f"cases is {cases!r:.60}: expected a mapping of names to cases")
    for name, case in cases.items():
        parts: list[tuple[str, Any, tuple[str, ...]]] = [(f"cases.{name}", case, CASE)]
        if isinstance(case, Mapping) and case.get("reply"):
            parts.append((f"cases.{name}.reply", case["reply"], REPLY))
        for place, part, needed in parts:
            if not isinstance(part, Mapping):
                raise BadFile(
                    f"{place} is {part!r:.60}: expected a mapping with {', '.join(needed)}"
                )
            if lost := [key for key in needed if part.get(key) is None]:
                raise BadFile(
                    f"{place} lacks {', '.join(lost)}: it needs {', '.join(needed)}, as in"
                    " `qsl reproduce show steering-cases --yaml`"
                )


def _sae(work: Work, layer: int) -> LayerRef:
    return LayerRef(find_group(work["sae"]).short, layer)


def _effect(dose: Dose) -> dict[str, float]:
    return {"value": dose.effect, "low": dose.low, "high": dose.high}


def draw(page: Page, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The part of the page that only this recipe has."""
    for name, case in results["doses"].items():
        where = results["layers"]["cases"][name]
        page.heading(f"Case {name}: {case['feature']}")
        page.text("The paper does not name the layer. The feature of this number, layer by layer:")
        page.table(
            ("layer", "fires on the case's texts", "on the others", "mean", "place in its layer"),
            [tuple(row.values()) for row in where["layers"]],
        )
        blamed = results["blame"]["cases"].get(name)
        if blamed is not None:
            place = blamed["place"]
            stands = f"at place {place}" if place else f"not among the first {TOP}"
            page.text(
                f"Among the features that the bad reply activates it stands {stands}; the first are"
                f" {', '.join(blamed['first'])}."
            )
        page.figure(
            chart(partial(_doses, case)),
            f"Effect: {case['measure']}. Shaded: 95% intervals over prompts. Hollow: incoherent",
        )
        page.table(
            ("arm", "strength", "effect", "from", "to", "perplexity", "repetition", "coherent"),
            [
                (
                    *(d[key] for key in ("arm", "strength", "value", "low", "high")),
                    *(d[key] for key in ("perplexity", "repetition")),
                    "yes" if d["coherent"] else "no",
                )
                for d in case["doses"]
            ],
        )
        page.text("What followed the first prompt:")
        page.table(
            ("strength", "text"),
            [(d["strength"], d["sample"]) for d in case["doses"] if d["arm"] == PLAN],
        )


def _doses(case: Mapping[str, Any], axes: Any) -> None:
    for arm, colour in ((CONTROL, "#999999"), (PLAN, "#4a7ebb")):
        mine = [dose for dose in case["doses"] if dose["arm"] == arm]
        x = [dose["strength"] for dose in mine]
        axes.plot(x, [dose["value"] for dose in mine], color=colour, label=arm)
        low, high = ([dose[end] for dose in mine] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        for dose in mine:
            fill = colour if dose["coherent"] else "none"
            axes.plot(dose["strength"], dose["value"], "o", ms=5, color=colour, mfc=fill)
    axes.set(xlabel="strength in typical activations", ylabel="effect")
    axes.legend(fontsize=7)
