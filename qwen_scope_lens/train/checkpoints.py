"""Complete checkpoints: a run that was killed continues from the last complete one.

TRL writes a checkpoint file by file under its final name, so an incomplete checkpoint of a killed
run looks like a complete one. Here a list of its files is written into each checkpoint last. A
checkpoint without a matching list is never resumed from: it is renamed with a warning, and never
deleted.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from qwen_scope_lens.errors import BadFile, CannotWrite
from qwen_scope_lens.files import read_json, whole_folder, write_json

__all__ = ["WholeCheckpoints", "last_whole", "save_final", "set_aside"]

FORMAT, VERSION = "qsl-checkpoint", 1
NAME = "qsl_whole.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class WholeCheckpoints:
    """Mixin for trainers that writes a list of its files into each checkpoint last."""

    args: Any
    state: Any
    accelerator: Any
    _get_output_dir: Callable[..., str]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # TRL would remove old checkpoints here, before the new one is known to be complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = self._get_output_dir(trial=trial)
            list_files(Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def train(self, resume_from_checkpoint: Any = None, **rest: Any) -> Any:
        """Train as TRL does; `resume_from_checkpoint=True` means the last complete checkpoint."""
        if resume_from_checkpoint is True:
            output = Path(self.args.output_dir)
            resume_from_checkpoint = last_whole(output)
            if resume_from_checkpoint is None:
                raise BadFile(
                    f"{output} has no complete checkpoint to continue from: start without one"
                )
        return super().train(resume_from_checkpoint, **rest)  # type: ignore[misc]

    def _load_from_checkpoint(self, checkpoint: str, *rest: Any, **named: Any) -> Any:
        with _named(checkpoint):
            return super()._load_from_checkpoint(checkpoint, *rest, **named)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> Any:
        with _named(checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


@contextmanager
def _named(checkpoint: str | None) -> Iterator[None]:
    """Turn the error of a checkpoint of another model or kind of run into one line."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError, EOFError) as error:
        if checkpoint is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise BadFile(
            f"{checkpoint} does not belong to this model and run ({reason}): continue with the"
            " model and run that made it, or start without it (`qsl train .. --fresh`)"
        ) from error


def last_whole(output: Path) -> str | None:
    """The newest complete checkpoint in the folder of a run; None if there is none."""
    found = [folder for _, folder in _checkpoints(output) if _is_whole(folder)]
    return str(found[-1]) if found else None


def set_aside(output: Path, everything: bool = False) -> list[Path]:
    """Rename the incomplete checkpoints, or all of them, with a warning. `-> new paths`"""
    moved = []
    for _, folder in _checkpoints(output):
        whole = _is_whole(folder)
        if whole and not everything:
            continue
        place = _free(output / f"aside-{folder.name}")
        try:
            folder.rename(place)
        except OSError as error:
            raise CannotWrite(f"{folder} cannot be set aside: {error.strerror}") from error
        why = "belongs to an earlier run" if whole else "is not complete"
        warnings.warn(
            f"{folder} {why}: it was renamed to {place.name}, which you may delete", stacklevel=2
        )
        moved.append(place)
    return moved


def save_final(trainer: Any, folder: Path) -> None:
    """Save the trained model; `folder` gets its name only when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    if trainer.args.should_save:
        with whole_folder(folder) as place:
            assert place == partial
            trainer.save_model(str(place))
    else:  # other processes help to collect sharded weights
        trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()


def list_files(folder: Path) -> None:
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    write_json(folder / NAME, FORMAT, VERSION, {"files": sizes})


def _is_whole(folder: Path) -> bool:
    try:
        sizes = read_json(folder / NAME, FORMAT, VERSION, "qsl train")["files"]
        return bool(sizes) and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (BadFile, KeyError, AttributeError, TypeError, OSError):
        return False


def _checkpoints(output: Path) -> list[tuple[int, Path]]:
    """All checkpoints with their steps, complete or not."""
    if not output.is_dir():
        return []
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in output.iterdir()]
    return sorted((int(name[1]), path) for name, path in found if name and path.is_dir())


def _free(place: Path) -> Path:
    """The path itself, or with the first number that makes it new."""
    number = 2
    free = place
    while free.exists():
        free, number = place.with_name(f"{place.name}-{number}"), number + 1
    return free
