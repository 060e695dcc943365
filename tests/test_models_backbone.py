"""Whether a model is the one that SAEs were trained on: known, known not to be, or unknown."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import Dataset
from tiny_models import make_model
from training_data import GROUP, examples, mini, settings, table

import qwen_scope_lens as qsl
from qwen_scope_lens.catalog import bundled_model, find_group
from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.backbone import check_backbone, name_key
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.training.rare_negatives import RareNegativeGRPOConfig, RareNegativeGRPOTrainer
from qwen_scope_lens.training.rewards import no_repetition
from qwen_scope_lens.training.sasft import SASFTConfig, SASFTTrainer


@pytest.fixture(scope="module")
def other() -> Any:
    """The other mini: as wide and as deep as the one that the features belong to."""
    return transformers.AutoModelForCausalLM.from_pretrained(bundled_model("mini-qwen3.5"))


def test_the_own_backbone_passes_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_backbone(mini()[0], find_group(GROUP))
        check_backbone(qsl.load_model("mini-qwen3", up_to_layer=2), find_group(GROUP))


def test_another_backbone_is_refused_and_may_be_allowed(other: Any) -> None:
    with pytest.raises(WrongModel, match=r"mini-qwen3, a qwen3; this is a qwen3_5.*allow_other"):
        check_backbone(other, find_group(GROUP))
    check_backbone(other, find_group(GROUP), allow_other_model=True)
    with pytest.raises(WrongModel, match="which has 8 layers; this has 4"):
        check_backbone(make_model(hidden_size=128), find_group(GROUP))
    with pytest.raises(WrongModel, match=r"width 128; .* has 32"):
        check_backbone(make_model(), find_group(GROUP), allow_other_model=True)


def test_a_name_tells_models_of_one_shape_apart() -> None:
    model = mini()[0]
    model.config._name_or_path = "/cache/models--Qwen--Qwen3-8B-Base/snapshots/0123"
    with pytest.raises(WrongModel, match="another of the catalogue"):
        check_backbone(model, find_group(GROUP))
    model.config._name_or_path = "runs/sasft/final"
    with pytest.warns(UserWarning, match="runs/sasft/final comes from it cannot be seen"):
        check_backbone(model, find_group(GROUP))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_backbone(model, find_group(GROUP), allow_other_model=True)
    assert name_key("Qwen/Qwen3-8B-Base/") == "qwen3-8b-base"


def test_both_trainers_refuse_features_of_another_model(other: Any, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_model("mini-qwen3.5"))
    with pytest.raises(WrongModel, match="this is a qwen3_5"):
        SASFTTrainer(
            other,
            SASFTConfig(**settings(tmp_path), layers=[7]),
            language_features=table({7: (3,)}),
            train_dataset=examples(),
            processing_class=tokenizer,
        )
    with pytest.raises(WrongModel, match="this is a qwen3_5"):
        RareNegativeGRPOTrainer(
            other,
            [no_repetition()],
            RareNegativeGRPOConfig(
                **settings(tmp_path, num_generations=2, per_device_train_batch_size=2)
            ),
            plan=Plan([Edit(f"{GROUP}/5/7", "add", 1.0)]),
            train_dataset=Dataset.from_list([{"prompt": "a"}]),
            processing_class=tokenizer,
        )
    SASFTTrainer(
        other,
        SASFTConfig(**settings(tmp_path), layers=[7], allow_other_model=True),
        language_features=table({7: (3,)}),
        train_dataset=examples(),
        processing_class=tokenizer,
    )
