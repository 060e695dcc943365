"""Read, check, run and resume a training run that one YAML file describes.

The file names a model, data, and features or a plan; everything under `trainer` is passed to TRL's
configuration. A copy of the file and the versions are written beside the checkpoints
(`run_checks.py`). An interrupted run continues from the last complete checkpoint
(`checkpoints.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.errors import BadCorpus, BadFile, ScopeError, UnknownName
from qwen_scope_lens.files import load_yaml
from qwen_scope_lens.train.checkpoints import last_whole, save_final, set_aside
from qwen_scope_lens.train.language_features import LanguageFeatures
from qwen_scope_lens.train.run_checks import (
    check_checkpoint,
    check_numbers,
    check_same_run,
    check_settings,
    record,
)

__all__ = ["Run", "read_run", "run_grpo", "run_sasft", "run_sft"]

COMMON = {"model", "train", "eval", "lora", "trainer"}
SASFT = COMMON | {"language_features"}
GRPO = COMMON | {"plan", "rewards"}


@dataclass(frozen=True)
class Run:
    """The content of a run's file; paths in it are relative to the file."""

    path: Path
    content: Mapping[str, Any]

    def need(self, key: str) -> Any:
        if key not in self.content:
            raise BadFile(f"{self.path} has no `{key}`: see `qsl train --help` for an example")
        return self.content[key]

    def file(self, key: str) -> Path:
        return (self.path.parent / str(self.need(key))).expanduser()

    def output(self) -> Path:
        folder = dict(self.content.get("trainer") or {}).get("output_dir")
        if not folder:
            raise BadFile(
                f"{self.path} has no `trainer: output_dir`: name the folder for the checkpoints"
            )
        return (self.path.parent / str(folder)).expanduser()


def read_run(path: Path, keys: set[str]) -> Run:
    """Read a YAML mapping; unknown keys are refused, so that a misspelt one is not ignored."""
    try:
        content = load_yaml(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # PyYAML draws a picture in four lines
        raise BadFile(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(content, dict):
        raise BadFile(f"{path} is not a mapping: expected `model: ..`, `train: ..`, `trainer: ..`")
    if unknown := sorted(map(str, set(content) - keys)):
        raise BadFile(
            f"{path} has unknown keys {', '.join(unknown)}: expected {', '.join(sorted(keys))}"
        )
    for key in ("trainer", "lora"):
        if not isinstance(content.get(key) or {}, dict):
            raise BadFile(f"{path}: `{key}` has to be a mapping of settings")
    check_numbers(path, content)
    return Run(path, content)


def run_sasft(path: Path, resume: bool = True) -> Path:
    """Run supervised fine-tuning with the penalty; returns the folder of the trained model."""
    from qwen_scope_lens.train.sasft import SASFTConfig, SASFTTrainer

    run = read_run(path, SASFT)
    args = _arguments(run, SASFTConfig)
    _check_earlier(run, "sasft", args, resume)
    features = LanguageFeatures.load(run.file("language_features"))
    trainer = _set_up(run, SASFTTrainer, args, language_features=features)
    return _train(run, "sasft", trainer, resume)


def run_sft(path: Path, resume: bool = True) -> Path:
    """Run plain supervised fine-tuning; returns the folder of the trained model, or with `lora` of
    the adapter."""
    from trl import SFTConfig

    from qwen_scope_lens.train.sasft import PlainTrainer

    run = read_run(path, COMMON)
    args = _arguments(run, SFTConfig)
    _check_earlier(run, "sft", args, resume)
    trainer = _set_up(run, PlainTrainer, args)
    if not len(trainer.train_dataset):
        raise BadCorpus(
            f"{run.path}: no example has a reply within max_length {args.max_length}: raise it, or"
            " shorten the prompts"
        )
    return _train(run, "sft", trainer, resume)


def run_grpo(path: Path, resume: bool = True) -> Path:
    """Run GRPO with rare negatives; returns the folder of the trained model."""
    from qwen_scope_lens.steering.plan import Plan
    from qwen_scope_lens.train.rare_negatives import (
        RareNegativeGRPOConfig,
        RareNegativeGRPOTrainer,
    )

    run = read_run(path, GRPO)
    args = _arguments(run, RareNegativeGRPOConfig)
    _check_earlier(run, "grpo", args, resume)
    plan = Plan.load(run.file("plan"))
    rewards = reward_functions(run)
    trainer = _set_up(run, RareNegativeGRPOTrainer, args, reward_funcs=rewards, plan=plan)
    return _train(run, "grpo", trainer, resume)


def _arguments(run: Run, kind: type) -> Any:
    given = {**dict(run.need("trainer")), "output_dir": str(run.output())}
    check_settings(run.path, given, kind)
    try:
        return kind(**given)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadFile(f"{run.path}: `trainer` cannot be used: {error}") from error


def _model(run: Run) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from qwen_scope_lens.models.checkpoint import open_config, open_tokenizer

    name = str(run.need("model"))
    beside = run.path.parent / name
    source = bundled_model(name) or (beside if beside.is_dir() else name)
    try:
        open_config(str(source))  # refuses a model that needs its own code
        tokenizer = open_tokenizer(str(source))
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
        return model, tokenizer
    except ScopeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first_line = str(error).partition("\n")[0]
        raise BadFile(f"{run.path}: model {name} cannot be loaded: {first_line}") from error


def _data(run: Run, key: str) -> Any:
    """A dataset: JSONL, CSV, Parquet, a folder of `datasets`, or a name on the hub."""
    import datasets

    if run.content.get(key) is None:
        if key == "eval":
            return None
        run.need(key)
    path = run.file(key)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    try:
        if path.is_dir():
            return datasets.load_from_disk(str(path))
        if path.suffix in kinds and path.is_file():
            return datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        if path.suffix in kinds:
            raise BadCorpus(f"{path} does not exist: `{key}` of {run.path}")
        return datasets.load_dataset(str(run.content[key]), split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, BadCorpus):
            raise
        raise BadCorpus(f"`{key}` of {run.path} cannot be read: {error}") from error


def _lora(run: Run) -> Any:
    settings = run.content.get("lora")
    if not settings:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
    except (TypeError, ValueError) as error:
        raise BadFile(f"{run.path}: `lora` cannot be used: {error}") from error


def reward_functions(run: Run) -> list[Any]:
    """Reward functions: `no_repetition`, `no_script: zh`, or the user's `module:function`."""
    from importlib import import_module

    from qwen_scope_lens.train import metrics as rewards

    own: dict[str, Any] = {
        "no_repetition": rewards.no_repetition,
        "no_script": rewards.no_script,
    }
    given = run.content.get("rewards", ["no_repetition"])
    found = []
    entries = [given] if isinstance(given, (str, dict)) else given
    if not isinstance(entries, list) or not entries or not all(map(_is_reward, entries)):
        raise BadFile(
            f"{run.path}: `rewards` is {given!r}: expected names, or names with their settings"
        )
    for entry in entries:
        name, settings = (entry, None) if isinstance(entry, str) else next(iter(entry.items()))
        if name in own:
            options = settings if isinstance(settings, dict) else {}
            if settings is not None and not options:
                options = {next(iter(inspect.signature(own[name]).parameters)): settings}
            try:
                found.append(own[name](**options))
            except (TypeError, ValueError) as error:
                if isinstance(error, ScopeError):
                    raise
                raise BadFile(f"{run.path}: reward {name} cannot be used: {error}") from error
            continue
        module, colon, function = name.partition(":")
        if not colon:
            raise UnknownName(
                f"{run.path}: unknown reward {name!r}: expected {', '.join(own)} or module:function"
            )
        try:
            found.append(getattr(import_module(module), function))
        except (ImportError, AttributeError) as error:
            raise UnknownName(f"{run.path}: reward {name} cannot be imported: {error}") from error
    return found


def _is_reward(entry: Any) -> bool:
    return isinstance(entry, str) or (
        isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry)), str)
    )


def _set_up(run: Run, kind: Any, args: Any, **own: Any) -> Any:
    """The trainer on the run's model and data; an error of TRL becomes one line."""
    model, tokenizer = _model(run)
    named = {
        "train_dataset": _data(run, "train"),
        "eval_dataset": _data(run, "eval"),
        "processing_class": tokenizer,
        "peft_config": _lora(run),
    }
    try:
        return kind(model, args=args, **own, **named)
    except (TypeError, ValueError, KeyError, OverflowError, NotImplementedError) as error:
        if isinstance(error, ScopeError):
            raise
        reason = " ".join(str(error).split())
        raise BadFile(f"{run.path}: the run cannot be set up: {reason}") from error


def _check_earlier(run: Run, kind: str, args: Any, resume: bool) -> None:
    """Before a model is loaded, refuse checkpoints from which this run may not continue."""
    output = run.output()
    last = last_whole(output) if resume else None
    if last is not None:
        check_same_run(run.path, kind, run.content, output)
        check_checkpoint(run.path, last, args.max_steps)


def _train(run: Run, kind: str, trainer: Any, resume: bool) -> Path:
    output = run.output()
    if trainer.args.should_save:
        set_aside(output, everything=not resume)
    trainer.accelerator.wait_for_everyone()
    last = last_whole(output) if resume else None
    if trainer.args.should_save:
        record(run.path, kind, run.content, output)
    if last is not None and last.endswith(f"-{trainer.args.max_steps}"):
        # The run was killed after its last checkpoint. TRL would do one more step here.
        trainer._load_from_checkpoint(last)
    else:
        trainer.train(resume_from_checkpoint=last)
    save_final(trainer, output / "final")
    return output / "final"
