"""The stages of `safety-synthesis` (section 6): which features safety data lacks, data written for
them, coverage, and what models that were trained on it answer and refuse.

Targets, synthesis and coverage are those of `qsl synth`. Beside the feature-driven arm there is a
random one: the same pipeline with prompts that describe no feature and keep what they get. Answers
of generators and judges are kept in FOLDER/paid, which no changed setting clears.
`safety_roles.py` opens writers and judges, `safety_arms.py` has the fine-tuning arms and the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import GeneratorFailed, TooLittleData
from qwen_scope_lens.features.pool import firing, pool
from qwen_scope_lens.labels.describe import describe
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.recipes.engine import Work
from qwen_scope_lens.recipes.safety_arms import draw, rates, shuffled, train
from qwen_scope_lens.recipes.safety_roles import (
    check_choices,
    check_roles,
    loader,
    open_roles,
    paid_folder,
    synth_recipe,
    templates_folder,
    within_limit,
)
from qwen_scope_lens.stores.extract import extract
from qwen_scope_lens.stores.store import FeatureStore
from qwen_scope_lens.synth.find import find_targets
from qwen_scope_lens.synth.judgements import choose_relevance, kinds_by_judge, with_kinds
from qwen_scope_lens.synth.report import make_report
from qwen_scope_lens.synth.run import MAY_CHANGE, open_reader, run_folder, save, synthesise
from qwen_scope_lens.synth.run import read_rows as read_candidates
from qwen_scope_lens.synth.targets import TargetSet, curve, documents_firing
from qwen_scope_lens.writers.ledger import Ledger, Prices
from qwen_scope_lens.writers.templates import Templates

__all__ = ["coverage", "draw", "rates", "roles", "strata", "synthesis", "targets", "train"]

FEATURE, RANDOM = "feature", "random"


def roles(work: Work) -> Mapping[str, Any]:
    """Refuse a run without its writers and judges before the first text is read."""
    check_choices(work)
    judged = work["relevance"] == "judge" or work["kind_from"] == "feature"
    needed = ["generator"]
    if judged or synth_recipe(work).check_rewrites:
        needed.append("judge")
    if str(work["generator"]).startswith("steer:"):
        needed.append("random_generator")  # the random arm is not steered
    return check_roles(work, needed)


def strata(work: Work) -> Mapping[str, Any]:
    """Two stores of prompts: the seed data and, of other rows, the anchor data of the task."""
    seed, anchor = [], []
    for kind in work["types"]:
        rows = shuffled(work, kind)
        first, second = work["seed_per_type"], work["anchor_per_type"]
        if len(rows) < first + second:
            raise TooLittleData(
                f"source {kind} has {len(rows)} rows: expected seed_per_type + anchor_per_type ="
                f" {first} + {second}. Lower one of them with --set"
            )
        labelled = [{"text": row["text"], "type": kind, "kind": row["kind"]} for row in rows]
        seed += labelled[:first]
        anchor += labelled[first : first + second]
    for name, some in (("seed", seed), ("anchor", anchor)):
        store = extract(
            some,
            model=work.model(),
            group=work["sae"],
            layers=work.layers,
            out=work.path("strata", name),
            max_tokens=work["max_tokens"],
            sae_revision=work["sae_revision"],
            progress=not work.is_smoke,
            **work.options,
        )
    return {"seed": len(seed), "anchor": len(anchor), "model": store.manifest.model}


def targets(work: Work) -> Mapping[str, Any]:
    """T by relevance (equation 19), and the features of it that the seed data lacks."""
    seed, anchor = (FeatureStore.open(work.path("strata", name)) for name in ("seed", "anchor"))
    opened = open_roles(work, loader(work))
    templates, prices = Templates(templates_folder(work)), Prices(**work["prices"])
    paid = paid_folder(work, "targets", work.result("strata"), work["task"])
    labels = None
    if work["labels"] is not None:
        labels = LabelPack.read(work.uses(Path(work["labels"])))
    elif work["describer"] is not None:
        describer = opened.open(work["describer"])
        known = [ref for layer in seed.layers for ref in _often(work, anchor, layer)]
        with Ledger.open(paid / "describe", prices) as book:
            labels = describe(
                anchor, known, describer, book, templates=templates, progress=not work.is_smoke
            )
            within_limit(book)
        labels.write(work.path("targets", "labels.jsonl"))
    way, judge = work["relevance"], opened.open(work["judge"]) if work["judge"] else None
    relevance = choose_relevance(
        anchor,
        labels if way == "judge" else None,
        layers=seed.layers,
        contrast=way if "=" in way else None,
        judge=judge if way == "judge" else None,
        task=work["task"],
        templates=templates_folder(work),
        ledger=paid / "judge",
        prices=prices,
        passages=work["passages"],
    )
    found = find_targets(
        seed,
        anchor,
        relevance=relevance,
        least_relevance=work["least_relevance"],
        threshold=work["threshold"],
        weak_below=work["weak_below"],
        least_documents=work["least_documents"],
        labels=labels,
        task=work["task"],
        passages=work["passages"],
    )
    if work["kind_from"] == "feature" and judge is not None:
        with Ledger.open(paid / "judge", prices) as book:
            found = with_kinds(found, kinds_by_judge(found, judge, book, templates))
            within_limit(book)
        found = with_kinds(found, rest=work["kind_rest"])
    found.save(work.path("targets", "targets.json"))
    return {
        "targets": len(found),
        "missing": len(found.missing),
        "weak": len(found.weak),
        "wanted": len(found.wanted),
        "described": sum(bool(one.description) for one in found.targets),
        "coverage": 100 * found.seed_coverage,
        "text": str(found),
    }


def synthesis(work: Work) -> Mapping[str, Any]:
    """Equations 21 and 22 for each wanted feature, and as many texts that no feature directs."""
    wanted = TargetSet.load(work.path("targets", "targets.json"))
    load = loader(work)
    reader, saes = open_reader(wanted, load(work["model"]), work.options.get("device") or "cpu")
    typical = {one.ref: one.typical for one in wanted.wanted if one.typical > 0}
    opened = replace(open_roles(work, load), typical=typical, saes=saes)
    recipe = synth_recipe(work).at_least(wanted.threshold)
    undirected = recipe.for_steering().change(
        read="none", per_feature=work["budget"], attempts=work["budget"]
    )
    found: dict[str, Any] = {}
    budget, counts = work["budget"], work["budget_counts"]
    steered = str(work["generator"]).startswith("steer:")
    for arm, how, writer in (
        (FEATURE, recipe.for_steering() if steered else recipe, work["generator"]),
        (RANDOM, undirected, work["random_generator"] or work["generator"]),
    ):
        work.say(f"{arm} synthesis")
        fixed = {key: value for key, value in how.to_dict().items() if key not in MAY_CHANGE}
        names = [writer, work["replier"], work["judge"], work["model"], work["templates"]]
        folder = paid_folder(work, arm, wanted.digest, fixed, names)
        run = synthesise(
            wanted,
            folder / "data.jsonl",
            writer=opened.open(writer),
            reader=reader,
            budget=budget,
            counts=counts,
            recipe=how,
            replier=opened.open(work["replier"]) if work["replier"] else None,
            judge=opened.open(work["judge"]) if work["judge"] else None,
            templates=Templates(templates_folder(work)),
            prices=Prices(**work["prices"]),
            wave=work["wave"],
            model=str(work["model"]),
            progress=not work.is_smoke,
        )
        save(run, folder / "data.jsonl")  # of a longer run before, only this part
        within_limit(run.ledger)
        if not run.kept:
            raise GeneratorFailed(
                f"{arm} synthesis kept none of {len(run.candidates)} texts: see the outcomes in"
                f" {run_folder(folder / 'data.jsonl')}, and change the generator or the templates"
            )
        found[arm] = {
            "file": str((folder / "data.jsonl").relative_to(work.run.folder)),
            "stopped": run.stopped,
            "written": len(run.candidates),
            "kept": len(run.kept),
            "calls": run.ledger.spent.calls,
            "tokens": run.ledger.spent.tokens,
            "cost": run.ledger.spent.cost,
        }
        budget, counts = len(run.candidates), "written"  # as many as the feature-driven arm
    return found


def coverage(work: Work) -> Mapping[str, Any]:
    """Equation 23 after every text, by texts written and by texts kept, and at equal numbers."""
    wanted = TargetSet.load(work.path("targets", "targets.json"))
    seeds = {one.ref for one in wanted.targets if one.seed_documents}
    arms: dict[str, dict[str, Any]] = {}
    for arm, facts in work.result("synthesis").items():
        data = work.uses(work.run.folder / facts["file"])
        report = make_report(data, wanted)
        fires = [
            {one["feature"] for one in row["fires"]}
            for row in read_candidates(data)
            if row["outcome"] == "kept"
        ]
        known = [str(ref) for ref in wanted.refs]
        kept = curve(known, [{str(ref) for ref in seeds}, *fires])[1:]
        arms[arm] = {
            "written": (100 * report.curve).tolist(),
            "kept": (100 * kept).tolist(),
            "alone": 100 * report.synthetic_only,
            "outcomes": dict(report.outcomes.most_common()),
            "types": [[*key, number] for key, number in report.types.most_common()],
            "verified": report.verified,
        }
    equal = {}
    for what in ("written", "kept"):
        number = min(len(one[what]) for one in arms.values()) - 1
        equal[what] = {"texts": number} | {arm: one[what][number] for arm, one in arms.items()}
    return {"seed": 100 * wanted.seed_coverage, "arms": arms, "equal": equal}


def _often(work: Work, store: FeatureStore, layer: int) -> list[FeatureRef]:
    """Features that fire on enough anchor documents to be targets."""
    documents = documents_firing(pool(store, layer), work["threshold"])
    return [
        ref for ref in firing(store, layer) if documents[ref.feature] >= work["least_documents"]
    ]
