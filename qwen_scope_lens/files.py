"""Writing whole or not at all: folders, files, one writer at a time, hashes.

A name appears only when everything under it is written; what a killed run left behind is hidden,
harmless and removed by the next. Every failure of the disk becomes `CannotWrite`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen_scope_lens.errors import CannotWrite, ScopeError

__all__ = ["exclusive", "file_sha256", "whole_file", "whole_folder"]


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One writer for a folder. The lock goes with the process, so a killed one leaves none."""
    lock = folder / ".lock"
    with _named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CannotWrite(
                f"another process is writing into {folder}: wait for it, or choose another folder"
            ) from error
        yield


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place to fill; it takes the name `folder` (replacing what was there) at the end."""
    partial = _partial(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CannotWrite(f"{folder} is a link or a file: a folder of that name is to be written")
    with _named_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the name `path` (replacing what was there) at the end."""
    partial = _partial(path)
    with _named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def _named_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, ScopeError):
            raise
        raise CannotWrite(
            f"cannot write {target}: {error.strerror}. Nothing half is left under that name, and"
            " what was finished before stays: make room or choose another place, and run it again"
        ) from error
