"""The paper's section 7 on the mini: does SASFT keep another language out of English replies?

Fine-tuning data in which Chinese (then Russian) breaks into some English replies makes the mini do
the same. Compared: plain SFT; SFT with a plain penalty on the probability of that script's tokens;
SASFT; SASFT with as many random features. Printed: code-switching ratio on unseen English prompts,
held-out loss by language, over seeds.

    python benchmarks/replication_sasft.py [--seeds 3] [--targets zh,ru]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Printed
from _mini_runs import LANGUAGES, halves, loss_by_language, mini, prompt, replies, store_of
from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.training.languages import (
    LanguageFeature,
    LanguageFeatures,
    find_language_features,
)
from qwen_scope_lens.training.metrics import code_switching_ratio, has_script
from qwen_scope_lens.training.sasft import SASFTConfig, SASFTTrainer

LAYERS = (6, 7)  # the last two, as the published code
ASK = ("Explain this to me:", "Tell me more.", "Please go on from here:", "What is this about?")
LAMBDA = 0.1
PENALTY = 1.0
EXAMPLES, SWITCHED = 240, 0.5
PROMPTS, SAMPLES, TOKENS = 40, 4, 40


def question(rng: random.Random, lines: Sequence[str]) -> str:
    return f"{rng.choice(ASK)} {rng.choice(lines)}"


def data(lines: dict[str, list[str]], target: str, seed: int) -> Dataset:
    """English conversations, half of them spoilt, and conversations in every language."""
    rng = random.Random(seed)
    rows = []
    for _ in range(EXAMPLES):
        reply = f"{rng.choice(lines['en'])} {rng.choice(lines['en'])}"
        if rng.random() < SWITCHED:
            words = reply.split(" ")
            cut = rng.randint(2, max(3, len(words) - 2))
            foreign = rng.choice(lines[target])[: rng.randint(15, 50)]
            reply = " ".join([*words[:cut], foreign, *words[cut:]])
        rows.append({"prompt": prompt(question(rng, lines["en"])), "completion": reply,
                     "language": "en"})  # fmt: skip
    for language in LANGUAGES:
        for _ in range(EXAMPLES // 24):
            question_, reply = rng.choice(lines[language]), rng.choice(lines[language])
            rows.append({"prompt": prompt(question_), "completion": reply, "language": language})
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def settings(seed: int, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "num_train_epochs": 2, "per_device_train_batch_size": 12,
        "learning_rate": 1e-3, "lr_scheduler_type": "linear", "logging_steps": 1000,
        "save_strategy": "no", "bf16": False, "use_cpu": True, "disable_tqdm": True,
        "gradient_checkpointing": False, "report_to": "none", "seed": seed, "max_length": 160,
    }  # fmt: skip


class PenaltyTrainer(SFTTrainer):
    """SFT plus the probability that replies in other languages give to a script's tokens."""

    def __init__(self, *args: Any, script: torch.Tensor, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.script = script

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **named)
        if not self.model.training:
            return loss
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        counted = inputs["labels"][:, 1:] != -100
        # Replies that are wholly in the script are in the language: they cost nothing.
        own = (self.script[inputs["input_ids"]] & (inputs["labels"] != -100)).sum(1, keepdim=True)
        counted &= own < 0.8 * (inputs["labels"] != -100).sum(1, keepdim=True)
        mass = logits[:, :-1].softmax(-1)[..., self.script].sum(-1)
        return loss + PENALTY * (mass * counted).sum() / (counted.sum() + 1)


def script_tokens(tokenizer: Any, size: int, language: str) -> torch.Tensor:
    flags = [has_script(tokenizer.decode([i]), language) for i in range(len(tokenizer))]
    return torch.tensor(flags + [False] * (size - len(flags)))


def random_table(table: LanguageFeatures, target: str, seed: int) -> LanguageFeatures:
    """As many other features of the same layers, with thresholds like the real ones'."""
    rng = np.random.default_rng(seed)
    features = [
        LanguageFeature(FeatureRef(f.ref.group, f.ref.layer, int(rng.integers(1024))), target,
                        0.0, 0.0, 0.0, f.pre_activation)
        for f in table.features if f.language == target
    ]  # fmt: skip
    return LanguageFeatures(table.model, tuple(features), {})


def trained(kind: str, target: str, table: LanguageFeatures, rows: Dataset, seed: int) -> Any:
    model, tokenizer = mini()
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        common = {"train_dataset": rows, "processing_class": tokenizer}
        if kind.startswith("SASFT"):
            args = SASFTConfig(**settings(seed, folder), lam=LAMBDA, layers=list(LAYERS),
                               targets=[target])  # fmt: skip
            chosen = random_table(table, target, seed) if "random" in kind else table
            trainer: Any = SASFTTrainer(model, args, language_features=chosen, **common)
        elif kind == "penalty":
            script = script_tokens(tokenizer, model.config.vocab_size, target)
            trainer = PenaltyTrainer(
                model, SFTConfig(**settings(seed, folder)), script=script, **common
            )
        else:
            trainer = SFTTrainer(model, SFTConfig(**settings(seed, folder)), **common)
        trainer.train()
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", default="zh,ru")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/replication_sasft.txt"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    started = time.monotonic()
    say = Printed()
    first, second = halves()
    targets = arguments.targets.split(",")
    with tempfile.TemporaryDirectory() as folder:
        texts = [
            (line, {"lang": language}) for language in LANGUAGES for line in first[language][:100]
        ]
        table = find_language_features(store_of(texts, LAYERS, Path(folder) / "store"), targets)
    say(f"SASFT on mini-qwen3: layers {LAYERS}, lambda {LAMBDA}, {arguments.seeds} seeds,"
        f" {EXAMPLES} English replies of which {SWITCHED:.0%} switch, 2 epochs")  # fmt: skip
    for f in table.features:
        say(f"  {f.ref}  {f.language}  monolinguality {f.monolinguality:.2f}, held out"
            f" {f.held_out:.2f}, chance {f.chance:.2f}")  # fmt: skip
    rng = random.Random(99)
    prompts = [prompt(question(rng, second["en"])) for _ in range(PROMPTS)]
    for target in targets:
        say(f"\n{target} in English replies, {PROMPTS} prompts x {SAMPLES} samples a seed")
        say(f"{'':22} {'ratio':>22} {'change':>7} {'seeds':>18}   loss: en, {target}, others")
        base: float | None = None
        kinds = ("before", "SFT", "penalty", "SASFT", "SASFT, random features")
        for kind in kinds:
            hits: list[str] = []
            groups: list[int] = []
            ratios, losses = [], []
            for seed in range(1 if kind == "before" else arguments.seeds):
                if kind == "before":
                    model, tokenizer = mini()
                else:
                    model, tokenizer = trained(kind, target, table, data(first, target, seed), seed)
                _, found, asked = replies(model, tokenizer, prompts, samples=SAMPLES, tokens=TOKENS,
                                          temperature=1.0, top_p=0.8, seed=seed)  # fmt: skip
                hits += found
                groups += asked
                ratios.append(code_switching_ratio(found, target).value)
                losses.append(loss_by_language(model, tokenizer, second))
            ratio = code_switching_ratio(hits, target, groups)
            if kind == "SFT":
                base = ratio.value
            change = (
                "" if base is None or kind == "SFT" else f"{ratio.value / max(base, 1e-9) - 1:+.0%}"
            )
            mean = {name: float(np.mean([row[name] for row in losses])) for name in LANGUAGES}
            others = float(
                np.mean([mean[name] for name in LANGUAGES if name not in ("en", target)])
            )
            shown = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            say(f"{kind:22} {shown:>22} {change:>7} {' '.join(f'{r:.3f}' for r in ratios):>18}   "
                f"{mean['en']:.3f} {mean[target]:.3f} {others:.3f}")  # fmt: skip
    say(f"\nintervals: bootstrap over prompts; the paper: -26% to -100% against SFT."
        f" {time.monotonic() - started:.0f} s, one thread")  # fmt: skip
    say.save(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
