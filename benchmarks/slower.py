"""What got slower by more than a tenth between two results of one benchmark.

    git show HEAD~50:benchmarks/results/encode-cpu.txt > before.txt
    python benchmarks/slower.py before.txt benchmarks/results/encode-cpu.txt
    python benchmarks/slower.py --since REVISION        # every result that changed since then

Only ratios that were measured in one run are compared, because milliseconds of two machines say
nothing: `x SAELens` and `times as fast` (more is better), `of GEMM` and `1.06x [1.04, 1.08]` (less
is better). A figure is found in both files by its heading and label.
Exits with 1 where something got slower.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
LIMIT = 1.1

NUMBER = r"\d[\d,]*\.?\d*"
TIMED = re.compile(rf"^\s*({NUMBER})x? \[[^\]]*\]\s+(\S.*)$")
FASTER = re.compile(rf"({NUMBER}) times as fast")


class Figure(NamedTuple):
    name: str
    cost: float  # time as a ratio: less is better


def figures(text: str) -> Iterator[Figure]:
    """Every ratio of a result, as a cost."""
    heading, columns = "", list[tuple[int, str]]()
    for line in text.splitlines():
        if found := TIMED.match(line):
            yield Figure(f"{heading}: {found[2]}", _number(found[1]))
        elif faster := FASTER.search(line):
            yield Figure(f"{heading}: times as fast", 1 / _number(faster[1]))
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if columns and re.fullmatch(NUMBER, cells[0]):
                yield from _costs(f"{heading}: {cells[0]}", zip(columns, cells, strict=False))
            elif not set(line) <= set("|-: "):
                columns = [(0, cell) for cell in cells]
        elif not line.strip():
            columns = []
        elif re.search(r"(^|\s{2})(x|of) \w", line) and not re.search(r"\d\.\d", line):
            columns = [(m.end(), m[0]) for m in re.finditer(r"\S+(?: \S+)*", line)]
        elif columns and (label := re.match(r"\S+(?: \S+)*", line)):
            numbers = [m for m in re.finditer(NUMBER, line) if m.start() > label.end()]
            named = [
                ((end, name), m[0]) for end, name in columns for m in numbers if m.end() == end
            ]
            yield from _costs(f"{heading}: {label[0]}", iter(named))
        else:
            heading = re.sub(rf"{NUMBER} (ms|s|MB|tokens/s)\b", r"\1", line).strip()


def _costs(label: str, cells: Iterator[tuple[tuple[int, str], str]]) -> Iterator[Figure]:
    for (_, column), cell in cells:
        if not re.fullmatch(NUMBER, cell) or not _number(cell):
            continue
        if re.search(r"\bx \w|times SAELens", column):
            yield Figure(f"{label}, {column}", 1 / _number(cell))
        elif column.startswith("of "):
            yield Figure(f"{label}, {column}", _number(cell))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def compare(before: str, after: str) -> tuple[list[str], int]:
    """A line per figure that got slower, and how many were compared."""
    old, new = (_numbered(text) for text in (before, after))
    both = [name for name in old if name in new]
    slower = [(new[name] / old[name], name) for name in both if new[name] > LIMIT * old[name]]
    return [f"{ratio:.2f} times the cost: {name}" for ratio, name in sorted(slower)[::-1]], len(
        both
    )


def _numbered(text: str) -> dict[str, float]:
    """Costs by name; a name that comes again gets a number."""
    found: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for name, cost in figures(text):
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} ({seen[name]})"] = cost
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="BEFORE AFTER")
    parser.add_argument("--since", metavar="REVISION", help="compare all results with git's")
    given = parser.parse_args()
    if given.since is None and len(given.files) == 2:
        pairs = {given.files[1].name: tuple(file.read_text("utf-8") for file in given.files)}
    elif given.since is not None and not given.files:
        pairs = {
            file.name: (_at(given.since, file), file.read_text("utf-8"))
            for file in sorted((HERE / "results").glob("*.txt"))
        }
    else:
        parser.error("expected two files, or --since REVISION")
    any_slower = False
    for name, (before, after) in pairs.items():
        lines, compared = compare(before, after)
        if compared and before != after:
            print(f"{name}: {compared} ratios compared, {len(lines)} slower")
        print(*(f"  {line}" for line in lines), sep="\n", end="\n" if lines else "")
        any_slower |= bool(lines)
    return int(any_slower)


def _at(revision: str, file: Path) -> str:
    """The file at a revision; empty where it was not there."""
    name = f"{revision}:benchmarks/results/{file.name}"
    done = subprocess.run(["git", "show", name], cwd=HERE, capture_output=True, text=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
