"""The paper's section 7 on the mini: does SASFT keep another language out of English replies?

Fine-tuning data in which Chinese (then Russian) breaks into some English replies makes the mini do
the same. Compared: plain SFT; SFT with a plain penalty on the probability of that script's tokens;
SASFT at several lambdas; as many random features with thresholds of their own. Printed: the
code-switching ratio on unseen English prompts against the held-out loss of the target language.

    python benchmarks/replication_sasft.py [--seeds 2] [--targets zh,ru] [--cells FILE]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Printed
from _mini_runs import (
    GROUP,
    LANGUAGES,
    Cells,
    halves,
    loss_of_each,
    mini,
    prompt,
    replies,
    script_tokens,
    stamp,
    store_of,
    with_thresholds,
)
from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.train import (
    LanguageFeatures,
    SASFTConfig,
    SASFTTrainer,
    find_language_features,
    has_script,
)

LAYERS = (6, 7)  # the last two, as the published code
ASK = ("Explain this to me:", "Tell me more.", "Please go on from here:", "What is this about?")
PENALTY = 1.0
EXAMPLES, SWITCHED, EPOCHS = 120, 0.5, 2
PROMPTS, SAMPLES, TOKENS, CONVERSATIONS = 60, 4, 32, 40
SWEEP = [
    ("SFT", 0.0),
    ("SASFT", 0.1),
    ("SASFT", 0.01),
    ("random features", 0.1),
    ("SASFT", 0.001),
    ("random features", 0.01),
    ("SASFT", 0.03),
    ("SASFT", 0.003),
]
FIRST_SEED_ONLY = [("before", 0.0), ("penalty", 0.0)]
OTHER_TARGETS = [("SFT", 0.0), ("SASFT", 0.03), ("random features", 0.03)]


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
        rows.append(
            {"prompt": prompt(question(rng, lines["en"])), "completion": reply, "language": "en"}
        )
    for language in LANGUAGES:
        for _ in range(EXAMPLES // 24):
            question_, reply = rng.choice(lines[language]), rng.choice(lines[language])
            rows.append({"prompt": prompt(question_), "completion": reply, "language": language})
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def settings(seed: int, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 12,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "logging_steps": 1000,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "seed": seed,
        "max_length": 120,
    }


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


def random_table(store: Any, table: LanguageFeatures, target: str, seed: int) -> LanguageFeatures:
    """As many other features of the same layers as the loss uses, with thresholds of their own."""
    rng = np.random.default_rng(seed)
    taken = {f.ref for f in table.features}
    refs: list[FeatureRef] = []
    for layer in LAYERS:
        free = [n for n in range(1024) if FeatureRef(GROUP, layer, n) not in taken]
        count = len(table.of(layer, [target], 2))
        refs += [FeatureRef(GROUP, layer, int(n)) for n in rng.choice(free, count, replace=False)]
    return with_thresholds(refs, store, table, target)


def trained(kind: str, lam: float, target: str, chosen: Any, rows: Dataset, seed: int) -> Any:
    model, tokenizer = mini()
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        common = {"train_dataset": rows, "processing_class": tokenizer}
        if kind in ("SASFT", "random features"):
            args = SASFTConfig(
                **settings(seed, folder),
                lam=lam,
                layers=list(LAYERS),
                targets=[target],
                below_chance=kind != "SASFT",
            )
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


def measured(model: Any, tokenizer: Any, target: str, second: Any, prompts: Any, seed: int) -> Any:
    """Which replies switch, and the held-out loss of each conversation, by language."""
    _, found, _ = replies(
        model,
        tokenizer,
        prompts,
        samples=SAMPLES,
        tokens=TOKENS,
        temperature=1.0,
        top_p=0.8,
        seed=seed,
    )
    return {
        "switched": [has_script(reply, target) for reply in found],
        "loss": {
            name: loss_of_each(model, tokenizer, second[name], CONVERSATIONS).tolist()
            for name in LANGUAGES
        },
    }


@dataclass(frozen=True)
class Row:
    """One kind and lambda over seeds."""

    switched: np.ndarray  # [seeds, prompts, samples]
    loss: dict[str, np.ndarray]  # language -> [seeds, conversations, 2]: nats, tokens

    @classmethod
    def of(cls, cells: list[Any]) -> Row:
        flags = np.array([cell["switched"] for cell in cells]).reshape(len(cells), PROMPTS, SAMPLES)
        return cls(flags, {n: np.array([cell["loss"][n] for cell in cells]) for n in LANGUAGES})

    def ratio(self, picks: np.ndarray) -> np.ndarray:
        """Resampled by prompt. `[resamples, prompts] -> [resamples]`"""
        found: np.ndarray = self.switched.mean(axis=(0, 2))[picks].mean(axis=-1)
        return found

    def nats(self, language: str, picks: np.ndarray) -> np.ndarray:
        """Loss per token, resampled by conversation."""
        rows = self.loss[language].sum(axis=0)
        found: np.ndarray = rows[picks, 0].sum(axis=-1) / rows[picks, 1].sum(axis=-1)
        return found


def spread(middle: float, draws: np.ndarray, sign: str = "") -> str:
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{middle:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def report(say: Any, target: str, rows: dict[tuple[str, float], Row]) -> None:
    """The frontier: how often replies switch against what the target language pays."""
    rng = np.random.default_rng(0)
    prompts, every = rng.integers(PROMPTS, size=(2000, PROMPTS)), np.arange(PROMPTS)
    texts = rng.integers(CONVERSATIONS, size=(2000, CONVERSATIONS))
    all_texts = np.arange(CONVERSATIONS)
    others = [name for name in LANGUAGES if name not in ("en", target)]
    base = rows["SFT", 0.0]
    say(
        f"{'':16} {'lambda':>6} {'seeds':>5}  {'ratio':21}  {'ratio - SFT':24}"
        f"  {f'loss of {target} - SFT':24}  loss - SFT: en, others"
    )
    order = ["before", "SFT", "penalty", "SASFT", "random features"]
    for (kind, lam), row in sorted(rows.items(), key=lambda r: (order.index(r[0][0]), r[0][1])):
        same = Row(
            base.switched[: len(row.switched)],
            {n: x[: len(row.switched)] for n, x in base.loss.items()},
        )
        shown = spread(float(row.ratio(every)), row.ratio(prompts))
        against, price, more = "", "", []
        if kind != "SFT":
            against = spread(
                float(row.ratio(every) - same.ratio(every)),
                row.ratio(prompts) - same.ratio(prompts),
                "+",
            )
            price = spread(
                float(row.nats(target, all_texts) - same.nats(target, all_texts)),
                row.nats(target, texts) - same.nats(target, texts),
                "+",
            )
            more = [
                float(np.mean([row.nats(n, all_texts) - same.nats(n, all_texts) for n in names]))
                for names in (["en"], others)
            ]
        say(
            f"{kind:16} {lam or '':>6} {len(row.switched):5}  {shown:21}  {against:24}  {price:24}"
            f"  {' '.join(f'{x:+.3f}' for x in more)}"
        )
    half = np.std(base.ratio(prompts)) * 2**0.5 * 2.8
    say(
        f"power: with these prompts and seeds a change of the ratio by {half:.3f} is seen four"
        " times in five (were the two runs' replies independent)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--targets", default="zh", help="zh,ru: the first is swept in full")
    parser.add_argument("--cells", type=Path, help="a JSON file: goes on with what is in it")
    parser.add_argument("--minutes", type=float, default=1e9, help="then report what is there")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/replication_sasft.txt"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    started = time.monotonic()
    say = Printed()
    cells = Cells(arguments.cells)
    first, second = halves()
    targets = arguments.targets.split(",")
    rng = random.Random(99)
    prompts = [prompt(question(rng, second["en"])) for _ in range(PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        texts = [
            (line, {"lang": language}) for language in LANGUAGES for line in first[language][:100]
        ]
        store = store_of(texts, LAYERS, Path(folder) / "store")
        table = find_language_features(store, targets)
        chance = {
            (target, seed): random_table(store, table, target, seed)
            for target in targets
            for seed in range(arguments.seeds)
        }
    say(
        f"SASFT on mini-qwen3: layers {LAYERS}, {EXAMPLES} English replies of which {SWITCHED:.0%}"
        f" switch, {EPOCHS} epochs, up to {arguments.seeds} seeds"
    )
    for f in table.features:
        used = "used" if f.stands_out else "below chance: left out"
        say(
            f"  {f.ref}  {f.language}  monolinguality {f.monolinguality:.2f}, held out"
            f" {f.held_out:.2f}, chance {f.chance:.2f}  {used}"
        )
    seeds, (target, *others) = range(arguments.seeds), targets
    wanted = [
        *((target, *each, seed) for seed in seeds for each in SWEEP),
        *((target, *each, 0) for each in FIRST_SEED_ONLY),
        *((other, *each, seed) for seed in seeds for other in others for each in OTHER_TARGETS),
    ]
    found: dict[str, dict[tuple[str, float], list[Any]]] = {target: {} for target in targets}
    for target, kind, lam, seed in wanted:
        name = f"{target} {kind} {lam} {seed}"
        if name not in cells.known and time.monotonic() - started > 60 * arguments.minutes:
            continue

        def make() -> Any:
            chosen = chance[target, seed] if kind == "random features" else table  # noqa: B023
            model, tokenizer = mini()
            if kind != "before":  # noqa: B023
                rows = data(first, target, seed)  # noqa: B023
                model, tokenizer = trained(kind, lam, target, chosen, rows, seed)  # noqa: B023
            return measured(model, tokenizer, target, second, prompts, seed)  # noqa: B023

        found[target].setdefault((kind, lam), []).append(cells(name, make))
        print(f"  {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    for target, rows in found.items():
        if ("SFT", 0.0) in rows:
            say(f"\n{target} in English replies, {PROMPTS} prompts x {SAMPLES} samples a seed")
            report(say, target, {key: Row.of(cell) for key, cell in rows.items()})
    say(
        f"\nin brackets: 95%, bootstrap over prompts, for losses over {CONVERSATIONS} held-out"
        " conversations; differences are paired. Loss in nats per token."
    )
    say(stamp())
    say.save(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
