"""Processes for tests: forks of the present one, because a fresh one imports torch for seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import auto, std

__all__ = ["Fork", "command", "forget", "forked"]


class Fork:
    """`work` in a fork: what it prints goes into `log`, what it returns is the exit code."""

    def __init__(
        self, work: Callable[[], Any], log: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        def run() -> None:
            os.environ.update(env or {})
            out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
                stream.flush()
                os.dup2(out, number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            # torch makes its threads anew in a fork: before several threads want them, not then.
            torch.set_num_threads(torch.get_num_threads())
            # tqdm shares its lock with forks; one that is killed while it holds it keeps it.
            for kind in (std.tqdm, auto.tqdm):
                kind.set_lock(threading.RLock())
            try:
                code = work()
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0)

        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()
        self.pid = self.process.pid or 0

    def kill(self) -> None:
        """kill -9, at once."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 120) -> int:
        """The exit code; minus the signal's number where one ended the process."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s")
        return self.process.exitcode


def forked(work: Callable[[], Any], after: float | None = None) -> int:
    """Run `work` in a fork and, if asked to, kill -9 it after so many seconds; the exit code."""
    fork = Fork(work)
    if after is not None:
        time.sleep(after)
        fork.kill()
    return fork.wait()


def command(
    words: Sequence[str], log: Path | None = None, env: Mapping[str, str] | None = None
) -> Fork:
    """`qsl WORDS` in a fork."""
    from qwen_scope_lens.cli import main

    return Fork(lambda: main(list(words)), log, env)


def forget(*packages: str) -> None:
    """Forget that these packages were imported, so that the next import runs them again."""
    for name in list(sys.modules):
        if name.split(".")[0] in packages:
            del sys.modules[name]
