"""Steering a real model: a style, two controls, and what it costs in a capability.

    QWEN_SCOPE_HOME=WORK/release python benchmarks/real_steering.py --model MODEL \
        --name "WHAT IT IS" --sae local/SAE-... --layer 14 --data DATA --texts WORK --work OUT

Two cases, each with the three features of the layer that tell its texts best (by effect size):
`code` (source code against prose, problems and prompts; pushed into English questions) and
`chinese` (that of `real_verbs.py`). Each is pushed at every dose, beside random directions that
move the residual as far, and beside the difference of mean residuals, made as long as the push of
the features. Then the model answers multiple-choice questions of MMLU while it is steered:
accuracy, and the log-likelihood of the right letter among the four, against the unsteered one.

Everything that is done is kept in the work folder, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Printed, cpu_name
from real_labels import mixed_store
from real_verbs import FEATURES, NEW_TOKENS, PROMPTS, Setting, leaked

import qwen_scope_lens as qsl
from qwen_scope_lens.models import unwrap
from qwen_scope_lens.stats import between, draws_of_groups
from qwen_scope_lens.steering.doses import Measure
from qwen_scope_lens.steering.sweep import CONTROL, PLAN, Dose
from qwen_scope_lens.steering.text_quality import perplexity, repetition, surprisals
from qwen_scope_lens.tables import Table

CODE = r"```|\bdef \w+\(|\bimport \w|\bprint\(|\breturn |\bself\.|\w\(\)|==|\{\n|;\n"
"""Signs of source code in a reply."""
QUESTIONS, LONGEST = 32, 110
"""Of MMLU: how many, and of how many tokens at most."""
LETTERS = "ABCD"
DIFFERENCE = "mean difference"


@dataclass(frozen=True)
class Push:
    """A plan in units of one typical push, with the SAE that its directions come from."""

    plan: qsl.Plan
    sae: qsl.ScopeSAE
    length: float  # of the residual's change at strength 1


@dataclass(frozen=True)
class Case:
    """What is pushed, on which prompts, at which doses, and which capability doses."""

    name: str
    push: Push
    difference: Push
    natural: float  # length of the mean difference before it was scaled
    sets: Sequence[tuple[str, list[str], tuple[float, ...], str]]  # name, prompts, doses, measure
    asked_at: tuple[float, ...]


def chosen_push(setting: Setting, store: Any, value: str, label: str, texts: list[str]) -> Push:
    """The features that tell `value` best, calibrated on its texts."""
    layer = setting.layers[0]
    how = {"label": label, "layer": layer, "pool": "mean", "by": "effect", "top": FEATURES}
    refs = [row.ref for row in qsl.rank(store, value, **how).rows]
    sae = setting.saes[layer]
    typical = qsl.calibrate(setting.model, refs, texts, [sae])
    plan = qsl.Plan([qsl.Edit(ref, "add", 1.0, unit="typical") for ref in refs])
    plan = plan.calibrated(typical)
    rows = sum(edit.value * sae.W_dec[edit.ref.feature].float() for edit in plan.edits)
    return Push(plan, sae, float(torch.as_tensor(rows).norm()))


@torch.no_grad()
def mean_difference(
    setting: Setting, like: Push, yes: list[str], no: list[str]
) -> tuple[Push, float]:
    """The difference of mean residuals as a decoder row, as long as the push of `like`."""
    layer = setting.layers[0]
    means = []
    for texts in (yes, no):
        read = qsl.capture(setting.model, texts, [layer], max_tokens=64, truncate=True)
        means.append(read.residuals[layer].float()[read.keep(layer)].mean(0))
    direction = means[0] - means[1]
    natural = float(direction.norm())
    sae = copy.deepcopy(like.sae)
    sae.W_dec[0] = direction * (like.length / natural)
    ref = f"{setting.group}/{layer}/0"
    edit = qsl.Edit(ref, "add", 1.0, unit="typical", typical=1.0)
    return Push(qsl.Plan([edit]), sae, like.length), natural


def code_case(setting: Setting, work: Path, texts: Path) -> Case:
    store = mixed_store(setting, work, texts)
    kinds, words = store.labels("kind"), store.documents(["text"])["text"].to_pylist()
    yes = [text for text, kind in zip(words, kinds, strict=True) if kind == "code"][:32]
    no = [text for text, kind in zip(words, kinds, strict=True) if kind != "code"][:64]
    push = chosen_push(setting, store, "code", "kind", yes)
    difference, natural = mean_difference(setting, push, yes, no)
    english = english_prompts(setting)
    sets = [("English questions", english, (2.0, 4.0, 8.0, 12.0), f"regex={CODE}")]
    return Case("code", push, difference, natural, sets, (4.0, 8.0, 12.0))


def chinese_case(setting: Setting, work: Path, texts: Path) -> Case:
    store = setting.declaration()
    rows = list(setting.rows("parallel/udhr"))
    yes, no = ([row["text"] for row in rows if row["lang"] == lang] for lang in ("zh", "en"))
    push = chosen_push(setting, store, "zh", "lang", yes)
    difference, natural = mean_difference(setting, push, yes, no)
    sets = [
        ("English questions", english_prompts(setting), (1.0, 2.0, 4.0), "class=han"),
        ("leaked replies", leaked(setting, PROMPTS), (-0.5, -1.0, -2.0), "class=han"),
    ]
    return Case("chinese", push, difference, natural, sets, (-1.0, 1.0, 2.0))


def english_prompts(setting: Setting) -> list[str]:
    rows = setting.rows("confusion/lcb-prompts")
    return [row["prompt"] for row in rows if row["lang"] == "en"][:PROMPTS]


def doses(setting: Setting, case: Case, work: Path) -> None:
    """Dose curves of the features, of random directions and of the mean difference."""
    edits = "; ".join(
        f"{e.ref.layer}/{e.ref.feature} x {e.value:.2f}" for e in case.push.plan.edits
    )
    setting.say(
        f"features {edits}; one typical push of all is {case.push.length:.2f} long, the difference"
        f" of means {case.natural:.2f} before it was scaled to that"
    )
    for name, prompts, strengths, measure in case.sets:
        stem = f"{case.name}-{name.split()[0].lower()}"
        swept = qsl.sweep(
            setting.model,
            case.push.plan,
            strengths,
            prompts,
            measure,
            [case.push.sae],
            sampling=qsl.Sampling(NEW_TOKENS),
            keep=work / f"{stem}.json",
        )
        means = difference_doses(
            setting, case, prompts, strengths, swept, work / f"{stem}-mean.json"
        )
        rows = []
        for dose in swept.arm(PLAN):
            at = dose.strength
            if at and at not in strengths:
                continue
            other = {d.strength: d for d in swept.arm(CONTROL)}[at]
            three = (dose, other, means.get(at, dose))
            rows.append(
                (
                    f"{at:+g}",
                    *(f"{d.effect:.3f} [{d.low:.3f}, {d.high:.3f}]" for d in three),
                    *(_perplexity(swept, d) for d in three),
                )
            )
        header = ("dose", "effect", "random", DIFFERENCE, "perplexity", "random ", DIFFERENCE + " ")
        setting.say(f"\n{name}, {len(prompts)}, {NEW_TOKENS} new tokens; {swept.meaning}:\n")
        setting.say(Table.of(header, rows).text())


def difference_doses(
    setting: Setting, case: Case, prompts: list[str], strengths: Any, swept: Any, keep: Path
) -> dict[float, Dose]:
    """The doses of the mean difference, in the same way as those of the sweep."""
    done = json.loads(keep.read_text("utf-8")) if keep.is_file() else {}
    measure = Measure.parse(swept.measure)
    for strength in strengths:
        if str(strength) not in done:
            texts = qsl.generate(
                setting.model,
                prompts,
                case.difference.plan.at(strength),
                [case.difference.sae],
                sampling=qsl.Sampling(NEW_TOKENS),
                allow_other_model=True,
            )
            effects = np.array([measure.of(text, text) for text in texts])
            effect = between(effects.mean(), draws_of_groups(effects, range(len(effects))))
            repeats = [r for text in texts if (r := repetition(text.ids)) is not None]
            height = perplexity(surprisals(setting.model, texts))
            numbers = (effect.value, effect.low, effect.high, height, float(np.mean(repeats)))
            done[str(strength)] = [*map(float, numbers), texts[0].text]
            keep.write_text(json.dumps(done), "utf-8")
    return {float(at): Dose(DIFFERENCE, float(at), *row) for at, row in done.items()}


def _perplexity(found: Any, dose: Any) -> str:
    return f"{dose.perplexity:.1f}{'' if not dose.strength or found.coherent(dose) else ' (!)'}"


def questions(setting: Setting) -> list[tuple[list[int], int]]:
    """Short questions of MMLU, each of another subject: token ids, and which letter is right."""
    tokenizer = setting.model.tokenizer
    subjects: dict[str, list[tuple[list[int], int]]] = {}
    for row in setting.rows("benchmarks/mmlu-test"):
        options = "\n".join(f"{a}. {b}" for a, b in zip(LETTERS, row["choices"], strict=True))
        ids = tokenizer(f"{row['question']}\n{options}\nAnswer:")["input_ids"]
        if len(ids) <= LONGEST:
            some = subjects.setdefault(row["subject"], [])
            some.append((list(ids), LETTERS.index(row["answer"])))
    order = np.random.default_rng(0).permutation(sorted(subjects))
    return [subjects[name][0] for name in order][:QUESTIONS]


@torch.no_grad()
def answers(setting: Setting, asked: Any, push: Push | None, dose: float, seed: int | None) -> Any:
    """Log-probabilities of the four letters, `[questions, 4]`."""
    model, found = unwrap(setting.model), []
    letters = [setting.model.tokenizer.encode(f" {letter}")[-1] for letter in LETTERS]
    for ids, _ in asked:
        one: Any = nullcontext()
        if push is not None:
            how = {"control": seed, "must_fire": False, "allow_other_model": True}
            one = qsl.steer(setting.model, push.plan.at(dose), [push.sae], **how)
        with one:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        found.append(logits[letters].log_softmax(-1).tolist())
    return found


def capability(setting: Setting, case: Case, work: Path, asked: Any) -> None:
    """MMLU while steered: accuracy, and the right letter's log-likelihood against unsteered."""
    keep = work / "answers.json"
    done = json.loads(keep.read_text("utf-8")) if keep.is_file() else {}
    right = np.array([at for _, at in asked])
    arms = {
        "features": (case.push, None),
        "random": (case.push, 0),
        DIFFERENCE: (case.difference, None),
    }
    rows: list[tuple[Any, ...]] = []
    wanted = [("unsteered", 0.0)] + [(arm, dose) for dose in case.asked_at for arm in arms]
    for arm, dose in wanted:
        key = arm if arm == "unsteered" else f"{case.name} {arm} {dose:+g}"
        if key not in done:
            push, seed = arms.get(arm, (None, None))
            done[key] = answers(setting, asked, push, dose, seed)
            keep.write_text(json.dumps(done), "utf-8")
        values, plain = (np.array(done[name]) for name in (key, "unsteered"))
        chosen = values.argmax(1)
        ours, before = (table[np.arange(len(right)), right] for table in (values, plain))
        change = ours - before
        draws = np.random.default_rng(0).integers(0, len(right), (2000, len(right)))
        low, high = np.quantile(change[draws].mean(1), [0.025, 0.975])
        rows.append(
            (
                *(f"{dose:+g}" if dose else "", arm),
                f"{(chosen == right).mean():.2f}",
                f"{ours.mean():.2f}",
                "" if not dose else f"{change.mean():+.2f} [{low:+.2f}, {high:+.2f}]",
                "" if not dose else f"{(chosen != plain.argmax(1)).mean():.0%}",
            )
        )
    header = (
        "dose",
        "arm",
        "accuracy",
        "log-likelihood of the right letter",
        "change",
        "other letter",
    )
    setting.say(
        f"\nMMLU, {len(asked)} questions of as many subjects, log-likelihood of the right"
        " letter among four:\n"
    )
    setting.say(Table.of(header, rows).text())


CASES = {"code": code_case, "chinese": chinese_case}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="what the model is, for the first line")
    parser.add_argument("--sae", required=True, help="the group, such as local/SAE-Res-...")
    parser.add_argument("--layer", required=True, dest="layers")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="the work folder of tools/real")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--out", type=Path, help="also write what is printed into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    say = Printed()
    say(f"{options.name}; SAEs {options.sae}; {cpu_name()}, one thread; {date.today()}")
    setting = Setting(options, say)
    asked = questions(setting)
    for name in options.only.split(","):
        started = time.process_time()
        say(f"\n## {name}\n")
        case = CASES[name](setting, options.work, options.texts)
        doses(setting, case, options.work)
        capability(setting, case, options.work, asked)
        say(f"\n{time.process_time() - started:.0f} CPU seconds")
        if options.out is not None:
            say.save(options.out)


if __name__ == "__main__":
    main()
