"""The paper's section 8 on the mini: do rare negatives cure endless repetition faster than DAPO?

Candidates are found by last minus first occurrence in looping texts. Whether any causes loops is
screened by amplifying each on training prompts, and confirmed on others. Then GRPO with DAPO's
objective, reward -1 for a loop: plain, with one rollout a group steered by the repetition features,
and with random features instead.

    python benchmarks/replication_repetition.py [--seeds 3] [--steps 30]
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
from _mini_runs import GROUP, halves, loss_by_language, mini, replies, store_of
from datasets import Dataset, disable_progress_bars

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.where import Where
from qwen_scope_lens.training.metrics import repeat_ratio
from qwen_scope_lens.training.rare_negatives import RareNegativeGRPOConfig, RareNegativeGRPOTrainer
from qwen_scope_lens.training.repetition import find_repetition_features
from qwen_scope_lens.training.rewards import no_repetition

LAYERS = (2, 3, 4, 5, 6)
CANDIDATES, FEATURES = 20, 2
STRENGTH = 0.3  # of the length of the residual, for each feature
TEMPERATURE = 0.5  # where the mini loops now and then
TOKENS, GROUP_SIZE, PROMPTS_A_STEP = 64, 4, 6


def prompts_of(lines: dict[str, list[str]], count: int) -> list[str]:
    """Beginnings of texts, as a base model is prompted."""
    languages = ("en", "de", "fr", "es", "ru", "zh")
    found = []
    for number in range(count):
        line = lines[languages[number % 6]][number // 6]
        found.append(line[: max(6, len(line) // 2)])
    return found


def loops(model: Any, tokenizer: Any, prompts: Sequence[str], samples: int, seed: int = 0) -> Any:
    ids, _, groups = replies(model, tokenizer, prompts, samples=samples, tokens=TOKENS,
                             temperature=TEMPERATURE, seed=seed)  # fmt: skip
    return repeat_ratio(ids, groups)


def interval(ratio: Any) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def trained(plan: Plan | None, prompts: Sequence[str], seed: int, steps: int, every: Any) -> Any:
    model, tokenizer = mini()
    some = plan or Plan([Edit(FeatureRef(GROUP, 6, 0), "add", 0.0)])
    with tempfile.TemporaryDirectory() as folder:
        args = RareNegativeGRPOConfig(
            output_dir=folder, max_steps=steps, num_generations=GROUP_SIZE,
            per_device_train_batch_size=GROUP_SIZE * PROMPTS_A_STEP, max_completion_length=TOKENS,
            temperature=TEMPERATURE, learning_rate=2e-4, lr_scheduler_type="constant", bf16=False,
            use_cpu=True, disable_tqdm=True, gradient_checkpointing=False, logging_steps=1000,
            save_strategy="no", seed=seed, steered_per_group=0 if plan is None else 1,
        )  # fmt: skip
        trainer = RareNegativeGRPOTrainer(
            model, no_repetition(), args, plan=some, processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
            callbacks=[every(model, tokenizer)],
        )  # fmt: skip
        trainer.train()
    return model, tokenizer


def main() -> None:
    from transformers import TrainerCallback

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/replication_repetition.txt"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    started = time.monotonic()
    say = Printed()
    first, second = halves()
    training, held = prompts_of(first, 240), prompts_of(second, 60)
    texts = [
        (r["text"], {"kind": r["label"]}) for r in heldout("repetition") if r["label"] == "loop"
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = find_repetition_features(store_of(texts, LAYERS, Path(folder) / "store"), seed=0)
    candidates = [f.ref for f in found.features if f.stands_out][:CANDIDATES]
    say(f"candidates in mini-qwen3, layers {LAYERS}: {len(candidates)} above chance, from"
        f" {found.settings['documents']} looping texts; the first three")  # fmt: skip
    for f in found.features[:3]:
        say(
            f"  {f.ref}  rise {f.rise:.2f}, held out {f.held_out:.2f}, z {f.z:.1f}"
            f" (chance {f.chance:.1f})"
        )
    model, tokenizer = mini()

    def amplified(refs: Sequence[FeatureRef], sign: float = 1.0) -> Plan:
        edits = [Edit(ref, "add", sign * STRENGTH, "norm", Where("generation")) for ref in refs]
        return Plan(edits)

    def under(plan: Plan, prompts: Sequence[str], samples: int) -> Any:
        with steer(model, plan, tokenizer=tokenizer):
            return loops(model, tokenizer, prompts, samples)

    dev = training[-60:]
    screened = sorted(
        ((under(amplified([ref]), dev, 1).value, ref) for ref in candidates), reverse=True
    )
    say(f"\nrepeat ratio at temperature {TEMPERATURE}, {TOKENS} tokens")
    say(
        f"screening prompts: untouched {interval(loops(model, tokenizer, dev, 1))}; amplified, each"
    )
    say("  " + ", ".join(f"{ref.layer}/{ref.feature} {value:.3f}" for value, ref in screened))
    best = [ref for _, ref in screened[:FEATURES]]
    rng = np.random.default_rng(0)
    chance = [FeatureRef(GROUP, ref.layer, int(rng.integers(1024))) for ref in best]
    base = loops(model, tokenizer, held, 4)
    say(f"other prompts: untouched {interval(base)}")
    for name, plan in (
        (f"the best {FEATURES} amplified", amplified(best)),
        ("as many random features amplified", amplified(chance)),
        (f"the best {FEATURES} suppressed", amplified(best, -1.0)),
    ):
        say(f"  {name}: {interval(under(plan, held, 4))}")
    say(f"\nGRPO, {arguments.steps} steps of {PROMPTS_A_STEP} prompts x {GROUP_SIZE} rollouts,"
        f" reward -1 for a loop")  # fmt: skip
    say(f"{'':18} {'repeat ratio after':>26} {'seeds':>20}  at 1/3, 2/3    mean loss")
    before = float(np.mean(list(loss_by_language(model, tokenizer, second).values())))
    say(f"{'before':18} {interval(base):>26} {'':>20}  {'':14} {before:.3f}")
    for kind in ("plain DAPO", "rare negatives", "random features"):
        seeds, curves, losses, all_ids, groups = [], [], [], [], []
        for seed in range(arguments.seeds):
            curve: list[float] = []

            class Watch(TrainerCallback):
                def __init__(self, model: Any, tokenizer: Any) -> None:
                    self.model, self.tokenizer = model, tokenizer

                def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                    if state.global_step in (arguments.steps // 3, 2 * arguments.steps // 3):
                        kept = torch.get_rng_state()
                        curve.append(loops(self.model, self.tokenizer, held, 1, seed=5).value)  # noqa: B023
                        torch.set_rng_state(kept)
                        self.model.train()

            plan = None
            if kind != "plain DAPO":
                plan = amplified(chance if kind == "random features" else best)
            tuned, tokenizer = trained(plan, training, seed, arguments.steps, Watch)
            ids, _, asked = replies(tuned, tokenizer, held, samples=4, tokens=TOKENS,
                                    temperature=TEMPERATURE, seed=seed)  # fmt: skip
            all_ids += ids
            groups += asked
            seeds.append(repeat_ratio(ids).value)
            curves.append(curve)
            losses.append(float(np.mean(list(loss_by_language(tuned, tokenizer, second).values()))))
        ratio = repeat_ratio(all_ids, groups)
        steps = " ".join(f"{value:.3f}" for value in np.mean(curves, axis=0))
        say(f"{kind:18} {interval(ratio):>26} {' '.join(f'{s:.3f}' for s in seeds):>20}"
            f"  {steps:14} {np.mean(losses):.3f}")  # fmt: skip
    say(f"\nintervals: bootstrap over prompts. {time.monotonic() - started:.0f} s, one thread")
    say.save(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
