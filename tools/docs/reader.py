"""A reader who copies one block after the other, and the place where that happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.docs.pages import SERVER, Block
from tools.docs.served import serve
from tools.docs.warm import install

__all__ = ["Outcome", "Place", "Reader", "warm"]

ROOT = Path(__file__).parents[2]
LONGEST = 900  # seconds, of one block
CLOSED_PIPE = 141  # `| head` closed the pipe


@dataclass(frozen=True)
class Outcome:
    """What became of one block: it `ran`, it is `marked` as not for here, or it `failed`."""

    block: Block
    seconds: float = 0.0
    output: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Place:
    """Where pages are followed: an interpreter with the package, and what a process sees."""

    session: Sequence[str | Path]
    environment: Mapping[str, str]

    @classmethod
    def of(cls, python: Path, home: Path) -> Place:
        """Nothing of this machine's user: no home, no caches, no hub, no settings of ours."""
        home.mkdir(parents=True, exist_ok=True)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        kept = {
            name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR") if name in os.environ
        }
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        session = [python, Path(__file__).with_name("session.py")]
        return cls(session, {**kept, **own, "PATH": path, "HOME": str(home)})


@contextmanager
def warm(place: Place, python: Path, folder: Path) -> Iterator[Place]:
    """The same place, where processes are forked from one that has imported what is heavy."""
    session = install(folder, python)
    path = f"{folder}{os.pathsep}{place.environment['PATH']}"
    command = [str(python), "-m", "tools.docs.warm", str(folder / "socket")]
    with subprocess.Popen(command, cwd=ROOT, env=dict(place.environment)) as server:
        try:
            while not (folder / "socket").exists() and server.poll() is None:
                time.sleep(0.2)
            yield Place(session, {**place.environment, "PATH": path})
        finally:
            server.terminate()


class Reader:
    """Somebody who copies one block after the other, in one folder."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place, self.folder = place, folder
        self.session: subprocess.Popen[str] | None = None

    def __enter__(self) -> Reader:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.session is not None:
            self.session.communicate()
            self.errors.close()

    def copy(self, block: Block) -> Outcome:
        """Run what of a block can run here."""
        if not block.runs:
            return Outcome(block)
        started = time.perf_counter()
        output, failure = (self._python if block.language == "python" else self._shell)(block)
        lines = (line.rstrip() for line in output.strip().splitlines())
        return Outcome(block, time.perf_counter() - started, "\n".join(lines), failure)

    def _start(self, command: Sequence[str | Path], **streams: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=dict(self.place.environment),
            text=True,
            start_new_session=True,
            **streams,
        )

    def _python(self, block: Block) -> tuple[str, str]:
        if self.session is None:
            self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self.session = self._start(
                self.place.session,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
            )
        assert self.session.stdin is not None
        assert self.session.stdout is not None
        with _ended_if_late(self.session):
            self.session.stdin.write(json.dumps({"text": block.runs, "where": block.where}) + "\n")
            self.session.stdin.flush()
            line = self.session.stdout.readline()
        if not line:
            self.errors.seek(0)
            return "", f"the process ended or was late: {self.errors.read()[-2000:]}"
        said = json.loads(line)
        return said["output"], said["failure"]

    def _shell(self, block: Block) -> tuple[str, str]:
        output = ""
        for script in _parts(block.runs):
            if SERVER in script:
                if failure := serve(script, self.folder, self.place.environment):
                    return output, failure
                continue
            with (
                self._start(
                    ["bash", "-e", "-o", "pipefail", "-c", script],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                ) as process,
                _ended_if_late(process),
            ):
                said, errors = process.communicate()
            output += said
            if process.returncode not in (0, CLOSED_PIPE):
                return output, f"ended with {process.returncode}:\n{said}{errors}"
        return output, ""


@contextmanager
def _ended_if_late(process: subprocess.Popen[str]) -> Iterator[None]:
    """A process that takes too long is ended with its children, and so it is when we are."""

    def end() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(LONGEST, end)
    timer.start()
    try:
        yield
    except BaseException:
        end()
        raise
    finally:
        timer.cancel()


def _parts(script: str) -> list[str]:
    """The script, cut before and after each command that serves until somebody stops it."""
    parts = [""]
    for line in script.splitlines(keepends=True):
        parts += [line, ""] if SERVER in line else [parts.pop() + line]
    return [part for part in parts if part.strip()]
