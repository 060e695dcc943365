"""Checks on the file of a run, before a model is loaded and before a run continues.

They refuse numbers that no trainer can use. They also refuse to continue from the checkpoints of a
run with other data, features or settings, because that would mix two experiments under one name.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.files import file_sha256, load_yaml, whole_file
from qwen_scope_lens.version import versions

__all__ = ["check_checkpoint", "check_numbers", "check_same_run", "check_settings", "record"]

RECORD = "qsl_run.yaml"
INPUTS = ("train", "eval", "language_features", "plan")
LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "max_completion_length": 1,
    "features_per_layer": 1,
    "steered_per_group": 0,
}
FREE = ("max_steps", "num_train_epochs", "report_to", "run_name", "disable_tqdm", "output_dir")
"""Settings under `trainer` that may change when a run continues, besides those on logging, saving,
evaluation and data loading."""
FREE_BEGINNINGS = ("logging_", "save_", "eval_", "dataloader_", "log_", "hub_", "push_to_")


def check_numbers(path: Path, content: Any, name: str = "") -> None:
    """Refuse numbers anywhere in the file that are not finite or do not fit into 64 bits."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            check_numbers(path, value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list):
        for value in content:
            check_numbers(path, value, name)
    elif isinstance(content, float) and not math.isfinite(content):
        raise BadFile(f"{path}: `{name}` is {content}: expected a finite number")
    elif isinstance(content, int) and not -(2**63) <= content < 2**63:
        raise BadFile(
            f"{path}: `{name}` is a whole number of {content.bit_length()} bits: expected up to 64"
        )


def check_settings(path: Path, given: Mapping[str, Any], kind: type) -> None:
    """Refuse unknown names under `trainer`, text for numbers, and numbers out of range."""
    known = {each.name: each for each in fields(kind) if each.init}
    if unknown := sorted(set(map(str, given)) - set(known)):
        raise BadFile(f"{path}: `trainer` has unknown settings {', '.join(unknown)}")
    for name, value in given.items():
        default = known[name].default
        number = default is not MISSING and type(default) in (int, float)
        if number and value is not None and type(value) not in (int, float):
            hint = " (YAML reads 1e-6 as text: write 1.0e-6)" if isinstance(value, str) else ""
            raise BadFile(f"{path}: `trainer.{name}` is {value!r}: expected a number{hint}")
        if name in LEAST and type(value) in (int, float) and value < LEAST[name]:
            raise BadFile(f"{path}: `trainer.{name}` is {value}: expected {LEAST[name]} or more")
        if name in ("seed", "data_seed") and value is not None and not _is_seed(value):
            raise BadFile(f"{path}: `trainer.{name}` is {value!r}: expected 0 to {2**32 - 1}")


def check_same_run(path: Path, kind: str, content: Mapping[str, Any], output: Path) -> None:
    """Refuse to continue if the folder's record names other inputs or settings."""
    try:
        before = load_yaml(output / RECORD)
        mine, theirs = _identity(path, kind, content), before["identity"]
        changed = [
            f"{name} was {theirs.get(name)!r}, is {mine.get(name)!r}"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]
    except FileNotFoundError:
        return  # nothing is known of an earlier run
    except (
        BadFile,
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise BadFile(
            f"{output / RECORD} cannot be read, so it is not known to which run the checkpoints"
            " beside it belong. Use --fresh to start again, which sets them aside"
        ) from error
    if changed:
        raise BadFile(
            f"the checkpoints in {output} belong to another run: {'; '.join(changed)[:400]}. Undo"
            f" this change in {path}, name another output_dir, or start again with --fresh"
        )


def check_checkpoint(path: Path, checkpoint: str, max_steps: int) -> None:
    """Refuse a checkpoint whose state is damaged, or that has more steps than the run."""
    state = Path(checkpoint, "trainer_state.json")
    try:
        step = json.loads(state.read_text("utf-8"))["global_step"]
        right = step == int(Path(checkpoint).name.rpartition("-")[2])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadFile(f"{state} is damaged ({error!r}): start again with --fresh") from error
    if not right:
        raise BadFile(
            f"{state} belongs to step {step}, not to {Path(checkpoint).name}: start again with"
            " --fresh"
        )
    if 0 < max_steps < step:
        raise BadFile(
            f"{checkpoint} has done {step} steps, but {path} asks for {max_steps}: raise max_steps,"
            " or start again with --fresh"
        )


def record(path: Path, kind: str, content: Mapping[str, Any], output: Path) -> None:
    """Write what the run file `path` says, and the packages' versions, into the folder `output`."""
    packages = versions("trl", "peft", "accelerate")
    rows = {
        "kind": kind,
        "run": dict(content),
        "identity": _identity(path, kind, content),
        "python": platform.python_version(),
        "packages": packages,
    }
    with whole_file(output / RECORD) as partial:
        partial.write_text(yaml.safe_dump(rows, allow_unicode=True, sort_keys=False), "utf-8")


def _identity(path: Path, kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change if a run continues. Files are compared by their content."""
    found: dict[str, Any] = {"kind": kind}
    for key, value in content.items():
        if key != "trainer":
            found[key] = _content_of(path, str(value)) if key in INPUTS else value
    for key, value in dict(content.get("trainer") or {}).items():
        if key not in FREE and not key.startswith(FREE_BEGINNINGS):
            found[f"trainer.{key}"] = value
    return found


def _content_of(path: Path, name: str) -> str:
    file = (path.parent / name).expanduser()
    return f"{name} (sha256 {file_sha256(file)[:16]})" if file.is_file() else name


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32
