"""Processes of `llama-server`, one per plan.

Each listens on this machine only, behind a key that nobody else has, and ends when we end, be it by
kill -9. What it prints goes to a file in a folder that is gone with us.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen_scope_lens.errors import EngineFailed
from qwen_scope_lens.steering.plan import Plan

__all__ = ["Address", "Program", "Programs"]

log = logging.getLogger(__name__)

GUARDED = """
exec 3<&0
"$@" </dev/null 3<&- &
program=$!
(cat <&3 >/dev/null; kill $program) &
wait $program
status=$?
kill $! 2>/dev/null
exit $status
"""
"""Ends the program when the pipe on our side is closed, as it is when we are gone."""

TAIL = 2000
"""Characters of a program's last words that go to our log."""


@dataclass(frozen=True)
class Address:
    """Where a server listens, and what it wants to be told."""

    url: str
    key: str | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """A process."""

    address: Address
    process: subprocess.Popen[bytes]
    output: Path

    def check(self) -> None:
        """Raise where it has ended."""
        if self.process.poll() is not None:
            said = self.output.read_text("utf-8", "replace")[-TAIL:]
            log.error("llama-server ended with %s:\n%s", self.process.returncode, said)
            raise EngineFailed(
                f"llama-server ended by itself (status {self.process.returncode}); the log of the"
                " server has its last words"
            )

    def let_go(self) -> None:
        """Close our side of its pipe, upon which it ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> None:
        self.let_go()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Programs:
    """At most `most` processes; the one used longest ago makes room for another plan."""

    def __init__(
        self, program: Path, gguf: Path, arguments: Sequence[str] = (), most: int = 3
    ) -> None:
        self._program, self._gguf, self._arguments = program, gguf, tuple(arguments)
        self.most = most
        self._folder = tempfile.TemporaryDirectory(prefix="qsl-llama-")
        self._running: OrderedDict[str, Program] = OrderedDict()
        self._in_use: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._started = 0

    def running(self, plan: Plan | None) -> Program | None:
        """The process of a plan. One that has ended is forgotten."""
        key = _key(plan)
        with self._lock:
            found = self._running.get(key)
            if found is not None and found.process.poll() is not None:
                try:
                    found.check()
                except EngineFailed:
                    del self._running[key]
                return None
            if found is not None:
                self._running.move_to_end(key)
            return found

    @property
    def urls(self) -> set[str]:
        return {program.address.url for program in self._running.values()}

    def room(self) -> bool:
        """Whether another process can be started, if need be in the place of an idle one."""
        with self._lock:
            idle = [key for key in self._running if not self._in_use[key]]
            return len(self._running) < self.most or bool(idle)

    def start(self, plan: Plan | None, vector: Callable[[Plan, Path], Path]) -> Program:
        """Start the process of a plan; it loads the model yet. One at a time is started."""
        with self._lock:
            idle = [key for key in self._running if not self._in_use[key]]
            spare = max(0, len(self._running) + 1 - self.most)
            gone = [self._running.pop(key) for key in idle[:spare]]
        for program in gone:
            program.end()
        self._started += 1
        place = Path(self._folder.name, f"{self._started}")
        steered: list[str] = []
        if plan is not None:
            steered = ["--control-vector", str(vector(plan, place.with_suffix(".gguf")))]
        key, port = secrets.token_urlsafe(24), _free_port()
        command = [str(self._program), "--model", str(self._gguf), "--host", "127.0.0.1"]
        command += ["--port", str(port), *steered, *self._arguments]
        output = place.with_suffix(".log")
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["/bin/sh", "-c", GUARDED, "qsl-llama", *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LLAMA_API_KEY": key},
                start_new_session=True,  # Ctrl-C is ours: it ends when we are done
            )
        found = Program(Address(f"http://127.0.0.1:{port}", key), process, output)
        with self._lock:
            self._running[_key(plan)] = found
        return found

    @contextmanager
    def busy(self, plan: Plan | None) -> Iterator[None]:
        """While a reply is written, its process stays."""
        key = _key(plan)
        self._in_use[key] += 1
        try:
            yield
        finally:
            self._in_use[key] -= 1

    def close(self) -> None:
        with self._lock:
            for program in self._running.values():  # all of them at once
                program.let_go()
            for program in self._running.values():
                program.end()
            self._running.clear()
        self._folder.cleanup()


def _key(plan: Plan | None) -> str:
    return "" if plan is None else json.dumps(plan.to_dict(), sort_keys=True)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
