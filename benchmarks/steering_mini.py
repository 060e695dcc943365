"""Does steering a language's features do what it says? Suppression and amplification on the mini.

    python benchmarks/steering_mini.py > benchmarks/results/steering-mini.txt

Everything is found by the script: held-out prose is halved, the first half finds each language's
features by contrast, the second half makes the prompts. Suppression: an English chat reply into
which the language has just broken (as in the mini's training texts), cut after a few foreign
characters; counted is how often the model goes on in the language. Amplification: the same replies
cut before it breaks in. The strength is chosen on the held-out `switching` documents, which are
used for nothing else, as the most effective whose texts stay coherent (perplexity under the
unsteered model at most three times the unsteered texts'). Controls get changes of the same size:
along random directions, and along as many other features that fire as often. Intervals: Wilson,
95%; for the controls over all their draws.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from _measure import cpu_name

import qwen_scope_lens as qsl
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.steering import (
    Calibration,
    Continuation,
    Edit,
    Plan,
    Sampling,
    Typical,
    calibrate,
    generate,
    perplexity,
    repetition,
    share_of_class,
    surprisals,
)
from qwen_scope_lens.train import share

GROUP = "mini-qwen3/w1k-l0-16"
SCRIPTS = {"zh": "han", "ko": "hangul", "ru": "cyrillic"}
LANGUAGES = ("zh", "ko", "ru", "ja", "de", "fr", "es", "en")
LAYERS = (4, 5, 6)
PER_LAYER = 3
STRENGTHS = (0.25, 0.5, 1.0)
PREFIX = "<|im_start|>user\nTell me more.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
SAMPLING = Sampling(new_tokens=24)
DRAWS = 2
AT_LEAST = 0.1  # of the characters, to count as "goes on in the language"
GUARD = 3.0  # wide: a text that leaves the language surprises the unsteered model by that alone


@dataclass(frozen=True)
class Outcome:
    rate: float
    low: float
    high: float
    perplexity: float | None
    repetition: float

    def __str__(self) -> str:
        height = "-" if self.perplexity is None else f"{self.perplexity:.0f}"
        return (
            f"{self.rate:.2f} [{self.low:.2f}, {self.high:.2f}]   perplexity {height:>5}"
            f"   repeats {self.repetition:.2f}"
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--prompts", type=int, default=40)
    arguments.add_argument("--languages", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = qsl.load_model("mini-qwen3")
    saes = {f"{GROUP}/{layer}": qsl.load_sae(f"{GROUP}/{layer}") for layer in LAYERS}
    print(f"CPU: {cpu_name()}; {GROUP}, layers {LAYERS}, {PER_LAYER} features each;")
    print(f"{options.prompts} prompts a language, greedy, {SAMPLING.new_tokens} new tokens; a text")
    print(f"goes on in the language when {AT_LEAST:.0%} of its characters are of its script")
    rates, everybody = survey(model, saes)
    for language in options.languages:
        found, typical = features(list(saes), rates, everybody, language)
        report(model, saes, found, typical, language, options.prompts)


def report(
    model: Any,
    saes: dict[str, Any],
    found: list[str],
    typical: Calibration,
    language: str,
    count: int,
) -> None:
    print(f"\n{language}: {', '.join(ref.split('/', 2)[2] for ref in found)}")
    for job, broken, sign in (("suppress", True, -1), ("amplify", False, +1)):
        tuning, test = switching(language, broken), prompts(language, broken, count)
        strength = choose(model, saes, found, typical, language, tuning, sign)
        print(f"  {job}: add {sign * strength:+g} typical (chosen on {len(tuning)} other prompts)")
        others = [chance_features(found, typical, seed) for seed in range(DRAWS)]
        arms: dict[str, list[tuple[list[str], int | None]]] = {
            "the features": [(found, None)],
            "control: random directions": [(found, seed) for seed in range(DRAWS)],
            "control: other features": [(other, None) for other in others],
        }
        print(f"    {'unsteered':28} {outcome(model, language, [run(model, saes, test)])}")
        for name, draws in arms.items():
            texts = [
                run(model, saes, test, plan(refs, typical, sign * strength), seed)
                for refs, seed in draws
            ]
            print(f"    {name:28} {outcome(model, language, texts)}")
        if job == "suppress":
            ablated = Plan([Edit(ref, "ablate") for ref in found])  # type: ignore[arg-type]
            texts = [run(model, saes, test, ablated)]
            print(f"    {'the features ablated':28} {outcome(model, language, texts)}")
            other = [Plan([Edit(ref, "ablate") for ref in refs]) for refs in others]  # type: ignore[arg-type]
            texts = [run(model, saes, test, one) for one in other]
            print(f"    {'control: others ablated':28} {outcome(model, language, texts)}")


Rates = dict[str, dict[str, Typical]]


def survey(model: Any, saes: dict[str, Any]) -> tuple[Rates, Calibration]:
    """What fires how often on each language, and on all of them together."""
    every = {other: [row["text"] for row in heldout("prose", other)][:20] for other in LANGUAGES}
    rates = {
        other: calibrate(model, list(saes), texts, saes, truncate=True).facts
        for other, texts in every.items()
    }
    mixed = [text for texts in every.values() for text in texts]
    return rates, calibrate(model, list(saes), mixed, saes, truncate=True)


def features(
    saes: list[str], rates: Rates, everybody: Calibration, language: str
) -> tuple[list[str], Calibration]:
    """What fires on the language and on no other, and everybody's typical activation."""
    found: list[str] = []
    for sae in saes:
        own = {ref: facts.rate for ref, facts in rates[language].items() if ref.startswith(sae)}

        def lead(ref: str, own: dict[str, float] = own) -> float:
            elsewhere = [rates[o][ref].rate for o in LANGUAGES if o != language and ref in rates[o]]
            return own[ref] - max(elsewhere, default=0.0)

        found += sorted(own, key=lead, reverse=True)[:PER_LAYER]
    return found, Calibration({**everybody.facts, **{r: rates[language][r] for r in found}})


def chance_features(found: Sequence[str], typical: Calibration, seed: int) -> list[str]:
    """As many others of the same layers, drawn among the features that fire as often or more."""
    rng, drawn = random.Random(seed), []
    for ref in found:
        sae = ref.rsplit("/", 1)[0] + "/"
        known = [r for r in typical if r.startswith(sae) and r not in found and r not in drawn]
        known.sort(key=lambda r: -typical.facts[r].rate)
        drawn.append(rng.choice(known[: len(known) // 4]))
    return drawn


def plan(refs: Sequence[str], typical: Calibration, strength: float) -> Plan:
    edits = [Edit(ref, "add", strength, "typical") for ref in refs]  # type: ignore[arg-type]
    return Plan(edits).calibrated(typical)


def choose(
    model: Any,
    saes: dict[str, Any],
    found: Sequence[str],
    typical: Calibration,
    language: str,
    tuning: Sequence[str],
    sign: int,
) -> float:
    """The coherent strength with the largest effect; the weakest where none is coherent."""
    plain = outcome(model, language, [run(model, saes, tuning)])
    best, effect = STRENGTHS[0], -1.0
    for strength in STRENGTHS:
        texts = run(model, saes, tuning, plan(found, typical, sign * strength))
        seen = outcome(model, language, [texts])
        fine = seen.perplexity is not None and seen.perplexity <= GUARD * (plain.perplexity or 0)
        gain = sign * (seen.rate - plain.rate)
        if fine and gain > effect:
            best, effect = strength, gain
    return best


def run(
    model: Any,
    saes: dict[str, Any],
    texts: Sequence[str],
    plan: Plan | None = None,
    control: int | None = None,
) -> list[Continuation]:
    return generate(
        model, texts, plan, saes, sampling=SAMPLING, batch=50, control=control, must_fire=False
    )


def outcome(model: Any, language: str, draws: Sequence[Sequence[Continuation]]) -> Outcome:
    texts = [text for draw in draws for text in draw]
    rate = share([share_of_class(text.text, SCRIPTS[language]) >= AT_LEAST for text in texts])
    repeats = [r for text in texts if (r := repetition(text.ids)) is not None]
    height = perplexity(surprisals(model, texts))
    return Outcome(rate.value, rate.low, rate.high, height, sum(repeats) / max(1, len(repeats)))


def prompts(language: str, broken: bool, count: int) -> list[str]:
    """English replies with or without the beginning of a foreign stretch."""
    rng = random.Random(0)
    english = sentences("en")
    foreign = sentences(language)
    found = []
    for _ in range(count):
        words = rng.choice(english).split(" ")
        cut = rng.randint(min(3, len(words) - 1), max(1, min(14, len(words) - 1)))
        text = PREFIX + rng.choice(english) + " " + " ".join(words[:cut])
        found.append(text + " " + rng.choice(foreign)[: begun(language)] if broken else text)
    return found


def begun(language: str) -> int:
    """How many foreign characters a prompt shows: about one word."""
    return {"zh": 2, "ko": 3, "ru": 6}[language]


def sentences(language: str) -> list[str]:
    texts = [row["text"] for row in heldout("prose", language)][20:]
    lines = [line.strip() for text in texts for line in text.replace("。", "。\n").splitlines()]
    if language == "en":
        return [line for line in lines if 30 <= len(line) <= 300]
    script = SCRIPTS[language]
    return [line for line in lines if len(line) >= 12 and share_of_class(line[:8], script) == 1]


def switching(language: str, broken: bool) -> list[str]:
    """The held-out documents of that domain, cut where the language breaks in or just after."""
    found = []
    for row in heldout("switching"):
        if row["label"] != language:
            continue
        start = next(
            i for i, char in enumerate(row["text"]) if share_of_class(char, SCRIPTS[language])
        )
        found.append(
            row["text"][: start + begun(language)] if broken else row["text"][:start].rstrip()
        )
    return found


if __name__ == "__main__":
    main()
