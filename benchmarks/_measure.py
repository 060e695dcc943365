"""Timing and memory for the benchmarks: ratios that survive a busy machine."""

from __future__ import annotations

import ctypes
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = [
    "Printed",
    "commit",
    "cpu_name",
    "interleaved",
    "peak_extra",
    "peak_in_fresh_process",
    "shares",
    "today",
]


class Printed:
    """Lines that are shown as they come and kept for a file of results."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.lines) + "\n", "utf-8")


def interleaved(
    cases: dict[str, Callable[[], object]],
    repeats: int = 5,
    at_least: float = 0.005,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median seconds of each case, measured in turns after one warm-up turn.

    By default CPU time of the process, so that neighbours cost little (`time.perf_counter` where
    the disk counts); a case quicker than `at_least` seconds is looped.
    """
    loops = {}
    for name, case in cases.items():
        case()
        start = clock()
        case()
        took = clock() - start
        loops[name] = max(1, int(at_least / max(took, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            start = clock()
            for _ in range(loops[name]):
                case()
            found[name].append((clock() - start) / loops[name])
    return {name: statistics.median(times) for name, times in found.items()}


def peak_extra(case: Callable[[], object]) -> int:
    """Bytes of resident memory that `case` needs at its peak beyond what is held now (Linux)."""
    # Memory that is freed but not given back would be used again and not be counted.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    case()
    return max(0, _status("VmHWM") - before)


def peak_in_fresh_process(script: str, *arguments: str) -> int:
    """`peak_extra` as printed by `python script --peak arguments`, where no allocator is warm."""
    command = [sys.executable, "-W", "ignore", script, "--peak", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def shares(case: Callable[[], object], steps: Iterable[tuple[Any, str, str]]) -> str:
    """The share of each step in the CPU time of a case: `(module, its function, what it does)`."""
    case()
    took: dict[str, float] = {}

    def timed(step: Callable[..., Any], said: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            found = step(*arguments, **options)
            took[said] = took.get(said, 0.0) + time.process_time() - start
            return found

        return run

    with ExitStack() as patches:
        for module, name, said in steps:
            step = timed(getattr(module, name), said)
            patches.enter_context(mock.patch.object(module, name, step))
        start = time.process_time()
        case()
        whole = time.process_time() - start
    return ", ".join(f"{said} {seconds / whole:.0%}" for said, seconds in took.items())


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.*)", text)
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in text]
    return f"{model.group(1) if model else 'unknown CPU'} ({', '.join(flags)})"


def commit() -> str:
    """The commit of this checkout, in short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def today() -> str:
    return time.strftime("%Y-%m-%d")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024
