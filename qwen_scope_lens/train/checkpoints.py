"""Checkpoints that are whole or not there: a run that was killed goes on from the last whole one.

TRL writes a checkpoint file by file under its final name, so one that was being written when the
run was killed looks like any other. Here a list of its files is put into it last; a folder without
a list that fits is never resumed from. It is set aside under another name, with a word, and
never deleted.
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
    """Mixed into a trainer: its checkpoints end with a list of their files."""

    args: Any
    state: Any
    accelerator: Any
    _get_output_dir: Callable[..., str]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # TRL removes old checkpoints at the end of this; until the new one is known to be whole
        # they are all there is.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = self._get_output_dir(trial=trial)
            _list_files(Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def train(self, resume_from_checkpoint: Any = None, **rest: Any) -> Any:
        """As TRL's; with `resume_from_checkpoint=True` it goes on from the last whole one."""
        if resume_from_checkpoint is True:
            output = Path(self.args.output_dir)
            resume_from_checkpoint = last_whole(output)
            if resume_from_checkpoint is None:
                raise BadFile(f"{output} has no whole checkpoint to go on from: start without one")
        return super().train(resume_from_checkpoint, **rest)  # type: ignore[misc]

    def _load_from_checkpoint(self, checkpoint: str, *rest: Any, **named: Any) -> Any:
        with _named(checkpoint):
            return super()._load_from_checkpoint(checkpoint, *rest, **named)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> Any:
        with _named(checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


@contextmanager
def _named(checkpoint: str | None) -> Iterator[None]:
    """A checkpoint of another model, or of another kind of run, is one line."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError, EOFError) as error:
        if checkpoint is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise BadFile(
            f"{checkpoint} does not belong to this model and run ({reason}): go on with those it"
            " was made with, or start without it (`qsl train .. --fresh`)"
        ) from error


def last_whole(output: Path) -> str | None:
    """The newest whole checkpoint of a run's folder, if it has one."""
    found = [folder for _, folder in _checkpoints(output) if _is_whole(folder)]
    return str(found[-1]) if found else None


def set_aside(output: Path, everything: bool = False) -> list[Path]:
    """Rename the checkpoints that are not whole (or all of them), and say so. `-> new names`"""
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
        why = "belongs to an earlier run" if whole else "was not written to its end"
        warnings.warn(f"{folder} {why}: it is now {place.name}, yours to delete", stacklevel=2)
        moved.append(place)
    return moved


def save_final(trainer: Any, folder: Path) -> None:
    """The trained model in `folder`, which has that name only when everything is in it."""
    partial = folder.with_name(f".{folder.name}.partial")
    if trainer.args.should_save:
        with whole_folder(folder) as place:
            assert place == partial
            trainer.save_model(str(place))
    else:  # other processes take part in collecting sharded weights
        trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()


def _list_files(folder: Path) -> None:
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
    """All of them by their steps, whole or not."""
    if not output.is_dir():
        return []
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in output.iterdir()]
    return sorted((int(name[1]), path) for name, path in found if name and path.is_dir())


def _free(place: Path) -> Path:
    """The name itself, or with the first number that is not taken."""
    number = 2
    free = place
    while free.exists():
        free, number = place.with_name(f"{place.name}-{number}"), number + 1
    return free
