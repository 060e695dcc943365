"""Writing whole or not at all: folders, files, one writer at a time, hashes, JSON with a name.

A name appears only when everything under it is written; what a killed run left behind is hidden,
harmless and removed by the next. Every failure of the disk becomes `CannotWrite`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qwen_scope_lens.errors import BadFile, CannotWrite, ScopeError

__all__ = [
    "exclusive",
    "file_sha256",
    "open_regular",
    "read_json",
    "read_text",
    "whole_file",
    "whole_folder",
    "write_json",
]


@contextlib.contextmanager
def exclusive(folder: Path, wait: bool = False) -> Iterator[None]:
    """One writer for a folder. The lock goes with the process, so a killed one leaves none.

    Where another has it: wait for it, or raise.
    """
    lock = folder / ".lock"
    with _named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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


def open_regular(path: Path) -> IO[bytes]:
    """A file for reading, links followed; a FIFO, a socket or a device raises, nothing waits."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BadFile(f"{path} is {_kind(mode)}: expected a file")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise IsADirectoryError(f"{path} is {_kind(mode)}: expected a file")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """All of a text file."""
    with open_regular(path) as file:
        return file.read().decode(encoding).replace("\r\n", "\n")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, format: str, version: int, content: Mapping[str, Any]) -> None:
    """A JSON file that names its own format and version, so that no other is taken for it."""
    head = {"format": format, "version": version}
    text = json.dumps({**head, **content}, ensure_ascii=False, indent=1, allow_nan=False)
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, format: str, version: int, made_by: str) -> dict[str, Any]:
    """What `write_json` wrote, else an error. `made_by` is the command that makes such a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadFile(f"{path} does not exist: `{made_by}` makes such a file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{path} cannot be read as JSON ({error}): expected {format}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != format:
        raise BadFile(
            f"{path} is no {format} file (its format says {found!r}): `{made_by}` makes one"
        )
    if content.get("version") != version:
        raise BadFile(
            f"{path} is {format} version {content.get('version')!r}, this package reads version"
            f" {version}: make it again with `{made_by}`, or use the package that wrote it"
        )
    return {key: value for key, value in content.items() if key not in ("format", "version")}


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a file",
}


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


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
