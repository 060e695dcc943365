"""A small multilingual data set, a table of language features and short runs, for the trainers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.train import LanguageFeature, LanguageFeatures

GROUP = "mini-qwen3/w1k-l0-16"
LANGUAGES = ("en", "ru", "zh")


def mini() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, as a user of TRL loads them."""
    folder = bundled_model("mini-qwen3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def examples(count: int = 12, seed: int = 0) -> Dataset:
    rows = []
    for language in LANGUAGES:
        for record in list(heldout("prose", language))[: count // len(LANGUAGES)]:
            text = record["text"][:120]
            rows.append({"prompt": text[:20], "completion": text[20:], "language": language})
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def table(features: dict[int, tuple[int, ...]], level: float = 0.0) -> LanguageFeatures:
    """Features of Chinese, by layer, with the same mean pre-activation everywhere."""
    rows = tuple(
        LanguageFeature(
            FeatureRef(GROUP, layer, feature), "zh", 1.0, 1.0, 0.1, dict.fromkeys(LANGUAGES, level)
        )
        for layer, numbers in features.items()
        for feature in numbers
    )
    return LanguageFeatures("mini-qwen3", rows, {})


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a run that takes seconds on a CPU."""
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "seed": 3,
        **changes,
    }


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
