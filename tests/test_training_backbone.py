"""Both trainers refuse features of another model, also where its width and depth fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import Dataset
from training_data import GROUP, examples, mini, settings, table

from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.steering import Edit, Plan
from qwen_scope_lens.train import (
    RareNegativeGRPOConfig,
    RareNegativeGRPOTrainer,
    SASFTConfig,
    SASFTTrainer,
    no_repetition,
    screen_causes,
)
from qwen_scope_lens.train.sasft import build_penalty

EDIT = Edit(f"{GROUP}/5/7", "add", 1.0)


@pytest.fixture(scope="module")
def other() -> Any:
    """The other mini: as wide and as deep as the one that the features belong to."""
    return transformers.AutoModelForCausalLM.from_pretrained(bundled_model("mini-qwen3.5"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(bundled_model("mini-qwen3.5"))


def sasft(model: Any, tokenizer: Any, folder: Path, **changes: Any) -> SASFTTrainer:
    return SASFTTrainer(
        model,
        SASFTConfig(**settings(folder, **changes), layers=[7]),
        language_features=table({7: (3,)}),
        train_dataset=examples(),
        processing_class=tokenizer,
    )


def grpo(model: Any, tokenizer: Any, folder: Path, **changes: Any) -> RareNegativeGRPOTrainer:
    sizes = {"num_generations": 2, "per_device_train_batch_size": 2}
    return RareNegativeGRPOTrainer(
        model,
        [no_repetition()],
        RareNegativeGRPOConfig(**settings(folder, **sizes, **changes)),
        plan=Plan([EDIT]),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=tokenizer,
    )


def test_features_of_another_model_are_refused_and_may_be_allowed(
    other: Any, tokenizer: Any, tmp_path: Path
) -> None:
    for make in (sasft, grpo):
        with pytest.raises(WrongModel, match=r"mini-qwen3;.*another model.*allow_other_model=True"):
            make(other, tokenizer, tmp_path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            make(other, tokenizer, tmp_path, allow_other_model=True)
        assert not [one for one in said if "SAEs" in str(one.message)]
    with pytest.raises(WrongModel, match="another model"):
        screen_causes(other, [EDIT.ref], ["a", "b"], tokenizer=tokenizer)


def test_a_model_whose_name_says_nothing_gets_a_warning(tmp_path: Path) -> None:
    model, own = mini()
    model.config._name_or_path = "runs/sasft/final"
    with pytest.warns(UserWarning, match=r"this is runs/sasft/final.*allow_other_model=True"):
        grpo(model, own, tmp_path)
    config = SASFTConfig(**settings(tmp_path), layers=[7])
    with pytest.warns(UserWarning, match="this is runs/sasft/final"):
        build_penalty(model, config, table({7: (3,)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_penalty(mini()[0], config, table({7: (3,)}))
