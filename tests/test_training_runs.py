"""`qsl train`: runs from YAML files, resumed, with clear words for what is wrong in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from tiny_models import make_model
from training_data import GROUP, examples, settings, table

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.cli.verbs import main
from qwen_scope_lens.errors import BadFile, UnknownName
from qwen_scope_lens.steering import Edit, Plan
from qwen_scope_lens.train.checkpoints import last_whole, list_files, set_aside
from qwen_scope_lens.train.runs import GRPO, SASFT, read_run, reward_functions, run_sasft


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_from_the_last_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save dies before the optimizer is written; the third names what it found."""
    (tmp_path / "whole").mkdir()
    reference = run_sasft(sasft_run(tmp_path / "whole", max_steps=3))
    path, out = sasft_run(tmp_path, max_steps=3, save_total_limit=1), tmp_path / "out"
    with monkeypatch.context() as patch:

        def die(trainer: Any, folder: str) -> None:
            if folder.endswith("-2"):
                raise KeyboardInterrupt

        patch.setattr(transformers.Trainer, "_save_scaler", die)
        with pytest.raises(KeyboardInterrupt):
            run_sasft(path)
    assert (out / "checkpoint-2").is_dir()
    assert not (out / "final").exists()
    assert last_whole(out) == str(out / "checkpoint-1")  # not removed for the half one
    with pytest.warns(UserWarning, match="checkpoint-2 is not complete.*aside"):
        final = run_sasft(path)
    assert (out / "aside-checkpoint-2" / "model.safetensors").is_file()
    assert last_whole(out) == str(out / "checkpoint-3")
    assert not (out / "checkpoint-1").exists()  # save_total_limit still holds
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text("utf-8"))
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3]
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in (final, reference)]
    assert weights[0] == weights[1]
    shutil.rmtree(final)  # killed after its last checkpoint: no step too many
    assert (run_sasft(path) / "model.safetensors").read_bytes() == weights[0]
    assert last_whole(out) == str(out / "checkpoint-3")


def test_a_checkpoint_is_whole_when_its_list_fits(tmp_path: Path) -> None:
    for step in (1, 9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "weights").write_bytes(b"12345")
        list_files(folder)
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "deep" / "weights").write_bytes(b"123")
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "qsl_whole.json").write_text("{", "utf-8")
    with pytest.warns(UserWarning, match="is not complete"):
        moved = set_aside(tmp_path)
    assert [place.name for place in moved] == ["aside-checkpoint-9", "aside-checkpoint-10"]
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-1")
    assert set_aside(tmp_path) == []
    assert last_whole(tmp_path / "none") is None


@pytest.mark.slow
def test_what_contradicts_the_checkpoints_is_refused_and_fresh_sets_them_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sasft_run(tmp_path, max_steps=1)
    assert main(["train", "sasft", str(path)]) == 0

    def message(*more: str) -> str:
        assert main(["train", "sasft", str(path), *more]) == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    sasft_run(tmp_path, max_steps=1, lam=0.25)
    assert "trainer.lam was 0.5, is 0.25" in message()
    sasft_run(tmp_path, max_steps=1)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b", "language": "en"}\n')
    assert "train was 'data.jsonl (sha256" in message()
    sasft_run(tmp_path, max_steps=1)
    state = tmp_path / "out" / "checkpoint-1" / "trainer_state.json"
    text = state.read_text("utf-8")
    state.write_text(text.replace('"global_step": 1', '"global_step": 7'), "utf-8")
    assert "belongs to step 7, not to checkpoint-1" in message()
    state.write_text(text.replace("{", "[", 1), "utf-8")
    assert "is damaged" in message()
    state.write_text(text, "utf-8")
    make_model().save_pretrained(state.parent)
    list_files(state.parent)
    sasft_run(tmp_path, max_steps=2)
    assert "checkpoint-1 does not belong to this model and run" in message()
    sasft_run(tmp_path, max_steps=1)
    (tmp_path / "out" / "qsl_run.yaml").write_text("[", "utf-8")
    assert "Use --fresh to start again" in message()
    with pytest.warns(UserWarning, match="belongs to an earlier run"):
        assert main(["train", "sasft", str(path), "--fresh"]) == 0
    assert (tmp_path / "out" / "aside-checkpoint-1").is_dir()
    assert last_whole(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")


def test_a_grpo_run(tmp_path: Path) -> None:
    Plan([Edit(FeatureRef(GROUP, 5, 7), "add", 200.0)]).save(tmp_path / "plan.json")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Use the"}\n{"prompt": "A file"}\n')
    trainer = settings(
        Path("out"),
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=4,
    )
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


BILLION = "trainer:\n" + "".join(
    f"  {name}: &{name} [{', '.join([f'*{before}'] * 9 if before else ['x'] * 9)}]\n"
    for before, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)
"""Ten lines that stand for 9^9 values."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "cannot be read as YAML"),
        ("just text", "not a mapping"),
        ("modle: a\n", "unknown keys modle"),
        ("trainer: 3\n", "has to be a mapping"),
        (f"model: {'7' * 5000}\n", "cannot be read as YAML"),
        ("model: " + "[" * 5000, "cannot be read as YAML"),
        ("model: 2026-13-45\n", "cannot be read as YAML"),
        ("trainer: &a {a: *a}\n", "nested deeper than 100 levels"),  # itself
        (BILLION, "more than 100,000 values"),
        (f"lora: {{r: {2**70}}}\n", "lora.r. is a whole number of 71 bits"),
        ("trainer: {learning_rate: .nan}\n", "learning_rate. is nan"),
        ("lora: {target_modules: [a, .inf]}\n", "lora.target_modules. is inf"),
    ],
)
def test_files_that_are_no_runs(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(BadFile, match=words):
        read_run(path, SASFT)
    with pytest.raises(BadFile, match="cannot be read"):
        read_run(tmp_path / "none.yaml", SASFT)


def test_what_is_wrong_in_a_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(path: Path) -> str:
        assert main(["train", "sasft", str(path)]) == 1
        error = "qsl train: " + capsys.readouterr().err.strip().rpartition("qsl train: ")[2]
        assert "Traceback" not in error
        return error

    assert "unknown settings learning_rat" in message(sasft_run(tmp_path, learning_rat=1))
    assert "cannot be used: lam -1.0" in message(sasft_run(tmp_path, lam=-1.0))
    assert "expected 0 to 4294967295" in message(sasft_run(tmp_path, seed=2**40))
    assert "write 1.0e-6" in message(sasft_run(tmp_path, learning_rate="1e-6"))
    assert "expected 0 or more" in message(sasft_run(tmp_path, learning_rate=-1.0))
    assert "batch_size` is 0: " in message(sasft_run(tmp_path, per_device_train_batch_size=0))
    path = sasft_run(tmp_path)
    content = yaml.safe_load(path.read_text("utf-8"))
    for name in ("damaged", "custom"):
        shutil.copytree(str(bundled_model("mini-qwen3")), tmp_path / name)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"12345678")
    config = json.loads((tmp_path / "custom" / "config.json").read_text("utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "custom" / "mine.py").write_text("raise SystemExit('it ran')\n", "utf-8")
    for key, value, words in (
        ("model", "no/such-model", "cannot be loaded"),
        ("model", "damaged", "cannot be loaded"),
        ("model", "custom", "brings Python code of its own"),
        ("train", "none.jsonl", "does not exist"),
        ("language_features", "none.json", "qsl train languages"),
        ("lora", {"rank": 2}, "`lora` cannot be used"),
        ("lora", {"r": 2, "target_modules": ["none"]}, "cannot be set up: "),
        ("trainer", {"max_steps": 1}, "no `trainer: output_dir`"),
    ):
        assert words in message(write_run(tmp_path, **(content | {key: value})))
    (tmp_path / "empty.jsonl").write_text("{broken\n", "utf-8")
    assert "cannot be read" in message(write_run(tmp_path, **(content | {"train": "empty.jsonl"})))


def test_rewards_by_name_and_of_ones_own(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, rewards=["no_repetition", "json:dumps"]), GRPO)
    assert reward_functions(run)[1] is json.dumps
    for wrong in ("no_such", "json:no_such", "no.such.module:f"):
        with pytest.raises(UnknownName, match="reward"):
            reward_functions(read_run(write_run(tmp_path, rewards=[wrong]), GRPO))
    odds: tuple[Any, ...] = ([], 5, [5], [{}], {"no_repetition": 1, "no_script": "zh"})
    for odd in odds:
        with pytest.raises(BadFile, match="expected names"):
            reward_functions(read_run(write_run(tmp_path, rewards=odd), GRPO))
    for rule in ({"min_time": 3}, {"min_times": 1}, {"value": "low"}, {"min_times": "x"}):
        with pytest.raises(BadFile, match="no_repetition cannot be used"):
            reward_functions(read_run(write_run(tmp_path, rewards=[{"no_repetition": rule}]), GRPO))
    with pytest.raises(UnknownName, match="'de' has no script"):
        reward_functions(read_run(write_run(tmp_path, rewards=[{"no_script": "de"}]), GRPO))


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
    assert "it has no documents" in capsys.readouterr().err
