"""Step 5: the finished artefacts are copied into the package, and their size is checked.

Usage: `python -m tools.mini.release`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from qwen_scope_lens.mini import MINI_HOME, SAES
from tools.mini.corpus import work_folder
from tools.mini.specs import SPECS

__all__ = ["LIMIT", "copy", "size"]

LIMIT = 40_000_000
"""Bytes that all shipped artefacts may have together."""


def _replace(source: Path, target: Path) -> None:
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def size(home: Path = MINI_HOME) -> int:
    """Bytes of all files of the package folder but the code."""
    return sum(
        path.stat().st_size
        for path in home.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    )


def copy(work: Path, home: Path = MINI_HOME) -> int:
    """Copy every model and its SAEs; returns the size of all of it."""
    for name in SPECS:
        _replace(work / "models" / name / "final", home / name)
        _replace(work / "saes" / name / SAES[name], home / SAES[name])
    total = size(home)
    if total > LIMIT:
        raise RuntimeError(f"the shipped minis have {total} bytes: expected at most {LIMIT}")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default=None)
    total = copy(work_folder(parser.parse_args().work))
    print(f"release: {total / 1e6:.1f} MB in {MINI_HOME.name}/")


if __name__ == "__main__":
    main()
