"""Follow the README, every page in `docs/` and every help text, as a reader would: `make follow`.

Each page gets an empty folder. Its Python blocks run as one script in a fresh process, its shell
blocks under bash with `qsl` on the PATH, in the order of the page, offline, without any name or
file that the page does not make. (The help texts share one folder, in the order of `qsl --help`.)
What needs a hub, a GPU or a large model says so in the page, is not run, and is counted.

    python -m tools.docs.follow                     # this checkout
    python -m tools.docs.follow --clone             # a clone of its last commit, newly installed
    python -m tools.docs.follow rank.md "qsl rank"  # some pages
    python -m tools.docs.follow --write             # and print the outputs in the pages again

Exits with 1 where something failed. A page ends at its first failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_scope_lens.files import whole_file
from qwen_scope_lens.tables import Table
from tools.docs.pages import SERVER, Block, Page, help_pages, read_pages
from tools.docs.served import serve

ROOT = Path(__file__).parents[2]
LONGEST = 900  # seconds, of one block
CLOSED_PIPE = 141  # `| head` closed the pipe


@dataclass(frozen=True)
class Outcome:
    """What became of one block: it `ran`, it is `marked` as not for here, or it `failed`."""

    block: Block
    seconds: float = 0.0
    output: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Place:
    """Where pages are followed: an interpreter with the package, and what a process sees."""

    python: Path
    environment: Mapping[str, str]

    @classmethod
    def of(cls, python: Path, home: Path) -> Place:
        """Nothing of this machine's user: no home, no caches, no hub, no settings of ours."""
        home.mkdir(parents=True, exist_ok=True)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        kept = {
            name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR") if name in os.environ
        }
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        return cls(python, {**kept, **own, "PATH": path, "HOME": str(home)})


class Reader:
    """Somebody who copies one block after the other, in one folder."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place, self.folder = place, folder
        self.session: subprocess.Popen[str] | None = None

    def __enter__(self) -> Reader:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.session is not None:
            self.session.communicate(timeout=60)

    def copy(self, block: Block) -> Outcome:
        """Run what of a block can run here."""
        if not block.runs:
            return Outcome(block)
        started = time.perf_counter()
        output, failure = (self._python if block.language == "python" else self._shell)(block)
        lines = (line.rstrip() for line in output.strip().splitlines())
        return Outcome(block, time.perf_counter() - started, "\n".join(lines), failure)

    def _python(self, block: Block) -> tuple[str, str]:
        if self.session is None:
            self.errors = self.folder.with_suffix(".stderr").open("w+")
            self.session = subprocess.Popen(
                [self.place.python, Path(__file__).with_name("session.py")],
                cwd=self.folder,
                env=dict(self.place.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        assert self.session.stdin is not None
        assert self.session.stdout is not None
        self.session.stdin.write(json.dumps({"text": block.runs, "where": block.where}) + "\n")
        self.session.stdin.flush()
        line = self.session.stdout.readline()
        if not line:
            self.errors.seek(0)
            return "", f"the process ended: {self.errors.read()[-2000:]}"
        said = json.loads(line)
        return said["output"], said["failure"]

    def _shell(self, block: Block) -> tuple[str, str]:
        output = ""
        for script in _parts(block.runs):
            if SERVER in script:
                failure = serve(script, self.folder, self.place.environment)
            else:
                done = subprocess.run(
                    ["bash", "-e", "-o", "pipefail", "-c", script],
                    cwd=self.folder,
                    env=dict(self.place.environment),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=LONGEST,
                )
                output += done.stdout
                failure = f"ended with {done.returncode}:\n{done.stdout}{done.stderr}"
                if done.returncode in (0, CLOSED_PIPE):
                    failure = ""
            if failure:
                return output, failure
        return output, ""


def _parts(script: str) -> list[str]:
    """The script, cut before and after each command that serves until somebody stops it."""
    parts = [""]
    for line in script.splitlines(keepends=True):
        parts += [line, ""] if SERVER in line else [parts.pop() + line]
    return [part for part in parts if part.strip()]


def follow(page: Page, place: Place, folder: Path) -> list[Outcome]:
    """The outcomes of the blocks of a page, up to the first failure."""
    found = []
    with Reader(place, folder) as reader:
        for block in page.code:
            found.append(reader.copy(block))
            if block.runs:
                said = "FAILED" if found[-1].failure else f"{found[-1].seconds:.1f} s"
                print(f"{block.where} {block.language}: {said}", file=sys.stderr, flush=True)
            if found[-1].failure:
                break
    return found


def outputs(page: Page, found: Sequence[Outcome]) -> list[tuple[Block, str]]:
    """The blocks of output of a page, each with what the block before it printed this time."""
    printed = {outcome.block: outcome.output for outcome in found}
    pairs = zip(page.blocks, page.blocks[1:], strict=False)
    return [
        (after, printed[before] + "\n")
        for before, after in pairs
        if after.language == "output" and before in printed
    ]


def write_outputs(page: Page, found: Sequence[Outcome]) -> None:
    """Put what was printed into the page."""
    assert page.path is not None
    text = old = page.path.read_text("utf-8")
    for block, new in reversed(outputs(page, found)):
        text = text[: block.start] + new + text[block.end :]
    if text != old:
        with whole_file(page.path) as partial:
            partial.write_text(text, "utf-8")


def clone(folder: Path) -> Path:
    """The last commit in an empty folder, installed beside the packages of this interpreter."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    python = folder / ".venv" / "bin" / "python"
    code = "import site; print(site.getsitepackages()[0])"
    own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    Path(own.stdout.strip(), "packages.pth").write_text(
        "".join(f"import site; site.addsitedir({path!r})\n" for path in others)
    )
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, folder], check=True)
    return python


def row(page: Page, found: Sequence[Outcome]) -> tuple[str, int, int, int, int, str, str]:
    """A line of the table."""
    ran = [outcome for outcome in found if outcome.block.runs]
    kinds = [sum(o.block.language == kind for o in ran) for kind in ("python", "bash")]
    told = outputs(page, found)
    other = sum(block.text != new for block, new in told)
    failed = next((f"FAILED at {o.block.where}" for o in found if o.failure), "")
    result = failed or ("ok" if not other else f"ok, {other} of {len(told)} outputs differ")
    marked = sum(bool(block.marked) for block in page.code)
    seconds = sum(outcome.seconds for outcome in found)
    return (page.name, *kinds, len(told), marked, f"{seconds:.1f}", result)


COLUMNS = ("page", "python", "shell", "outputs", "not run", "seconds", "result")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", help="such as rank.md or 'qsl rank'; default: all")
    parser.add_argument("--clone", action="store_true", help="clone and install first")
    parser.add_argument("--write", action="store_true", help="write the outputs into the pages")
    parser.add_argument("--work", type=Path, help="a folder to keep, instead of a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        python = clone(work / "clone") if arguments.clone else Path(sys.executable)
        place = Place.of(python, work / "home")
        pages = [*read_pages(work / "clone" if arguments.clone else ROOT), *help_pages()]
        if unknown := set(arguments.pages) - {page.name for page in pages}:
            parser.error(f"there is no page {', '.join(sorted(unknown))}")
        rows, failures, marked = [], [], []
        for page in pages:
            if not page.code or (arguments.pages and page.name not in arguments.pages):
                continue
            folder = work / ("help" if page.path is None else page.path.stem)
            if page.path is not None:
                shutil.rmtree(folder, ignore_errors=True)
            found = follow(page, place, folder)
            rows.append(row(page, found))
            failures += [o for o in found if o.failure]
            marked += [block for block in page.code if block.marked]
            if arguments.write and page.path is not None:
                write_outputs(page, found)
    print(Table.of(COLUMNS, rows).text())
    print("\nnot run here:")
    for block in marked:
        print(f"  {block.where} needs {block.needs}")
    for outcome in failures:
        print(f"\n{outcome.block.where} FAILED\n{outcome.block.runs}\n{outcome.failure}")
    total, seconds = sum(r[1] + r[2] for r in rows), sum(float(r[5]) for r in rows)
    print(f"\n{total} blocks ran in {seconds:.0f} s; {len(marked)} not here; {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
