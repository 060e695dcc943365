"""SASFT with LoRA on a real model, small: how often replies switch, and what the language pays.

    QWEN_SCOPE_HOME=WORK/release python benchmarks/real_sasft.py --model MODEL \
        --name "WHAT IT IS" --sae local/SAE-... --layer 20 --data DATA --work OUT

English replies, into half of which Chinese breaks, teach the model to do the same. Compared are
plain fine-tuning, the penalty on the two features that tell Chinese best at several lambdas, and as
many random features with thresholds of their own. Printed: the code-switching ratio of sampled
replies to unseen English prompts, and what probability a token of Chinese has at each position of
clean English replies (which needs no luck in sampling), against the held-out loss of Chinese and of
English. Prompts and sentences are those of the Language Confusion Benchmark. What is done is kept
in the work folder.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import transformers
from _measure import Printed
from _mini_runs import Cells, loss_of_each, replies, script_tokens, with_thresholds
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from real_verbs import Setting, begin, real_arguments

import qwen_scope_lens as qsl
from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.train import (
    LanguageFeature,
    LanguageFeatures,
    SASFTConfig,
    SASFTTrainer,
    find_language_features,
    has_script,
)

LANGUAGES = ("zh", "en", "es", "ko", "ru", "vi")
TARGET = "zh"
ENGLISH, CHINESE, OTHER, SWITCHED = 80, 12, 4, 0.75
"""Examples: English ones, Chinese ones, those of all other languages; spoilt English ones."""
EPOCHS, BATCH, RATE = 2, 4, 1e-3
PROMPTS, SAMPLES, TOKENS, CONVERSATIONS = 32, 3, 32, 24
ARMS = [
    ("before", 0.0),
    ("SFT", 0.0),
    ("SASFT", 0.1),
    ("SASFT", 10.0),
    ("random features", 10.0),
    ("SASFT", 1.0),
    ("SASFT", 0.03),
    ("SASFT", 0.01),
    ("random features", 0.1),
    ("SASFT", 0.001),
]
"""In the order of the run. The published code has lambdas of 0.0005 and 0.001, for models whose
features are far larger; here 0.1 changed nothing, so larger ones come before smaller ones."""
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def asked(question: str) -> str:
    return f"<|im_start|>user\n{question.strip()}<|im_end|>\n<|im_start|>assistant\n"


def sentences(setting: Setting) -> dict[str, list[str]]:
    """Short sentences of each language, in its own script only."""
    found: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for row in setting.rows("confusion/lcb-completions"):
        mine = found.get(row["lang"])
        if mine is None or len(mine) >= 400 or "```" in row["completion"]:
            continue
        chinese = row["lang"] == TARGET
        for line in re.split(r"(?<=[.!?。！？])\s*", row["completion"])[:3]:
            line = " ".join(line.split())
            right = not re.search("[A-Za-z]", line) if chinese else not has_script(line, TARGET)
            if right and (12 if chinese else 40) <= len(line) <= (60 if chinese else 160):
                mine.append(line)
    return found


def data(lines: dict[str, list[str]], questions: list[str], seed: int) -> Dataset:
    rng = random.Random(seed)
    rows = []
    for number in range(ENGLISH):
        reply = f"{rng.choice(lines['en'])} {rng.choice(lines['en'])}"
        if number < SWITCHED * ENGLISH:
            words = reply.split(" ")
            cut = rng.randint(2, 8)
            reply = " ".join([*words[:cut], rng.choice(lines[TARGET])[:40], *words[cut:]])
        rows.append((rng.choice(questions), reply, "en"))
    for language, count in ((TARGET, CHINESE), *((n, OTHER // 4) for n in LANGUAGES[2:])):
        some = lines[language]
        rows += [(rng.choice(some), rng.choice(some), language) for _ in range(count)]
    rng.shuffle(rows)
    return Dataset.from_list(
        [{"prompt": asked(q), "completion": f"{r}<|im_end|>", "language": n} for q, r, n in rows]
    )


def store_of(setting: Setting, work: Path) -> qsl.FeatureStore:
    """Every third article of the Declaration in the languages of the run, in short."""
    rows = [row for row in setting.rows("parallel/udhr") if row["lang"] in LANGUAGES][::3]
    return qsl.extract(
        rows,
        model=setting.model,
        group=setting.group,
        layers=setting.layers,
        out=work / "languages",
        max_tokens=40,
        progress=False,
    )


def random_table(store: Any, table: LanguageFeatures, model: Any, seed: int) -> LanguageFeatures:
    """As many other features of the layer that fire at all, with thresholds of their own."""
    rng = np.random.default_rng(seed)
    [layer] = table.layers
    fires = np.flatnonzero(qsl.statistics(store, layer).doc_count >= 8)
    used = {f.ref.feature for f in table.features}
    count = len(table.of(layer, [TARGET], 2, below_chance=True))
    group = table.features[0].ref.sae
    chosen = rng.choice([n for n in fires if n not in used], count, replace=False)
    refs = [FeatureRef(group.row.short, layer, int(n)) for n in chosen]
    return with_thresholds(refs, store, table, TARGET, model)


def loaded(folder: str) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def trained(folder: str, kind: str, lam: float, layer: int, table: Any, rows: Dataset) -> Any:
    """The model with the adapter of one arm, and its tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = loaded(folder)
    if kind == "before":
        return model, tokenizer
    with tempfile.TemporaryDirectory() as out:
        args = SASFTConfig(
            output_dir=out,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            warmup_steps=2,
            lr_scheduler_type="linear",
            logging_steps=1000,
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
            seed=0,
            max_length=128,
            lam=lam,
            layers=[layer],
            targets=[TARGET],
            below_chance=True,  # with ten articles per language, chance is high
            allow_other_model=True,
        )
        trainer = SASFTTrainer(
            model,
            args,
            language_features=table,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        )
        trainer.train()
    return trainer.model, tokenizer


def measured(model: Any, tokenizer: Any, questions: list[str], lines: Any) -> dict[str, Any]:
    _, found, _ = replies(
        model,
        tokenizer,
        [asked(question) for question in questions],
        samples=SAMPLES,
        tokens=TOKENS,
        temperature=1.0,
        top_p=0.8,
        seed=0,
    )
    loss = {
        name: loss_of_each(model, tokenizer, lines[name], CONVERSATIONS).tolist()
        for name in (TARGET, "en")
    }
    return {
        "switched": [has_script(reply, TARGET) for reply in found],
        "chance": chances(model, tokenizer, questions, lines["en"]),
        "loss": loss,
    }


@torch.no_grad()
def chances(model: Any, tokenizer: Any, questions: list[str], lines: list[str]) -> list[float]:
    """Probability of the script in a clean English reply to each question, mean over positions."""
    rng = random.Random(2)
    script = script_tokens(tokenizer, model.config.vocab_size, TARGET)
    found = []
    for question in questions:
        before = tokenizer(asked(question), add_special_tokens=False)["input_ids"]
        reply = tokenizer(rng.choice(lines), add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([before + reply])).logits[0, len(before) - 1 : -1].float()
        found.append(float(logits.softmax(-1)[:, script].sum(-1).mean()))
    return found


def report(say: Printed, cells: dict[tuple[str, float], Any]) -> None:
    """Ratios and losses, and both against plain fine-tuning, with 95% intervals."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(PROMPTS, size=(2000, PROMPTS))
    texts = rng.integers(CONVERSATIONS, size=(2000, CONVERSATIONS))

    def ratio(cell: Any, picks: np.ndarray) -> np.ndarray:
        flags = np.array(cell["switched"], dtype=float).reshape(PROMPTS, SAMPLES).mean(1)
        return np.asarray(flags[picks].mean(-1))

    def chance(cell: Any, picks: np.ndarray) -> np.ndarray:
        return np.asarray(100 * np.array(cell["chance"])[picks].mean(-1))

    def nats(cell: Any, language: str, picks: np.ndarray) -> np.ndarray:
        rows = np.array(cell["loss"][language])[picks]
        return np.asarray(rows[..., 0].sum(-1) / rows[..., 1].sum(-1))

    def spread(value: Any, draws: np.ndarray, sign: str = "") -> str:
        low, high = np.quantile(draws, [0.025, 0.975])
        return f"{float(value):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    plain, whole, every = cells["SFT", 0.0], np.arange(PROMPTS), np.arange(CONVERSATIONS)
    say(
        f"{'':16}{'lambda':>7}  {'ratio':22}{'chance, %':22}{'ratio less SFT':25}"
        f"{'chance less SFT, %':25}loss less SFT: {TARGET}, en"
    )
    for (kind, lam), cell in cells.items():
        row = f"{kind:16}{lam or '':>7}  "
        for of in (ratio, chance):
            row += f"{spread(of(cell, whole), of(cell, prompts)):22}"
        if kind != "SFT":
            for of in (ratio, chance):
                change = of(cell, whole) - of(plain, whole)
                row += f"{spread(change, of(cell, prompts) - of(plain, prompts), '+'):25}"
            for language in (TARGET, "en"):
                more = nats(cell, language, every) - nats(plain, language, every)
                draws = nats(cell, language, texts) - nats(plain, language, texts)
                row += f"{spread(more, draws, '+')}  "
        say(row.rstrip())
    base = float(ratio(plain, whole))
    half = float(np.std(ratio(plain, prompts))) * 2**0.5 * 2.8
    say(
        f"power: after plain fine-tuning {base:.0%} of replies switch; with {PROMPTS} prompts,"
        f" {SAMPLES} replies each and one seed, a change of the ratio by {half:.2f} is seen four"
        f" times in five"
        + ("" if base > 0 else ": none can be seen, because nothing switches to begin with")
    )


def main() -> None:
    parser = real_arguments(__doc__, layer=True)
    parser.add_argument("--minutes", type=float, default=1e9, help="then report what is there")
    options = parser.parse_args()
    disable_progress_bars()
    started = time.monotonic()
    setting = begin(options)
    say = setting.say
    [layer] = setting.layers
    lines = sentences(setting)
    halves = [{n: some[i::2] for n, some in lines.items()} for i in range(2)]
    prompts = setting.rows("confusion/lcb-prompts")
    questions = [r["prompt"] for r in prompts if r["lang"] == "en" and len(r["prompt"]) < 120]
    tables = [options.work / f"{name}.json" for name in ("chosen", "random")]
    if not all(path.is_file() for path in tables):
        store = store_of(setting, options.work)
        table = find_language_features(store, [TARGET], layers=[layer], model=setting.model)
        table.save(tables[0])
        random_table(store, table, setting.model, 0).save(tables[1])
    chosen, chance = map(LanguageFeatures.load, tables)
    del setting.model, setting.saes
    rows = data(halves[0], questions[PROMPTS:], 0)
    say(
        f"layer {layer}; {len(rows)} examples, {ENGLISH} of them English, of which {SWITCHED:.0%}"
        f" switch to {TARGET}; {EPOCHS * len(rows) // BATCH} steps of {BATCH}, LoRA {LORA}, rate"
        f" {RATE:g}; {PROMPTS} prompts, {SAMPLES} replies of at most {TOKENS} tokens each"
    )
    for f in chosen.features:
        say(
            f"  {f.ref}: monolinguality {f.monolinguality:.2f}, held out {f.held_out:.2f}, chance"
            f" {f.chance:.2f}; mean before ReLU {_means(f)}"
        )
    for f in chance.features:
        say(f"  at random: {f.ref.layer}/{f.ref.feature}; mean before ReLU {_means(f)}")
    cells, found = Cells(options.work / "cells.json"), {}
    for kind, lam in ARMS:
        name = f"{kind} {lam}"
        if name not in cells.known and time.monotonic() - started > 60 * options.minutes:
            say(f"{name}: left out, the time is over")
            continue

        def make() -> dict[str, Any]:
            table = chance if kind == "random features" else chosen  # noqa: B023
            model, tokenizer = trained(options.model, kind, lam, layer, table, rows)  # noqa: B023
            return measured(model, tokenizer, questions[:PROMPTS], halves[1])

        found[kind, lam] = cells(name, make)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    report(say, found)
    if options.out is not None:
        say.save(options.out)


def _means(feature: LanguageFeature) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in feature.pre_activation.items())


if __name__ == "__main__":
    main()
