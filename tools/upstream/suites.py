"""Run the suites of SAELens and TransformerLens that apply, on our bridge: `make upstream`.

Their test files are fetched by the installed version from the package index, into `build/upstream`,
and never become part of this repository. Exits with 1 on a failure that is not a known difference,
and with 2 where nothing could be fetched.

    python -m tools.upstream.suites                         # everything
    python -m tools.upstream.suites --only benchmarks       # what ships inside transformer-lens
    python -m tools.upstream.suites --tests sae-lens=FOLDER  # a checkout's, whose sdist has none
    python -m tools.upstream.suites --out benchmarks/results/upstream.txt  # all of it, kept
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from tools.upstream.tables import SUITES, Suite

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "upstream"
MOST_BYTES = 64 * 2**20  # of one suite's test files, unpacked


class CannotFetch(Exception):
    """The source distribution of the installed version cannot be had."""


def fetch(suite: Suite) -> Path:
    """The source distribution of the installed version, by way of pip."""
    folder = BUILD / f"{suite.package}-{version(suite.package)}"
    if not list(folder.glob("*.tar.gz")):
        wanted = f"{suite.package}=={version(suite.package)}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", suite.package, "--dest", str(folder), wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise CannotFetch(f"{wanted} has no source distribution that can be had: {last}")
    return next(folder.glob("*.tar.gz"))


def unpack(archive: Path) -> Path | None:
    """Its `tests/` as plain files, nothing else of it; None where it ships none."""
    target = archive.parent / "files"
    size = 0
    with tarfile.open(archive) as source:
        members = list(wanted_members(source))
        for member, inside in members:
            size += member.size
            if size > MOST_BYTES:
                raise CannotFetch(f"{archive.name}: its tests are larger than {MOST_BYTES} bytes")
            content = source.extractfile(member)
            assert content is not None
            path = target.joinpath(*inside.parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    return target if members else None


def wanted_members(source: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, PurePosixPath]]:
    """Plain files under `<name>-<version>/tests/`: no links, no devices, no way out."""
    for member in source:
        parts = PurePosixPath(member.name).parts
        if (
            not member.isfile()
            or member.name.startswith("/")
            or ".." in parts
            or "\\" in member.name
        ):
            continue
        if len(parts) > 2 and parts[1] == "tests":
            yield member, PurePosixPath(*parts[1:])


def run_tests(suite: Suite, root: Path) -> dict[str, list[str]]:
    """Their test modules in a pytest of their own: node id -> [outcome, reason]."""
    modules = [name for name in suite.modules if (root / name).is_file()]
    gone = [name for name in suite.modules if name not in modules]
    results = BUILD / f"{suite.package}.json"
    results.unlink(missing_ok=True)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "UPSTREAM_RESULTS": str(results),
        "UPSTREAM_LEFT_OUT": json.dumps(suite.left_out),
    }
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(root)]
    command += ["-p", "no:cacheprovider", "-p", "tools.upstream.plugin", "-q", "--tb=short"]
    command += ["--continue-on-collection-errors", *modules]
    log = BUILD / f"{suite.package}.log"
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            command, cwd=root, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    if done.returncode not in (0, 1, 2) or not results.is_file():
        raise CannotFetch(f"pytest ended early, with {done.returncode}: see {log}")
    found: dict[str, list[str]] = json.loads(results.read_text(encoding="utf-8"))
    return found | {name: ["failed", "this version ships no such module"] for name in gone}


def judge(title: str, found: dict[str, list[str]], known: dict[str, str]) -> int:
    """Print passed, failed and left out, by reason; returns how many failures are not known."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    unknown = []
    for test, (outcome, why) in sorted(found.items()):
        difference = next((text for part, text in known.items() if part in test), None)
        if outcome == "failed" and difference is not None:
            outcome, why = "known difference", difference
        elif outcome == "failed":
            unknown.append(f"  FAILED {test}: {why}")
        elif outcome == "skipped":
            outcome = "left out"
        counts[outcome] += 1
        if outcome in ("left out", "known difference"):
            reasons[f"{outcome}: {why}"] += 1
    print(f"{title}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    for reason, n in sorted(reasons.items()):
        print(f"  {n:4d} {reason}")
    print("\n".join(unknown) if unknown else "  no failure that is not a known difference")
    idle = [part for part in known if not any(part in test for test in found)]
    for part in idle:
        print(f"  note: no test is named {part!r} any more")
    return len(unknown)


def conditions() -> str:
    """The commit, date, machine and versions for which the figures hold."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    cpus = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.*)", cpus.read_text()) if cpus.exists() else None
    machine = named[1] if named else platform.processor() or platform.machine()
    packages = ("qwen-scope-lens", *SUITES, "transformers", "torch", "pytest")
    listed = ", ".join(f"{name} {version(name)}" for name in packages)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return (
        f"commit {commit or 'unknown'}, {today}, Python {platform.python_version()},"
        f" {machine}\n{listed}\n"
    )


class Both(io.TextIOBase):
    """A stream that goes to the terminal, and whose text is kept."""

    def __init__(self, shown: TextIO) -> None:
        self.shown = shown
        self.kept: list[str] = []

    def write(self, text: str) -> int:
        self.kept.append(text)
        self.shown.flush()
        return self.shown.write(text)


def run_benchmarks() -> dict[str, list[str]]:
    """TransformerLens's benchmarks of a bridge, on both toy models and both adapters."""
    from tools.upstream import benchmarks

    return benchmarks.run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["benchmarks", *SUITES], default=None)
    parser.add_argument("--tests", action="append", default=[], metavar="PACKAGE=FOLDER")
    parser.add_argument("--out", type=Path, help="also write what is printed into this file")
    options = parser.parse_args()
    given: dict[str, Any] = dict(text.split("=", 1) for text in options.tests)
    if options.out is None:
        return run(options.only, given)
    both = Both(sys.stdout)
    with contextlib.redirect_stdout(both):
        print(conditions())
        code = run(options.only, given)
    options.out.write_text("".join(both.kept), encoding="utf-8")
    return code


def run(only: str | None, given: dict[str, Any]) -> int:
    """Run all suites, or only one. `given` has folders with tests, by the name of the package."""
    BUILD.mkdir(parents=True, exist_ok=True)
    failures = missing = 0
    for name, suite in SUITES.items():
        if only not in (None, name):
            continue
        try:
            root = Path(given[name]).resolve() if name in given else unpack(fetch(suite))
            if root is None:
                print(f"{name} {version(name)}: its source distribution ships no tests. What they")
                print(f"  check of a plugin is in {suite.own_tests}; a checkout's run with --tests")
                continue
            found = run_tests(suite, root)
        except CannotFetch as error:
            print(f"{name} {version(name)}: not run. {error}")
            missing += 1
            continue
        failures += judge(f"{name} {version(name)}, its tests", found, suite.known)
    if only in (None, "benchmarks"):
        from tools.upstream.tables import KNOWN_BENCHMARKS

        title = f"transformer-lens {version('transformer-lens')}, its benchmarks"
        failures += judge(title, run_benchmarks(), KNOWN_BENCHMARKS)
    return 1 if failures else 2 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
