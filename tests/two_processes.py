"""What one process of a data-parallel run does; test_training_parallel.py starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from training_data import GROUP, examples, losses, mini, settings, table

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.steering import Edit, Plan
from qwen_scope_lens.train import (
    RareNegativeGRPOConfig,
    RareNegativeGRPOTrainer,
    SASFTConfig,
    SASFTTrainer,
)


def sasft(folder: Path, batch: int) -> dict[str, Any]:
    model, tokenizer = mini()
    args = SASFTConfig(
        **settings(folder, per_device_train_batch_size=batch, max_steps=2), layers=[7], lam=0.5
    )
    run = SASFTTrainer(
        model,
        args,
        language_features=table({7: (3, 40)}),
        train_dataset=examples(),
        processing_class=tokenizer,
    )
    run.train()
    weight = run.accelerator.unwrap_model(run.model).model.layers[0].mlp.up_proj.weight
    return {"penalty": losses(run, "penalty"), "weight": float(weight.detach().double().norm())}


def grpo(folder: Path) -> dict[str, Any]:
    model, tokenizer = mini()
    args = RareNegativeGRPOConfig(
        **settings(folder, per_device_train_batch_size=2, max_steps=1),
        num_generations=4,
        max_completion_length=4,
    )
    run = RareNegativeGRPOTrainer(
        model,
        lambda completions, **_: [float(len(text)) for text in completions],
        args,
        plan=Plan([Edit(FeatureRef(GROUP, 5, 7), "add", 400.0)]),
        train_dataset=Dataset.from_list([{"prompt": "Use the command"}, {"prompt": "A file"}]),
        processing_class=tokenizer,
    )
    run.train()
    return {"steered": run.steered_rows(2)}


def found(what: str, out: Path) -> dict[str, Any]:
    """`what` is `grpo`, or SASFT's batch size per process."""
    return grpo(out / "grpo") if what == "grpo" else sasft(out / what, int(what))
