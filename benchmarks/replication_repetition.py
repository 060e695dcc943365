"""The paper's section 8 on the mini: do rare negatives cure endless repetition faster than DAPO?

Candidates are the largest rises from first to last occurrence in loops that the mini wrote itself.
Each is amplified on other prompts and kept if it makes the mini loop more often than random
directions do. Before any training three gates ask, on prompts of their own, whether the experiment
can succeed: something was kept, it makes loops frequent, random features do not. A gate that fails
ends the run. Then GRPO with DAPO's objective, reward -1 for a loop, at a temperature where the
mini seldom loops by itself: plain, with one rollout per group steered by what was kept, and by
random features; measured on unseen prompts at a lower temperature, where it often does.

    python benchmarks/replication_repetition.py [--seeds 2] [--steps 16] [--cells FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Printed
from _mini_runs import GROUP, Cells, halves, loss_by_language, mini, stamp, store_of
from datasets import Dataset, disable_progress_bars

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.steering import Plan, Sampling, generate
from qwen_scope_lens.train import (
    RareNegativeGRPOConfig,
    RareNegativeGRPOTrainer,
    Share,
    amplified,
    find_repeats,
    find_repetition_features,
    no_repetition,
    own_loops,
    screen_causes,
    share,
)

LAYERS = (3, 4, 5)
PER_LAYER, FEATURES = 4, 1
STRENGTH = 0.3  # of the length of the residual, for each feature
COLLECT, SCREEN, TRAIN, MEASURE = 0.3, 0.5, 0.5, 0.3  # temperatures; at 0.6 the gates fail
TOKENS, GROUP_SIZE, PROMPTS_A_STEP = 64, 4, 6
STEERED_AT_LEAST, RANDOM_AT_MOST = 0.15, 0.1  # the gates: repeat ratios at the training temperature


def prompts_of(lines: dict[str, list[str]], count: int) -> list[str]:
    """Beginnings of texts, as a base model is prompted."""
    languages = ("en", "de", "fr", "es", "ru", "zh")
    found = []
    for number in range(count):
        line = lines[languages[number % 6]][number // 6]
        found.append(line[: max(6, len(line) // 2)])
    return found


def sampled(temperature: float, seed: int = 0) -> Sampling:
    return Sampling(TOKENS, temperature, 1.0, seed)


def loops(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    samples: int,
    plan: Plan | None = None,
    *,
    temperature: float,
    seed: int = 0,
) -> list[bool]:
    """Whether each continuation ends in a loop, prompt by prompt. `[prompts x samples]`"""
    asked = [text for text in prompts for _ in range(samples)]
    model.eval()
    found = generate(
        model,
        asked,
        plan,
        tokenizer=tokenizer,
        batch=240,
        sampling=sampled(temperature, seed),
        must_fire=False,
    )
    return [find_repeats(reply.ids) is not None for reply in found]


def ratio(flags: Sequence[bool], samples: int, prompts: int) -> Share:
    """Over prompts, when the rows are seeds x prompts x samples."""
    groups = [number // samples % prompts for number in range(len(flags))]
    return share(flags, groups)


def interval(found: Share) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def trained(plan: Plan | None, prompts: Sequence[str], seed: int, steps: int) -> Any:
    model, tokenizer = mini()
    some = plan or amplified([FeatureRef(GROUP, LAYERS[0], 0)], 0.0)
    with tempfile.TemporaryDirectory() as folder:
        args = RareNegativeGRPOConfig(
            output_dir=folder,
            max_steps=steps,
            num_generations=GROUP_SIZE,
            per_device_train_batch_size=GROUP_SIZE * PROMPTS_A_STEP,
            max_completion_length=TOKENS,
            temperature=TRAIN,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            seed=seed,
            steered_per_group=0 if plan is None else 1,
        )
        trainer = RareNegativeGRPOTrainer(
            model,
            no_repetition(),
            args,
            plan=some,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        )
        trainer.train()
        log = trainer.state.log_history
    return model, tokenizer, log


def gates(kept: Sequence[FeatureRef], untouched: Share, steered: Share, chance: Share) -> list[str]:
    """Why training could not show anything; empty where it can."""
    reasons = []
    if not kept:
        reasons.append("no candidate makes the mini loop more often than random directions do")
    if steered.value < STEERED_AT_LEAST or steered.low <= untouched.high:
        reasons.append(
            f"steered rollouts loop on {interval(steered)}: expected {STEERED_AT_LEAST} or more,"
            f" and above the untouched {interval(untouched)}"
        )
    if chance.value > RANDOM_AT_MOST or chance.high >= steered.low:
        reasons.append(
            f"random features loop on {interval(chance)}: expected {RANDOM_AT_MOST} or less, and"
            f" below the steered {interval(steered)}"
        )
    return reasons


def figures(plan: Plan | None, training: Any, held: Any, second: Any, seed: int, steps: int) -> Any:
    """One run: loops on unseen prompts afterwards, held-out loss, and what its rollouts did."""
    model, tokenizer, log = trained(plan, training, seed, steps)

    def mean(name: str) -> float:
        values = [entry[name] for entry in log if name in entry]
        return float(np.mean(values)) if values else float("nan")

    steered = mean("rollouts/steered_repeat_ratio") if plan is not None else None
    return {
        "measured": loops(model, tokenizer, held, 4, temperature=MEASURE, seed=seed),
        "loss": float(np.mean(list(loss_by_language(model, tokenizer, second).values()))),
        "own": mean("rollouts/own_repeat_ratio"),
        "steered": steered,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--cells", type=Path, help="a JSON file: goes on with what is in it")
    parser.add_argument("--minutes", type=float, default=1e9, help="then report what is there")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/replication_repetition.txt"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    started = time.monotonic()
    say, cells = Printed(), Cells(arguments.cells)
    first, second = halves()
    training, held = prompts_of(first, 240), prompts_of(second, 60)
    dev, gate = training[-60:], training[-120:-60]
    training = training[:120]
    model, tokenizer = mini()

    written = cells(
        "own loops",
        lambda: [
            prompt + reply.text
            for prompt, reply in own_loops(
                model,
                training,
                samples=4,
                tokenizer=tokenizer,
                sampling=sampled(COLLECT),
                batch=120,
            )
        ],
    )
    say(
        f"{len(written)} of {4 * len(training)} continuations of mini-qwen3 end in a loop"
        f" (temperature {COLLECT}, {TOKENS} tokens)"
    )

    def candidates() -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            store = store_of([(text, {}) for text in written], LAYERS, Path(folder) / "store")
            found = find_repetition_features(store, seed=0, top=PER_LAYER)
        return [[str(f.ref), f.rise, f.held_out, f.z, f.chance] for f in found.features]

    listed = cells("candidates", candidates)
    say(f"candidates: the {PER_LAYER} largest rises of each of the layers {LAYERS}")
    for name, rise, again, z, line in listed:
        say(f"  {name}  rise {rise:.2f}, held out {again:.2f}, z {z:.1f} (chance {line:.1f})")
    refs = [FeatureRef.parse(row[0]) for row in listed]

    def screen() -> Any:
        found = screen_causes(
            model,
            refs,
            dev,
            strength=STRENGTH,
            samples=3,
            controls=4,
            tokenizer=tokenizer,
            sampling=sampled(SCREEN),
            batch=180,
        )
        return [str(found), [str(ref) for ref in found.kept]]

    table, kept_names = cells("causes", screen)
    say(
        f"\namplified by {STRENGTH} of the residual's length at temperature {SCREEN}, {len(dev)}"
        f" other prompts x 3\n{table}"
    )
    kept = [FeatureRef.parse(name) for name in kept_names][:FEATURES]
    rng = np.random.default_rng(0)
    free = [n for n in range(1024) if n not in {ref.feature for ref in refs}]
    chance = [FeatureRef(GROUP, ref.layer, int(rng.choice(free))) for ref in kept or refs[:1]]
    plans = {
        "untouched": None,
        "steered": amplified(kept or refs[:1], STRENGTH),
        "random features": amplified(chance, STRENGTH),
    }
    asked = {
        name: cells(
            f"gate {name} {TRAIN}",
            lambda plan=plan: loops(model, tokenizer, gate, 4, plan, temperature=TRAIN),
        )
        for name, plan in plans.items()
    }
    shares = {name: ratio(flags, 4, len(gate)) for name, flags in asked.items()}
    say(
        f"\ngates, {len(gate)} prompts x 4 at temperature {TRAIN}: "
        + "; ".join(f"{name} {interval(found)}" for name, found in shares.items())
    )
    reasons = gates(kept, shares["untouched"], shares["steered"], shares["random features"])
    if reasons:
        say("\nNot trained, since it could not succeed: " + "; ".join(reasons))
        say(stamp())
        say.save(arguments.out)
        return 1
    before = cells("before", lambda: loops(model, tokenizer, held, 4, temperature=MEASURE))
    rows: dict[str, list[Any]] = {}
    for seed in range(arguments.seeds):
        for kind in ("plain DAPO", "rare negatives", "random features"):
            name = f"{kind} {seed} {TRAIN}"
            if name not in cells.known and time.monotonic() - started > 60 * arguments.minutes:
                continue
            plan = {"plain DAPO": None, "rare negatives": plans["steered"]}.get(
                kind, plans["random features"]
            )
            make = lambda plan=plan, seed=seed: figures(  # noqa: E731
                plan, training, held, second, seed, arguments.steps
            )
            rows.setdefault(kind, []).append(cells(name, make))
            print(f"  {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    report(say, rows, before, len(held), arguments.steps)
    say(stamp())
    say.save(arguments.out)
    return 0


def report(
    say: Any, rows: dict[str, list[Any]], before: list[bool], prompts: int, steps: int
) -> None:
    say(
        f"\nGRPO at temperature {TRAIN}, {steps} steps of {PROMPTS_A_STEP} prompts x {GROUP_SIZE}"
        " rollouts, reward -1 for a loop;"
    )
    say(f"then {prompts} unseen prompts x 4 at temperature {MEASURE}")
    say(
        f"{'':16} {'seeds':>5} {'repeat ratio':>22} {'less plain DAPO':>26}"
        "  loss   loops in rollouts: own, steered"
    )
    say(f"{'before':16} {'':5} {interval(ratio(before, 4, prompts)):>22}")
    picks = np.random.default_rng(0).integers(prompts, size=(4000, prompts))

    def by_prompt(cells: list[Any]) -> np.ndarray:
        flags = np.array([cell["measured"] for cell in cells], float)
        return flags.reshape(len(cells), prompts, 4).mean(axis=(0, 2))

    for kind, cells in rows.items():
        flags = [flag for cell in cells for flag in cell["measured"]]
        against = ""
        if kind != "plain DAPO":
            gap = by_prompt(cells) - by_prompt(rows["plain DAPO"][: len(cells)])
            low, high = np.quantile(gap[picks].mean(axis=1), [0.025, 0.975])
            against = f"{gap.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        own = np.mean([cell["own"] for cell in cells])
        steered = [cell["steered"] for cell in cells if cell["steered"] is not None]
        shown = f"{own:.3f}" + (f", {np.mean(steered):.3f}" if steered else "")
        say(
            f"{kind:16} {len(cells):5} {interval(ratio(flags, 4, prompts)):>22} {against:>26}"
            f"  {np.mean([cell['loss'] for cell in cells]):.3f}  {shown}"
        )
    gap = by_prompt(rows["rare negatives"]) - by_prompt(rows["plain DAPO"])
    seen = 2.8 * float(gap[picks].mean(axis=1).std())
    say(
        f"power: a difference of {seen:.3f} between rare negatives and plain DAPO is seen four"
        " times in five. Intervals: 95%, bootstrap over prompts, differences paired; they do not"
        " hold how far other seeds lie apart."
    )


if __name__ == "__main__":
    sys.exit(main())
