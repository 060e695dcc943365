"""What got slower by more than a tenth between two results of one benchmark.

    git show HEAD~50:benchmarks/results/encode-cpu.txt > before.txt
    python benchmarks/slower.py before.txt benchmarks/results/encode-cpu.txt
    python benchmarks/slower.py --since REVISION        # every result that changed since then

Only ratios that were measured in one run are compared, because milliseconds of two machines say
nothing: `x SAELens` and `times as fast` (more is better), `of GEMM` and `1.06x [1.04, 1.08]` (less
is better). A figure is found in both files by its heading and label: one that was named anew has no
partner. What could not be compared is counted and named. Exits with 1 where something got slower.
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
FASTER = re.compile(rf"(?:(\S.*): )?.*?({NUMBER})(?: times as fast|x as fast|x \([\d,.]+ against )")
ROW_FASTER = re.compile(rf"\s+(\S.*?)\s{{2,}}.*us/token\s+({NUMBER})x")


class Figure(NamedTuple):
    name: str
    cost: float  # time as a ratio: less is better


def figures(text: str) -> Iterator[Figure]:
    """Every ratio of a result, as a cost."""
    heading, columns = "", list[tuple[int, str]]()
    for line in text.splitlines():
        if found := TIMED.match(line):
            yield Figure(f"{heading}: {found[2]}", _number(found[1]))
        elif faster := FASTER.match(line):
            yield Figure(f"{faster[1] or heading}: times as fast", 1 / _number(faster[2]))
        elif row := ROW_FASTER.match(line):
            yield Figure(f"{heading}: {row[1]}, times as fast", 1 / _number(row[2]))
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
            heading = re.sub(rf"{NUMBER} (ms|s|MB|tokens/s|us/token)\b", r"\1", line).strip()


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


class Compared(NamedTuple):
    """What two results of one benchmark have in common."""

    slower: list[str]  # a line per figure that got slower, the worst first
    ratios: int  # those with the same name in both
    alone: int  # those that only one of the two has


def compare(before: str, after: str) -> Compared:
    old, new = (_numbered(text) for text in (before, after))
    both = [name for name in old if name in new]
    slower = [(new[name] / old[name], name) for name in both if new[name] > LIMIT * old[name]]
    return Compared(
        [f"{ratio:.2f} times the cost: {name}" for ratio, name in sorted(slower)[::-1]],
        len(both),
        len(old.keys() ^ new.keys()),
    )


def report(pairs: dict[str, tuple[str | None, str | None]]) -> tuple[list[str], bool]:
    """The lines to print of results by name, before and after (None: not there), and whether a
    ratio got slower."""
    lines, apart, slower = list[str](), dict[str, list[str]](), 0
    files = ratios = same = 0
    for name, (before, after) in pairs.items():
        if before is None or after is None:
            apart.setdefault("only before" if after is None else "only after", []).append(name)
            continue
        found = compare(before, after)
        if not found.ratios:
            why = "the ratios have other names" if found.alone else "without a ratio of one run"
            apart.setdefault(why, []).append(name)
        elif before == after:
            apart.setdefault("not measured again", []).append(name)
            same += found.ratios
        else:
            number = len(found.slower)
            alone = f", {found.alone} without a partner" if found.alone else ""
            lines.append(f"{name}: {found.ratios} ratios compared{alone}, {number} slower")
            lines += [f"  {line}" for line in found.slower]
            files, ratios, slower = files + 1, ratios + found.ratios, slower + number
    verdict = f"{slower or 'none'} slower by more than {LIMIT - 1:.0%}"
    if not ratios:
        verdict = "which says nothing about speed"
    lines.append(
        f"{len(pairs)} result files: {ratios} ratios of {files} files compared, {verdict};"
        f" {same} ratios are of the same measurement"
    )
    lines += [f"  {why} ({len(names)}): {', '.join(names)}" for why, names in apart.items()]
    return lines, slower > 0


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
    pairs: dict[str, tuple[str | None, str | None]]
    if given.since is None and len(given.files) == 2:
        pairs = {given.files[1].name: _both(given.files)}
    elif given.since is not None and not given.files:
        now = {file.name: file.read_text("utf-8") for file in (HERE / "results").glob("*.txt")}
        before = _at(given.since)
        pairs = {name: (before.get(name), now.get(name)) for name in sorted(before | now)}
    else:
        parser.error("expected two files, or --since REVISION")
    lines, slower = report(pairs)
    print(*lines, sep="\n")
    return int(slower)


def _both(files: list[Path]) -> tuple[str, str]:
    before, after = (file.read_text("utf-8") for file in files)
    return before, after


def _at(revision: str) -> dict[str, str]:
    """The results at a revision, by name."""
    folder = f"{revision}:benchmarks/results"
    names = _git("ls-tree", "--full-tree", "--name-only", folder).splitlines()
    return {name: _git("show", f"{folder}/{name}") for name in names if name.endswith(".txt")}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
