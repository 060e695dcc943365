"""How long every step of `make mini` took, kept beside its results for the model card.

Wall and CPU time are summed over interrupted runs (Ctrl-C included; a killed run counts nothing).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_scope_lens.files import whole_file

__all__ = ["STEPS", "measured", "table"]

STEPS = ("corpus", "tokenizer", "model", "sae", "panel")
"""The first word of every step's name, in order."""


@contextmanager
def measured(work: Path, step: str) -> Iterator[None]:
    """Add what the block takes to the step's record in `work/durations/`."""
    wall, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        path = work / "durations" / f"{step}.json"
        before = json.loads(path.read_text()) if path.is_file() else {"wall": 0.0, "cpu": 0.0}
        path.parent.mkdir(exist_ok=True)
        total = {
            "wall": before["wall"] + time.monotonic() - wall,
            "cpu": before["cpu"] + time.process_time() - cpu,
        }
        with whole_file(path) as partial:
            partial.write_text(json.dumps(total) + "\n")


def table(work: Path) -> Iterator[str]:
    """Markdown lines: minutes of every step that `work` has a record of."""
    found = sorted(
        (work / "durations").glob("*.json"),
        key=lambda path: (STEPS.index(path.stem.split()[0]), path.stem),
    )
    if not found:
        return
    yield "\n## How long each step took\n"
    yield "| step | minutes | CPU minutes |"
    yield "|---|---|---|"
    for path in found:
        spent = json.loads(path.read_text())
        yield f"| {path.stem} | {spent['wall'] / 60:.1f} | {spent['cpu'] / 60:.1f} |"
