"""The stages of `sasft` (section 7): fine-tuning with and without the penalty, and how often the
replies switch language. The trainer is that of `qsl train sasft`, with one run's file per arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.files import write_rows
from qwen_scope_lens.models.open import open_model
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.recipes.data import rows_of, text_rows
from qwen_scope_lens.recipes.engine import Work
from qwen_scope_lens.steering.generate import Sampling, generate
from qwen_scope_lens.stores.corpus import read_rows
from qwen_scope_lens.stores.extract import extract
from qwen_scope_lens.train.language_features import find_language_features
from qwen_scope_lens.train.metrics import code_switching_ratio
from qwen_scope_lens.train.runs import run_sasft

__all__ = ["draw", "replies", "table", "train"]

BEFORE = "before"


def table(work: Work) -> Mapping[str, Any]:
    """The language features of the last layers, by monolinguality, on texts of all languages."""
    rows = [
        {"text": row["text"], "lang": language}
        for language in work["languages"]
        for row in text_rows(work, language)[: work["texts"]]
    ]
    store = extract(
        rows,
        model=work.model(up_to_layer=max(work.layers)),
        group=work["sae"],
        layers=work.layers,
        out=work.path("table", "store"),
        max_tokens=work["max_tokens"],
        sae_revision=work["sae_revision"],
        progress=not work.is_smoke,
        **work.options,
    )
    found = find_language_features(
        store,
        [work["target"]],
        label="lang",
        per_layer=work["features_per_layer"],
        texts=work["texts"],
        seed=work["seed"],
    )
    found.save(work.path("table", "language_features.json"))
    return {
        "model": store.manifest.model,
        "features": [
            {
                "feature": str(f.ref),
                "monolinguality": f.monolinguality,
                "held_out": f.held_out,
                "chance": f.chance,
                "used": f.stands_out,
            }
            for f in found.features
        ],
    }


def train(work: Work) -> Mapping[str, Any]:
    """One run for each lambda; 0 is plain fine-tuning. A stopped run goes on."""
    work.trained_model()
    features = work.path("table", "language_features.json").resolve()
    data = work.path("train", "train.jsonl")
    rows = [row for _, row in rows_of(work, "train")]
    if unlabelled := sum("language" not in row for row in rows):
        raise BadFile(
            f"{unlabelled} rows of source train have no language: name the column with"
            " --set 'data.train.columns={language: ITS NAME}'"
        )
    kept = ("prompt", "completion", "messages", "text", "language")
    write_rows(data, ({key: row[key] for key in kept if key in row} for row in rows))
    arms = {}
    for lam in work["lambdas"]:
        work.say(f"lambda {lam:g}")
        trainer = {
            "targets": [work["target"]],
            "layers": list(work.layers),
            "features_per_layer": work["features_per_layer"],
            "threshold": work["threshold"],
            "lam": float(lam),
        }
        run = work.training_run(f"lambda-{lam:g}", data, trainer, language_features=str(features))
        folder = run_sasft(run)
        arms[f"{lam:g}"] = str(folder.relative_to(work.folder))
    return {"arms": arms, "examples": len(rows)}


def replies(work: Work) -> Mapping[str, Any]:
    """Sampled replies of every arm and of the model before, and their code-switching ratio."""
    arms = work.result("train")["arms"]
    asked = [row for row in text_rows(work, "prompts") if row.get("language") != work["target"]]
    prompts = [row["text"] for row in asked for _ in range(work["samples"])]
    groups = [number for number in range(len(asked)) for _ in range(work["samples"])]
    sampling = Sampling(work["new_tokens"], work["temperature"], work["top_p"], work["seed"])
    found = {}
    for arm in (BEFORE, *arms):
        path = work.path("replies", f"{arm}.jsonl")
        if not path.exists():  # a stopped stage keeps the arms that are finished
            work.say(f"replies of {arm if arm == BEFORE else f'lambda {arm}'}")
            place = work.path("train", arms[arm]) if arm in arms else None
            model = (
                work.model()
                if place is None
                else open_model(place, device=work.options.get("device"))
            )
            chats = [[{"role": "user", "content": text}] for text in prompts]
            written = generate(
                model, chats if work["chat"] else prompts, sampling=sampling, enable_thinking=False
            )
            pairs = zip(prompts, written, strict=True)
            write_rows(path, ({"prompt": text, "reply": reply.text} for text, reply in pairs))
        texts = [row["reply"] for _, row in read_rows(path)]
        ratio = code_switching_ratio(texts, work["target"], groups).interval
        found[arm] = {
            "value": 100 * ratio.value,
            "low": 100 * ratio.low,
            "high": 100 * ratio.high,
        }
    plain = found.get("0", {}).get("value")
    change = {
        arm: None if not plain else 100 * (cell["value"] - plain) / plain
        for arm, cell in found.items()
        if arm not in (BEFORE, "0")
    }
    chosen = f"{work['lam']:g}"
    return {
        "ratio": found,
        "change": change,
        "plain": found.get("0"),
        "chosen": found.get(chosen),
        "chosen change": change.get(chosen),
        "replies": len(prompts),
        "tasks": work["tasks"],
    }


def draw(page: Page, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The part of the page that only this recipe has."""
    found = results["replies"]
    page.heading("Features of the target language")
    page.table(
        ("feature", "monolinguality", "held out", "chance", "in the loss"),
        [
            (
                *(row[key] for key in ("feature", "monolinguality", "held_out", "chance")),
                "yes" if row["used"] else "no: not above chance",
            )
            for row in results["table"]["features"]
        ],
    )
    page.heading("Code-switching ratio, in per cent of replies")
    page.table(
        ("arm", "ratio", "from", "to", "change against lambda 0, %"),
        [
            (
                arm if arm == BEFORE else f"lambda {arm}",
                *(cell[key] for key in ("value", "low", "high")),
                found["change"].get(arm),
            )
            for arm, cell in found["ratio"].items()
        ],
    )
    page.figure(
        chart(partial(_ratios, found["ratio"])), "With 95% intervals, which resample prompts"
    )
    if found["tasks"]:
        page.heading("Capabilities")
        page.text("They are measured by lm-eval, with one command per arm in this folder:")
        page.verbatim(
            "\n".join(
                f"lm-eval run --model hf --model_args pretrained=train/{place}"
                f" --tasks {','.join(found['tasks'])}"
                for place in results["train"]["arms"].values()
            )
        )


def _ratios(ratios: Mapping[str, Mapping[str, float]], axes: Any) -> None:
    for number, (_, cell) in enumerate(ratios.items()):
        axes.plot([number, number], [cell["low"], cell["high"]], color="C0", lw=1)
        axes.plot(number, cell["value"], "o", color="C0", ms=5)
    names = [arm if arm == BEFORE else f"λ = {arm}" for arm in ratios]
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="% of replies with the target's script", ylim=(0, None))
