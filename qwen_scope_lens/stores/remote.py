"""Stores and corpora at a URL, such as `s3://bucket/store`: reading, sending, copying, with fsspec.

A store there has the same files as on a disk. What is read of it is kept in a cache on this
machine, each file under the SHA-256 that `shard.json` names, so that a changed file is refused and
two stores cannot mix. A shard is sent when it is whole: first its files, then its `shard.json`,
without which it is not a shard. The manifest is the first file of all and is never replaced, so
shards of two different runs cannot come together. `extraction.py` makes and sends the shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

from qwen_scope_lens.errors import (
    BadFile,
    CannotWrite,
    MissingExtra,
    ScopeError,
    StorageUnreachable,
    StoreDamaged,
    StoreMismatch,
)
from qwen_scope_lens.files import (
    exclusive,
    file_sha256,
    is_url,
    parse_json,
    refuse_link,
    whole_file,
    whole_folder,
)
from qwen_scope_lens.stores import manifest as manifests
from qwen_scope_lens.stores.manifest import Manifest
from qwen_scope_lens.stores.shard_files import NAME, SHARD_FORMAT, damage, shard_folder

__all__ = ["Remote", "RemoteShard", "cache_folder", "copy", "fetch_corpus", "open_manifest"]

CACHE_VARIABLE = "QWEN_SCOPE_CACHE"
"""The environment variable that names the folder of the cache. Its files may be removed."""

_SHA = re.compile(r"[0-9a-f]{64}")
_RANGE = 1 << 18  # bytes that are read ahead of a range
_AT_ONCE = 16
READING = "read", ""
WRITING = "written", ". Nothing half counts as written: run it again"
S3 = (
    "Credentials and address of S3 come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE"
    " and AWS_ENDPOINT_URL"
)
_WAIT = {"connect_timeout": 3, "read_timeout": 10, "retries": 1}
"""Seconds and attempts of the first question to s3fs, which by itself asks for minutes."""


def cache_folder() -> Path:
    own = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(base) / "qwen-scope-lens").expanduser()


@dataclass(frozen=True)
class Remote:
    """A folder of a file system that fsspec knows."""

    url: str
    fs: Any
    root: str

    @classmethod
    def of(cls, url: str) -> Remote:
        """The folder at a URL; nothing is read yet. Raises where its file system is not known."""
        import fsspec

        if not url.partition("://")[2].strip("/"):
            raise BadFile(
                f"{url} names no place: expected a bucket and a folder, as in s3://bucket/store"
            )
        url = url.rstrip("/")
        try:
            local = {"auto_mkdir": True} if url.startswith(("file:", "local:")) else {}
            fs, root = fsspec.core.url_to_fs(url, **local)
        except ImportError as error:
            raise MissingExtra(
                f"{url} needs a package that is not installed ({error}): for s3://, pip install"
                " --constraint constraints.txt 'qwen-scope-lens[remote]'"
            ) from error
        except Exception as error:
            raise BadFile(
                f"{url} is not a place that can be used ({_words(error)}): expected a path, or a"
                " URL such as s3://bucket/folder"
            ) from error
        return cls(url, fs, root.rstrip("/"))

    # What is there.

    @cached_property
    def asked(self) -> Any:
        """The file system for the first question: one that soon says that nobody answers."""
        import fsspec

        if not hasattr(self.fs, "config_kwargs"):
            return self.fs
        fs, _ = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
        for name, value in _WAIT.items():
            setattr(fs, name, value)
        if "AWS_MAX_ATTEMPTS" not in os.environ:
            fs.config_kwargs = {"retries": {"total_max_attempts": 2}} | fs.config_kwargs
        return fs

    def manifest(self) -> Manifest | None:
        """The manifest, or None where there is none."""
        place = f"{self.url}/{manifests.NAME}"
        with _named(place):
            try:
                found: bytes = self.asked.cat_file(f"{self.root}/{manifests.NAME}")
            except FileNotFoundError:
                return None
        return Manifest.parse(found.decode("utf-8", "replace"), place)

    def shards(self, numbers: Iterable[int]) -> dict[int, RemoteShard]:
        """Those of these shards whose `shard.json` is there."""
        paths = {f"{self._shard(n)}/{NAME}".lstrip("/"): n for n in numbers}
        with _named(self.url):
            self.fs.invalidate_cache()
            rooted = self.root.startswith("/")
            wanted = [f"/{path}" if rooted else path for path in paths]
            found = self.fs.cat(wanted, on_error="return") if wanted else {}
            for error in found.values():
                if isinstance(error, Exception) and not isinstance(error, FileNotFoundError):
                    raise error
        return {
            paths[path.lstrip("/")]: RemoteShard(self, paths[path.lstrip("/")], content.decode())
            for path, content in sorted(found.items())
            if isinstance(content, bytes)
        }

    def whole(self, numbers: Iterable[int]) -> set[int]:
        """Which of these shards are there with all their files, in the sizes that were written."""
        whole = set()
        for number, shard in self.shards(numbers).items():
            with _named(self.url):
                there = self.fs.find(self._shard(number), detail=True)
            sizes = {
                path.removeprefix(self._shard(number) + "/"): f["size"] for path, f in there.items()
            }
            try:
                files = shard.facts()["files"].items()
                if all(sizes.get(name) == facts["size"] for name, facts in files):
                    whole.add(number)
            except (BadFile, KeyError, TypeError, AttributeError):
                continue
        return whole

    # Writing.

    def refuse_memory(self) -> None:
        """Raise where what a command writes is lost when it ends."""
        if self.url.startswith("memory:"):
            raise CannotWrite(
                f"{self.url} is in the memory of this process and is lost when it ends: expected a"
                " folder, or a URL such as s3://bucket/store"
            )

    def refuse_unreachable(self) -> None:
        """Raise where the bucket is not there or may not be read, before any work is done."""
        self.manifest()  # a place that does not answer raises here; `exists` would say no
        bucket = self.root.split("/")[0]
        with _named(self.url):
            there = not bucket or self.asked.exists(bucket)
        if not there:
            raise StorageUnreachable(
                f"{self.url}: there is no bucket {bucket} that these credentials can see. Make it,"
                " or correct the name"
            )

    def begin(self, manifest: Manifest) -> None:
        """Put the manifest there if there is none; raise where there is another one."""
        there = self.manifest()
        if there is None:
            with _named(self.url):
                self.fs.invalidate_cache()
                others = self.fs.ls(self.root, detail=False) if self.fs.exists(self.root) else []
            if others:
                raise StoreMismatch(
                    f"{self.url} holds other files than a feature store: choose an empty place"
                )
            with _named(self.url, WRITING), contextlib.suppress(FileExistsError):
                path = f"{self.root}/{manifests.NAME}"
                self.fs.pipe_file(path, manifest.text().encode(), mode="create")
            there = self.manifest()
        if there != manifest:
            if there is not None:
                manifest.require_same(there, "this run", self.url)
            raise StoreMismatch(
                f"{self.url} holds a store of other documents: choose another place"
            )

    def send(self, folder: Path, number: int) -> None:
        """Copy one whole shard of the local store `folder`; its `shard.json` goes last."""
        source, target = shard_folder(folder, number), self._shard(number)
        text = (source / NAME).read_text(encoding="utf-8")
        names = [_inside(name) for name in RemoteShard(self, number, text).facts()["files"]]
        with _named(self.url, WRITING):
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{target}/{NAME}")  # of a damaged shard that is made again
            self.fs.put([str(source / n) for n in names], [f"{target}/{n}" for n in names])
            self.fs.pipe_file(f"{target}/{NAME}", text.encode())

    @contextlib.contextmanager
    def staging(self, worker: str) -> Iterator[Path]:
        """A local folder in which shards are made, locked, with the manifest that is there.

        What an earlier run left in it stays if it belongs to the store at the URL.
        """
        key = hashlib.sha256(f"{self.url} {worker}".encode()).hexdigest()[:24]
        folder = cache_folder() / "sending" / key
        with exclusive(folder, name=".sending.lock"):
            there = self.manifest()
            if Manifest.exists(folder) and Manifest.read(folder) != there:
                shutil.rmtree(folder / "shards", ignore_errors=True)
                (folder / manifests.NAME).unlink()
            if there is not None:
                there.write(folder)
            yield folder

    def _shard(self, number: int) -> str:
        return f"{self.root}/shards/{number:05d}"


@dataclass(frozen=True)
class RemoteShard:
    """One finished shard at a URL: its facts, and its files one by one."""

    remote: Remote
    number: int
    text: str  # of its shard.json

    @property
    def url(self) -> str:
        return f"{self.remote.url}/shards/{self.number:05d}"

    def facts(self) -> dict[str, Any]:
        return parse_json(self.text, f"{self.url}/{NAME}", *SHARD_FORMAT, "qsl extract")

    def cached(self, name: str) -> Path:
        """Where a file of the shard is on this machine, once it was fetched."""
        expected = self.facts()["files"].get(name)
        sha = expected.get("sha256") if isinstance(expected, dict) else None
        if not isinstance(sha, str) or not _SHA.fullmatch(sha):
            raise StoreDamaged(f"{self.url}/{NAME} names no checksum of {name}")
        return cache_folder() / "files" / sha[:2] / f"{sha}{PurePosixPath(name).suffix}"

    def fetch(self, name: str) -> Path:
        """A file of the shard, copied to this machine and compared with its checksum."""
        place = self.cached(name)
        if not place.is_file():
            with whole_file(place) as partial:
                with _named(f"{self.url}/{name}"):
                    self.remote.fs.get_file(
                        f"{self.remote._shard(self.number)}/{name}", str(partial)
                    )
                if file_sha256(partial) != place.stem:
                    raise StoreDamaged(
                        f"{self.url}/{name} is not what was written: its checksum differs. The same"
                        " `qsl extract` or `qsl store copy` sends a shard again if a file is"
                        " missing or has another size; else remove that shard's shard.json first"
                    )
        return place

    def fetch_all(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self.fetch, names))

    def open(self, name: str) -> IO[bytes]:
        """A file of the shard to read ranges from: the copy on this machine, or the one there."""
        place = self.cached(name)
        if place.is_file():
            return place.open("rb")
        with _named(f"{self.url}/{name}"):
            found: IO[bytes] = self.remote.fs.open(self._path(name), "rb", block_size=_RANGE)
            return found

    def _path(self, name: str) -> str:
        return f"{self.remote._shard(self.number)}/{name}"


def open_manifest(place: str | os.PathLike[str]) -> Manifest:
    """The manifest of a feature store in a folder or at a URL; raises where there is none."""
    if not is_url(place):
        return Manifest.open(Path(place).expanduser())
    if (found := Remote.of(str(place)).manifest()) is None:
        raise BadFile(f"{place} is not a feature store: it has no {manifests.NAME}")
    return found


def copy(
    source: str | os.PathLike[str], target: str | os.PathLike[str], progress: bool = True
) -> None:
    """Copy the finished shards of a store to a URL, or from a URL to a folder.

    The call can be stopped and repeated; what is there and whole is not copied again.
    """
    from tqdm.auto import tqdm

    if is_url(source) == is_url(target):
        raise BadFile(
            f"{source} to {target}: one of them must be a URL and the other a folder (two folders"
            " can be copied with `cp -r`, and two URLs by way of a folder)"
        )
    up = is_url(target)
    remote = Remote.of(str(target if up else source))
    folder = Path(source if up else target).expanduser()
    manifest = open_manifest(source)
    numbers = range(manifest.n_shards)
    if up:
        remote.refuse_unreachable()
        remote.begin(manifest)
        mine = [n for n in numbers if shard_folder(folder, n).is_dir()]
        wrong = [problem for n in mine if (problem := damage(shard_folder(folder, n)))]
        if wrong:
            raise StoreDamaged(f"{wrong[0]} ({len(wrong)} shards): repair it, then copy")
        whole = remote.whole(mine)
        for number in tqdm(mine, unit="shard", disable=not progress, file=sys.stderr):
            if number not in whole:
                remote.send(folder, number)
        return
    if Manifest.exists(folder):
        if Manifest.read(folder) != manifest:
            raise StoreMismatch(f"{folder} holds another store: choose an empty folder")
    elif folder.is_dir() and {path.name for path in folder.iterdir()} - {"shards", ".lock"}:
        raise StoreMismatch(f"{folder} holds other files than a store: choose an empty folder")
    with exclusive(folder):
        refuse_link(folder / "shards")
        manifest.write(folder)
        for number, shard in tqdm(
            remote.shards(numbers).items(), unit="shard", disable=not progress, file=sys.stderr
        ):
            place = shard_folder(folder, number)
            if place.is_dir() and damage(place) is None:
                continue
            with whole_folder(place) as partial:
                for name in map(_inside, shard.facts()["files"]):
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(shard.fetch(name), partial / name)
                (partial / NAME).write_text(shard.text, encoding="utf-8")


def fetch_corpus(url: str) -> Path:
    """A file of a corpus, copied to this machine. It is fetched again when it has changed."""
    remote = Remote.of(url)
    with _named(url):
        try:
            key = str(remote.asked.ukey(remote.root))
        except FileNotFoundError:
            raise BadFile(f"{url} does not exist") from None
        name = PurePosixPath(remote.root).name
        stem = hashlib.sha256(f"{url} {key}".encode()).hexdigest()[:24]
        place = cache_folder() / "corpora" / stem / name
        if not place.is_file():
            with whole_file(place) as partial:
                remote.fs.get_file(remote.root, str(partial))
    return place


def _inside(name: str) -> str:
    """The name of a file in a shard; one that leads out of it raises."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.name == NAME or "\\" in name:
        raise StoreDamaged(f"{NAME} names the file {name!r:.80}, which is not inside its shard")
    return name


@contextlib.contextmanager
def _named(url: str, what: tuple[str, str] = READING) -> Iterator[None]:
    """Raise whatever a file system raises as `StorageUnreachable`, with what can be done."""
    try:
        yield
    except ScopeError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and "/shards/" in url:
            raise StoreDamaged(f"{url} is missing: what sent it sends it again") from error
        way_out = S3 if url.startswith("s3") else "Check the address"
        raise StorageUnreachable(
            f"{url} cannot be {what[0]}: {_words(error)}. {way_out}{what[1]}"
        ) from error


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
