"""Both trainers on two processes, with the variables that accelerate's launcher sets, on CPUs."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import two_processes
from accelerate.state import AcceleratorState, GradientState, PartialState
from forks import Fork

pytestmark = pytest.mark.slow


def run(what: str, out: Path, processes: int) -> list[dict[str, Any]]:
    """What each process of a run found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()  # of trainers that earlier tests ran in this process
        (out / f"{what}-{rank}.json").write_text(json.dumps(two_processes.found(what, out)))

    def launched(rank: int) -> dict[str, str]:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        one = {name: str(value) for name, value in names.items()}
        return {**one, "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}

    ranks = range(processes)
    logs = [out / f"{what}-{rank}.log" for rank in ranks]
    forks = [
        Fork(lambda rank=rank: work(rank), logs[rank], launched(rank) if processes > 1 else {})  # type: ignore[misc]
        for rank in ranks
    ]
    for fork, log in zip(forks, logs, strict=True):
        assert fork.wait() == 0, log.read_text()[-3000:]
    return [json.loads((out / f"{what}-{rank}.json").read_text()) for rank in ranks]


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
