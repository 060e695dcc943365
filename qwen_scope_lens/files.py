"""Files are written whole or not at all; locks, hashes, and JSON that names its own format.

A file or folder gets its name only when everything in it is written. What a killed run leaves
behind is hidden and harmless, and the next run removes it. Every failure of the disk becomes
`CannotWrite`.

A folder may come from somebody else. So we never write through a link that stands under one of our
own names, we never empty a lock file, and we read regular files only: opening a FIFO would wait
forever.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from qwen_scope_lens.errors import BadFile, CannotWrite, ScopeError

__all__ = [
    "exclusive",
    "file_sha256",
    "gunzip",
    "is_url",
    "json_text",
    "load_yaml",
    "open_own",
    "open_regular",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_text",
    "refuse_link",
    "refuse_other_folder",
    "refuse_target",
    "whole_file",
    "whole_folder",
    "write_json",
    "write_rows",
]

MOST_VALUES = 100_000
"""The most values that are read from a YAML file, which people write by hand."""
MOST_LEVELS = 100

MOST_UNPACKED = 2**30
"""The most bytes that one gzipped file may hold."""

_FULL = (
    "No space left",
    "os error 28",
    "Disk quota",
    "os error 122",
    "PytorchStreamWriter failed writing",
    "file write failed",
    "embedded null",
)
"""Some libraries do not raise OSError when a disk is full or a name is impossible. Their messages
contain one of these phrases."""


@contextlib.contextmanager
def exclusive(
    folder: Path, wait: bool = False, part: int | None = None, name: str = ".lock"
) -> Iterator[None]:
    """Lock a folder, so that one process writes into it at a time.

    The lock ends with the process, so a killed process leaves no lock behind. When another process
    holds it, `wait` decides whether to wait or to raise. `part` is a number, and locks only that
    part of the folder.
    """
    lock = folder / name
    with _named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open_own(lock, "r+b")
    with handle:
        how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        try:
            if part is None:
                fcntl.flock(handle, how)
            else:
                fcntl.lockf(handle, how, 1, part)
        except OSError as error:
            if part is not None:
                raise CannotWrite(
                    f"another process is writing part {part} of {folder}: wait for it, or give each"
                    " process its own part (--worker i/n with one n)"
                ) from error
            raise CannotWrite(
                f"another process is writing into {folder}: wait for it, or choose another folder"
            ) from error
        yield


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill. At the end it takes the name `folder`, also from an older one."""
    partial = _partial(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CannotWrite(
            f"{folder} is a link or a file: expected a folder, or a name that is free"
        )
    with _named_errors(folder):
        _remove(partial)
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
    """Yield a path to write to. At the end the file takes the name `path`, also from an older one.

    The path is in a new folder that only this user can enter, so nobody else can have put a link
    there.
    """
    partial = _partial(path)
    refuse_target(path)
    with _named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir(0o700)
        try:
            yield partial / path.name
            (partial / path.name).replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_target(path: Path) -> None:
    """Raise when no file can be written as `path`: it is a link, a folder, a device or a FIFO."""
    with _named_errors(path):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return
    if not stat.S_ISREG(mode):
        raise CannotWrite(
            f"{path} is {_kind(mode)}: expected the name of a file, or a name that is free"
        )


def refuse_other_folder(folder: Path, what: str, *marks: str) -> None:
    """Raise when a folder that is to be replaced holds files, but not all the `marks` of ours."""
    ours = all((folder / mark).is_file() for mark in marks)
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise CannotWrite(
            f"{folder} holds other files than {what}, and writing would replace them: name another"
            " folder, or empty this one yourself"
        )


def refuse_link(path: Path) -> None:
    """Raise when one of our own folders inside an output folder is a link."""
    if path.is_symlink():
        raise CannotWrite(
            f"{path} is a link to {os.readlink(path)}: nothing is written through it. Make a link"
            f" of {path.parent} as a whole, or remove this one"
        )


def open_own(path: Path, mode: str, buffering: int = -1) -> IO[Any]:
    """Open a file that we keep and change in place, with mode `r+b`, `a` or `ab`.

    The file is made if it does not exist. It is never emptied, links are not followed, and only a
    regular file is opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if mode.startswith("a"):
        flags |= os.O_APPEND
    refuse_target(path)
    with _named_errors(path):
        handle = os.open(path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            refuse_target(path)
            raise CannotWrite(f"{path} was exchanged while it was opened: run it again")
        return os.fdopen(handle, mode, buffering, encoding=None if "b" in mode else "utf-8")


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading; links are followed. A FIFO, a socket or a device raises at once."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BadFile(f"{path} is {_kind(mode)}: expected a file")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise IsADirectoryError(f"{path} is {_kind(mode)}: expected a file")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The whole text of a file."""
    with open_regular(path) as file:
        return file.read().decode(encoding).replace("\r\n", "\n")


def load_yaml(path: Path) -> Any:
    """Read the plain values of a YAML file. A damaged one raises ValueError or YAMLError."""
    return parse_yaml(read_text(path))


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text. A damaged one raises ValueError or YAMLError.

    With aliases, a few lines can stand for millions of values, or for a value that holds itself. So
    a text with more than `MOST_VALUES` values, aliases followed, raises ValueError, and so do one
    that is nested deeper than `MOST_LEVELS`, and a mapping that has a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key.value, str)]
            if twice := [value for (tag, value), n in Counter(keys).items() if n > 1]:
                line = node.start_mark.line + 1
                raise ValueError(f"the key {twice[0]!r:.40} is there twice (line {line} or after)")
            return node

    try:
        content = yaml.load(text, Loader)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels") from None
    waiting, found = [(content, 0)], 0
    while waiting:
        value, level = waiting.pop()
        found += 1
        if found + len(waiting) > MOST_VALUES:
            raise ValueError(f"it comes to more than {MOST_VALUES:,} values, aliases followed")
        if isinstance(value, dict):
            waiting += [(inner, level + 1) for inner in (*value, *value.values())]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(inner, level + 1) for inner in value]
        if level > MOST_LEVELS:
            raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
    return content


def gunzip(data: bytes, most: int = MOST_UNPACKED) -> bytes:
    """What gzipped bytes hold. More than `most` bytes raise ValueError: some kilobytes can unpack
    to more than the memory. Damaged data raise EOFError or zlib.error."""
    found = b""
    while data:
        unpacker = zlib.decompressobj(31)
        found += unpacker.decompress(data, most + 1 - len(found))
        if len(found) > most:
            raise ValueError(f"it unpacks to more than {most / 2**30:.3g} GiB")
        if not unpacker.eof:
            raise EOFError("it ends too early")
        data = unpacker.unused_data.lstrip(b"\0")
    return found


def is_url(place: object) -> bool:
    """Whether a place is a URL and not a path: `s3://bucket/store`."""
    return re.match(r"[a-z][a-z0-9+.-]+://", str(place)) is not None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, format: str, version: int, content: Mapping[str, Any]) -> None:
    """Write a JSON file that names its own format and version, so that no other file is mistaken
    for it."""
    text = json_text(format, version, content)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines, one mapping per line."""
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def json_text(format: str, version: int, content: Mapping[str, Any]) -> str:
    """The content of a file as `write_json` writes it."""
    whole = {"format": format, "version": version, **content}
    text = json.dumps(whole, ensure_ascii=False, indent=1, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, such as in the name of a file
        text = json.dumps(whole, indent=1, allow_nan=False)
    return text + "\n"


def read_json(
    path: Path, format: str, version: int | None, made_by: str, older: Sequence[int] = ()
) -> dict[str, Any]:
    """Read what `write_json` wrote; anything else raises `BadFile`.

    `made_by` is the command that makes such a file, for the message. `older` are the versions that
    the caller reads, too; with `version=None` the version does not matter.
    """
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise BadFile(f"{path} does not exist: `{made_by}` makes such a file") from error
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read as JSON ({error}): expected {format}") from error
    return parse_json(text, path, format, version, made_by, older)


def parse_json(
    text: str,
    path: Path | str,
    format: str,
    version: int | None,
    made_by: str,
    older: Sequence[int] = (),
) -> dict[str, Any]:
    """As `read_json`, for a text that was read already. Messages call it `path`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} cannot be read as JSON ({error}): expected {format}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != format:
        raise BadFile(
            f"{path} is not a {format} file (its format is {found!r:.60}): `{made_by}` makes one"
        )
    if version is not None and content.get("version") not in (version, *older):
        raise BadFile(
            f"{path} is {format} version {content.get('version')!r:.60}, this package reads version"
            f" {version}: make it again with `{made_by}`, or use the package that wrote it"
        )
    return {key: value for key, value in content.items() if key not in ("format", "version")}


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _remove(partial: Path) -> None:
    """Remove what stands under our own hidden name: a killed run or somebody else left it there."""
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


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
    except ScopeError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in _FULL):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CannotWrite(
            f"cannot write {target}: {reason or type(error).__name__}. Nothing half is left under"
            " that name, and what was finished before stays: make room or choose another place,"
            " and run it again"
        ) from error
