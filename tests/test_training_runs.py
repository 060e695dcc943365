"""`qsl train`: runs from YAML files, resumed, with clear words for what is wrong in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from training_data import GROUP, examples, settings, table

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.cli.verbs import main
from qwen_scope_lens.errors import BadFile, UnknownName
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.training.runs import GRPO, SASFT, _rewards, read_run


def write_run(folder: Path, **content: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def sasft_run(folder: Path, **changes: Any) -> Path:
    table({7: (1, 2)}).save(folder / "features.json")
    examples().to_json(folder / "data.jsonl")
    trainer = settings(Path("out"), save_strategy="steps", save_steps=1, layers=[7], lam=0.5)
    return write_run(
        folder,
        model="mini-qwen3",
        train="data.jsonl",
        language_features="features.json",
        trainer=trainer | changes,
    )


def test_a_sasft_run_and_its_resumption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sasft_run(tmp_path, max_steps=1)
    assert main(["train", "sasft", str(path)]) == 0
    out = tmp_path / "out"
    assert str(out / "final") in capsys.readouterr().out
    transformers.AutoModelForCausalLM.from_pretrained(out / "final")
    record = yaml.safe_load((out / "qsl_run.yaml").read_text("utf-8"))
    assert record["run"]["trainer"]["lam"] == 0.5
    assert record["packages"]["trl"]
    sasft_run(tmp_path, max_steps=2)
    assert main(["train", "sasft", str(path)]) == 0
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text("utf-8"))
    assert [entry["step"] for entry in state["log_history"]] == [1, 2]


def test_a_grpo_run(tmp_path: Path) -> None:
    Plan([Edit(FeatureRef(GROUP, 5, 7), "add", 200.0)]).save(tmp_path / "plan.json")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Use the"}\n{"prompt": "A file"}\n')
    trainer = settings(
        Path("out"), max_steps=1, num_generations=2, per_device_train_batch_size=2,
        max_completion_length=4,
    )  # fmt: skip
    path = write_run(
        tmp_path,
        model="mini-qwen3",
        train="prompts.jsonl",
        plan="plan.json",
        rewards=[{"no_repetition": {"value": -2, "min_times": 3}}, {"no_script": "zh"}],
        lora={"r": 2, "target_modules": ["q_proj"]},
        trainer=trainer,
    )
    assert main(["train", "grpo", str(path)]) == 0
    assert (tmp_path / "out" / "final" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "cannot be read as YAML"),
        ("just text", "no mapping"),
        ("modle: a\n", "unknown keys modle"),
        ("trainer: 3\n", "has to be a mapping"),
    ],
)
def test_files_that_are_no_runs(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(BadFile, match=words):
        read_run(path, SASFT)
    with pytest.raises(BadFile, match="cannot be read"):
        read_run(tmp_path / "none.yaml", SASFT)


def test_what_is_wrong_in_a_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(path: Path) -> str:
        assert main(["train", "sasft", str(path)]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("qsl train: ")
        return error

    assert "unknown settings learning_rat" in message(sasft_run(tmp_path, learning_rat=1))
    assert "cannot be used: lam has" in message(sasft_run(tmp_path, lam=-1.0))
    path = sasft_run(tmp_path)
    content = yaml.safe_load(path.read_text("utf-8"))
    for key, value, words in (
        ("model", "no/such-model", "cannot be loaded"),
        ("train", "none.jsonl", "does not exist"),
        ("language_features", "none.json", "qsl train languages"),
        ("lora", {"rank": 2}, "`lora` cannot be used"),
        ("trainer", {"max_steps": 1}, "no `trainer: output_dir`"),
    ):
        assert words in message(write_run(tmp_path, **(content | {key: value})))
    (tmp_path / "empty.jsonl").write_text("{broken\n", "utf-8")
    assert "cannot be read" in message(write_run(tmp_path, **(content | {"train": "empty.jsonl"})))


def test_rewards_by_name_and_of_ones_own(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, rewards=["no_repetition", "json:dumps"]), GRPO)
    assert _rewards(run)[1] is json.dumps
    for wrong in ("no_such", "json:no_such", "no.such.module:f"):
        with pytest.raises(UnknownName, match="reward"):
            _rewards(read_run(write_run(tmp_path, rewards=[wrong]), GRPO))
    with pytest.raises(UnknownName, match="'de' has no script"):
        _rewards(read_run(write_run(tmp_path, rewards=[{"no_script": "de"}]), GRPO))


def test_measuring_replies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "replies.jsonl"
    rows = [{"text": "plain", "p": 1}, {"text": "字", "p": 2}, {"text": "na " * 20, "p": 2}]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert main(["train", "measure", str(path), "--script", "zh"]) == 0
    assert "0.333" in capsys.readouterr().out
    assert main(["train", "measure", str(path), "--prompt", "p"]) == 0
    assert "repeat ratio: 0.333" in capsys.readouterr().out
    assert main(["train", "measure", str(path), "--text", "reply"]) == 1
    assert "line 1: expected an object with reply" in capsys.readouterr().err
    path.write_text("", "utf-8")
    assert main(["train", "measure", str(path)]) == 1
    assert "needs at least one" in capsys.readouterr().err
