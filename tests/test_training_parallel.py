"""Both trainers on two processes, started as accelerate starts them, on CPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")


def run(what: str, out: Path, processes: int) -> list[dict[str, Any]]:
    """What each process of a run printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        f"--master-port={port}",
    ]
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent)])
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), str(SCRIPT), what, str(out)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{what}-{rank}.json").read_text()) for rank in range(processes)]


def test_sasft_on_two_processes(tmp_path: Path) -> None:
    """Ranks agree, and two batches of two train as one batch of four does."""
    first, second = run("2", tmp_path, 2)
    assert first == second
    (alone,) = run("4", tmp_path, 1)
    assert first["weight"] == pytest.approx(alone["weight"], rel=1e-5)
    assert first["penalty"] == pytest.approx(alone["penalty"], rel=0.2)  # a mean of means


def test_a_group_that_two_processes_share_has_one_steered_rollout(tmp_path: Path) -> None:
    """Two rows each of a group of four: only the second process steers, and the first waits."""
    first, second = run("grpo", tmp_path, 2)
    assert first["steered"] == [False, False]
    assert second["steered"] == [False, True]
