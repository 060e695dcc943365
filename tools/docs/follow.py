"""Follow the README, every page in `docs/` and every help text, as a reader would: `make follow`.

Each page gets an empty folder. Its Python blocks run as one script in a fresh process, its shell
blocks under bash with `qsl` on the PATH, in the order of the page, offline, without any name or
file that the page does not make. (The help texts share one folder, in the order of `qsl --help`.)
What needs a hub, a GPU or a large model says so in the page, is not run, and is counted.

    python -m tools.docs.follow                     # this checkout
    python -m tools.docs.follow --clone             # a clone of its last commit, newly installed
    python -m tools.docs.follow rank.md "qsl rank"  # some pages
    python -m tools.docs.follow --write             # and print the outputs in the pages again
    python -m tools.docs.follow --warm              # quicker, for work on the pages: see `warm.py`

Exits with 1 where something failed. A page ends at its first failure.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from qwen_scope_lens.files import whole_file
from qwen_scope_lens.tables import Table
from tools.docs.pages import Block, Page, help_pages, read_page, read_pages
from tools.docs.reader import ROOT, Outcome, Place, Reader, warm

__all__ = ["clone", "follow", "outputs", "report", "row", "write_outputs"]


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
    printed = {outcome.block: outcome.output for outcome in found if not outcome.failure}
    pairs = zip(page.blocks, page.blocks[1:], strict=False)
    return [
        (after, printed[before] + "\n")
        for before, after in pairs
        if after.language == "output" and before in printed
    ]


def write_outputs(page: Page, found: Sequence[Outcome]) -> None:
    """Put what was printed into the page."""
    if page.path is None:
        return
    text = old = page.path.read_text("utf-8")
    if read_page(page.path) != page:
        raise SystemExit(f"{page.path} was changed while it was followed: it stays as it is")
    for block, new in reversed(outputs(page, found)):
        text = text[: block.start] + new + text[block.end :]
    if text != old:
        with whole_file(page.path) as partial:
            partial.write_text(text, "utf-8")


def clone(folder: Path) -> Path:
    """The last commit in an empty folder, installed beside the packages of this interpreter."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    python = folder / ".venv" / "bin" / "python"
    code = "import site; print(site.getsitepackages()[0])"
    own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    Path(own.stdout.strip(), "packages.pth").write_text(
        "".join(f"import site; site.addsitedir({path!r})\n" for path in others)
    )
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    return python


def row(page: Page, found: Sequence[Outcome]) -> tuple[str | int, ...]:
    """A line of the table."""
    ran = [outcome for outcome in found if outcome.block.runs]
    kinds = [sum(o.block.language == kind for o in ran) for kind in ("python", "bash")]
    told = outputs(page, found)
    other = sum(block.text != new for block, new in told)
    failed = next((f"FAILED at {o.block.where}" for o in found if o.failure), "")
    result = failed or ("ok" if not other else f"ok, {other} of {len(told)} outputs differ")
    marked = sum(bool(block.marked) for block in page.code)
    seconds = sum(outcome.seconds for outcome in found)
    return (page.name, *kinds, len(told), marked, round(seconds), result)


COLUMNS = ("page", "python", "shell", "outputs", "not run", "seconds", "result")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", help="such as rank.md or 'qsl rank'; default: all")
    parser.add_argument("--clone", action="store_true", help="clone and install first")
    parser.add_argument(
        "--warm", action="store_true", help="import torch once, not in each process"
    )
    parser.add_argument("--jobs", type=int, default=1, help="pages at a time (%(default)s)")
    parser.add_argument("--write", action="store_true", help="write the outputs into the pages")
    parser.add_argument("--work", type=Path, help="a folder to keep, instead of a temporary one")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell's `&` began us
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as until_the_end:
        work = (arguments.work or Path(temporary)).resolve()
        python = clone(work / "clone") if arguments.clone else Path(sys.executable)
        place = Place.of(python, work / "home")
        pages = [*read_pages(work / "clone" if arguments.clone else ROOT), *help_pages()]
        if unknown := set(arguments.pages) - {page.name for page in pages}:
            parser.error(f"there is no page {', '.join(sorted(unknown))}")
        if arguments.warm:
            place = until_the_end.enter_context(warm(place, python, work / "warm"))

        def one(batch: Sequence[Page]) -> list[tuple[Page, list[Outcome]]]:
            folder = work / "help" if batch[0].path is None else work / batch[0].path.stem
            shutil.rmtree(folder, ignore_errors=True)
            return [(page, follow(page, place, folder)) for page in batch]

        chosen = [
            page for page in pages if page.code and page.name in (arguments.pages or [page.name])
        ]
        helps = [page for page in chosen if page.path is None]
        batches = [[page] for page in chosen if page.path is not None] + [helps] * bool(helps)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            done = [pair for part in pool.map(one, batches) for pair in part]
    if arguments.write:
        for page, found in done:
            write_outputs(page, found)
    return report(done)


def report(done: Sequence[tuple[Page, list[Outcome]]]) -> int:
    """Print what ran, what did not and why, and what failed; returns the exit code."""
    rows = [row(page, found) for page, found in done]
    marked = [block for page, _ in done for block in page.code if block.marked]
    failures = [outcome for _, found in done for outcome in found if outcome.failure]
    print(Table.of(COLUMNS, rows).text())
    print("\nnot run here:")
    for block in marked:
        print(f"  {block.where} needs {block.needs}")
    for outcome in failures:
        print(f"\n{outcome.block.where} FAILED\n{outcome.block.runs}\n{outcome.failure}")
    ran, seconds = (sum(int(r[i]) for r in rows for i in places) for places in ((1, 2), (5,)))
    print(f"\n{ran} blocks ran in {seconds} s; {len(marked)} not here; {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
