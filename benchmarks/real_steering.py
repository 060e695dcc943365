"""Steering a real model: a style, two controls, and what it costs in a capability.

    QWEN_SCOPE_HOME=WORK/release python benchmarks/real_steering.py --model MODEL \\
        --name "WHAT IT IS" --sae local/SAE-... --layer 14 --data DATA --texts WORK --work OUT

Three cases, each with the three features of the layer that tell its texts best (by effect size):
`code` (source code against prose, problems and prompts; pushed into English questions), `chinese`
(that of `real_verbs.py`) and `russian`. Each is pushed at every dose, beside random directions that
move the residual as far, and beside the difference of mean residuals, made as long as the push of
the features. Then the model reads problems of MATH with their right solutions while it is steered:
the log-likelihood of a solution's tokens, and how many tokens of the boxed answer it would have
written itself. (Letters of MMLU were tried first: without any push this model is at chance there.)

Everything that is done is kept in the work folder, so a run that was stopped goes on.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_labels import mixed_store
from real_verbs import FEATURES, NEW_TOKENS, PROMPTS, Setting, begin, leaked, real_arguments

import qwen_scope_lens as qsl
from qwen_scope_lens.models import unwrap
from qwen_scope_lens.stats import between, draws_of_groups
from qwen_scope_lens.steering.doses import Measure
from qwen_scope_lens.steering.sweep import CONTROL, PLAN, Dose
from qwen_scope_lens.steering.text_quality import perplexity, repetition, surprisals
from qwen_scope_lens.tables import Table

CODE = r"```|\bdef \w+\(|\bimport \w|\bprint\(|\breturn |\bself\.|\w\(\)|==|\{\n|;\n"
"""Signs of source code in a reply."""
PROBLEMS, LONGEST = 20, 130
"""Of MATH: how many, and of how many tokens at most, solution included."""
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
    sets = [("English questions", english, (2.0, 4.0, 6.0, 8.0, 12.0), f"regex={CODE}")]
    return Case("code", push, difference, natural, sets, (4.0, 6.0, 8.0))


def chinese_case(setting: Setting, work: Path, texts: Path) -> Case:
    made = work / "declaration"  # that of `real_verbs.py` has more layers, and will do
    store = qsl.FeatureStore.open(made) if made.is_dir() else setting.declaration()
    rows = list(setting.rows("parallel/udhr"))
    yes, no = ([row["text"] for row in rows if row["lang"] == lang] for lang in ("zh", "en"))
    push = chosen_push(setting, store, "zh", "lang", yes)
    difference, natural = mean_difference(setting, push, yes, no)
    sets = [
        ("English questions", english_prompts(setting), (1.0, 2.0, 4.0), "class=han"),
        ("leaked replies", leaked(setting, PROMPTS), (-0.5, -1.0, -2.0), "class=han"),
    ]
    return Case("chinese", push, difference, natural, sets, (-1.0, 1.0, 2.0))


def russian_case(setting: Setting, work: Path, texts: Path) -> Case:
    rows = list(setting.rows("parallel/udhr"))
    yes, no = ([row["text"] for row in rows if row["lang"] == lang] for lang in ("ru", "en"))
    store = qsl.FeatureStore.open(work / "declaration")
    push = chosen_push(setting, store, "ru", "lang", yes)
    difference, natural = mean_difference(setting, push, yes, no)
    doses = (1.0, 2.0, 3.0, 4.0)
    sets = [("English questions", english_prompts(setting), doses, "class=cyrillic")]
    return Case("russian", push, difference, natural, sets, (2.0, 3.0))


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


@dataclass(frozen=True)
class Problem:
    """A problem with its right solution: token ids, where the solution begins, the boxed tokens."""

    ids: list[int]
    start: int
    boxed: list[int]  # places in `ids`


def problems(setting: Setting) -> list[Problem]:
    """Short problems of MATH, of each subject in turn."""
    tokenizer = setting.model.tokenizer
    subjects: dict[str, list[Problem]] = {}
    for row in setting.rows("benchmarks/math-test"):
        found = re.search(r"\\boxed\{([^{}]+)\}", row["answer"])
        if found is None:
            continue
        head = f"Problem: {row['question']}\nSolution: "
        made = tokenizer(head + row["answer"], return_offsets_mapping=True)
        spans = made["offset_mapping"]
        low, high = (len(head) + at for at in found.span(1))
        boxed = [i for i, (a, b) in enumerate(spans) if a >= low and b <= high]
        start = next(i for i, (a, _) in enumerate(spans) if a >= len(head) - 1)
        if boxed and len(spans) <= LONGEST:
            subjects.setdefault(row["subject"], []).append(
                Problem(list(made["input_ids"]), start, boxed)
            )
    turns = itertools.zip_longest(*(subjects[name] for name in sorted(subjects)))
    return [one for turn in turns for one in turn if one is not None][:PROBLEMS]


@torch.no_grad()
def solved(
    setting: Setting, asked: Sequence[Problem], push: Push | None, dose: float, seed: int | None
) -> list[list[float]]:
    """Of each problem: nats and tokens of its solution; boxed tokens that come out, and all."""
    model, found = unwrap(setting.model), []
    for one in asked:
        steered: Any = nullcontext()
        if push is not None:
            how = {"control": seed, "must_fire": False, "allow_other_model": True}
            steered = qsl.steer(setting.model, push.plan.at(dose), [push.sae], **how)
        with steered:
            logits = model(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0, :-1]
        ids = torch.tensor(one.ids[1:])
        nats = -logits.float().log_softmax(-1).gather(1, ids[:, None])[one.start - 1 :, 0]
        right = (logits.argmax(-1) == ids)[[i - 1 for i in one.boxed]]
        found.append([float(nats.sum()), len(nats), float(right.sum()), len(right)])
    return found


def capability(setting: Setting, case: Case, work: Path, asked: Sequence[Problem]) -> None:
    """MATH while steered: nats per token of right solutions, and boxed tokens that come out."""
    keep = work / "solutions.json"
    done = json.loads(keep.read_text("utf-8")) if keep.is_file() else {}
    arms: dict[str, tuple[Push, int | None]] = {
        "features": (case.push, None),
        "random": (case.push, 0),
        DIFFERENCE: (case.difference, None),
    }
    picks = np.random.default_rng(0).integers(0, len(asked), (2000, len(asked)))
    every = np.arange(len(asked))
    rows: list[tuple[Any, ...]] = []
    wanted = [("unsteered", 0.0)] + [(arm, dose) for dose in case.asked_at for arm in arms]

    def nats(table: np.ndarray, which: np.ndarray) -> np.ndarray:
        return np.asarray(table[which, 0].sum(-1) / table[which, 1].sum(-1))

    def right(table: np.ndarray, which: np.ndarray) -> np.ndarray:
        return np.asarray(table[which, 2].sum(-1) / table[which, 3].sum(-1))

    for arm, dose in wanted:
        key = arm if arm == "unsteered" else f"{case.name} {arm} {dose:+g}"
        if key not in done:
            push, seed = arms.get(arm, (None, None))
            done[key] = solved(setting, asked, push, dose, seed)
            keep.write_text(json.dumps(done), "utf-8")
        now, plain = (np.array(done[name]) for name in (key, "unsteered"))
        cells = [f"{float(of(now, every)):.2f}" for of in (nats, right)]
        for at, of in enumerate((nats, right) if dose else ()):
            low, high = np.quantile(of(now, picks) - of(plain, picks), [0.025, 0.975])
            middle = float(of(now, every) - of(plain, every))
            cells[at] += f" ({middle:+.2f} [{low:+.2f}, {high:+.2f}])"
        rows.append((f"{dose:+g}" if dose else "", arm, *cells))
    tokens = sum(len(one.boxed) for one in asked)
    setting.say(
        f"\nMATH, {len(asked)} problems with their right solutions, {tokens} boxed tokens; in"
        " brackets against unsteered:\n"
    )
    header = ("dose", "arm", "nats per token of the solution", "boxed tokens right")
    setting.say(Table.of(header, rows).text())


CASES = {"code": code_case, "chinese": chinese_case, "russian": russian_case}


def main() -> None:
    parser = real_arguments(__doc__, layer=True)
    parser.add_argument("--texts", type=Path, required=True, help="the work folder of tools/real")
    parser.add_argument("--only", default=",".join(CASES))
    options = parser.parse_args()
    setting = begin(options)
    say = setting.say
    asked = problems(setting)
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
