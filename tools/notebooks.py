"""Run the notebooks in `examples/` and keep what they print; check them: `make notebooks`.

    python -m tools.notebooks                  # run all, each in an empty folder; outputs in place
    python -m tools.notebooks 01 saelens       # some
    python -m tools.notebooks --check          # run nothing: is every notebook as it has to be?
    python -m tools.notebooks 01 --group local/my-saes    # with other SAEs; nothing is written

No kernel is started: torch is imported once, and each notebook runs in a fork, cell after cell.
What is kept of a cell is what Jupyter shows of it: what it prints, its last value, its figures;
not what goes to the error stream, which is progress. A notebook whose cell fails stays as it is.
The badge and the cell that installs are made from `REPOSITORY`, the same in all notebooks.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from qwen_scope_lens.files import whole_file
from qwen_scope_lens.tables import Table

__all__ = ["EXAMPLES", "Cells", "badge", "execute", "install", "problems", "read", "write"]

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
REPOSITORY = "qwen-scope-lens/qwen-scope-lens"
"""Where Colab finds the notebooks and pip the package: OWNER/NAME on GitHub."""

EXTRAS = {"09_train": "[train]"}
"""What a notebook needs of the optional packages."""

VARIABLES = ("GROUP", "RELEASE")
LARGEST = 300_000  # bytes of a notebook
PATHS = re.compile(r"(?<![\w.:/])/(?:root|home|tmp|work|Users|content|var|opt|usr)\b[/\w.-]*")
MAGIC = re.compile(r"^(\s*)%pip .*$", re.MULTILINE)
DOORLESS = ("qwen_scope_lens", "qwen_scope_lens.mini", "qwen_scope_lens.cli")
"""Doors whose names are not in a stub."""


# --- the two cells that are the same everywhere --------------------------------------------------


def badge(name: str) -> str:
    """The line that opens a notebook in Colab."""
    place = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/examples/{name}.ipynb"
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({picture})]({place})"


def install(name: str) -> str:
    """The cell that installs the package where it is missing."""
    pins = f"https://raw.githubusercontent.com/{REPOSITORY}/main/constraints.txt"
    return (
        "import importlib.util\n\n"
        'if importlib.util.find_spec("qwen_scope_lens") is None:  # as in Colab\n'
        f'    pins = "{pins}"\n'
        f'    home = "git+https://github.com/{REPOSITORY}"\n'
        "    %pip install --quiet --constraint {pins}"
        f' "qwen-scope-lens{EXTRAS.get(name, "")} @ {{home}}"'
    )


# --- running -------------------------------------------------------------------------------------


class Cells:
    """The cells of one notebook, run one after the other in this process."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.count = 0

    def run(self, source: str) -> list[NotebookNode]:
        """Run a cell and return its outputs. What it raises goes through."""
        self.count += 1
        where = f"<cell {self.count}>"
        # It runs where the package is installed; where it is not, nothing could be shown.
        tree = ast.parse(MAGIC.sub(r"\1raise ImportError('the package is missing')", source))
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr) and not _silent(source):
            last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
        printed, value = io.StringIO(), None
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(tree, where, "exec"), self.names)
            if last is not None:
                value = eval(compile(last, where, "eval"), self.names)
        outputs = []
        if text := printed.getvalue():
            outputs.append(nbformat.v4.new_output("stream", name="stdout", text=text))
        if value is not None:
            outputs.append(self._shown(value))
        return [*outputs, *_figures()]

    def _shown(self, value: Any) -> NotebookNode:
        data = {"text/plain": repr(value)}
        if (html := getattr(value, "_repr_html_", None)) is not None and (found := html()):
            data["text/html"] = found
        kind = {"data": data, "execution_count": self.count}
        return nbformat.v4.new_output("execute_result", **kind)


def _silent(source: str) -> bool:
    return source.rstrip().endswith(";")


def _figures() -> list[NotebookNode]:
    """Every figure that a cell left open, as Jupyter's inline backend shows it."""
    plt: Any = sys.modules.get("matplotlib.pyplot")
    found = []
    for number in plt.get_fignums() if plt is not None else ():
        figure, file = plt.figure(number), io.BytesIO()
        figure.savefig(file, format="png", dpi=72, bbox_inches="tight")
        data = {
            "image/png": base64.b64encode(file.getvalue()).decode(),
            "text/plain": f"<Figure with {len(figure.axes)} axes>",
        }
        found.append(nbformat.v4.new_output("display_data", data=data))
        plt.close(figure)
    return found


def execute(notebook: NotebookNode, group: str | None = None) -> None:
    """Run all cells in the present folder, and put what they show into the notebook."""
    cells = Cells()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if group is not None and _tagged(cell, "parameters"):
            [name] = _assigned(cell.source)
            cell.source = f'{name} = "{group}"'
        cell.outputs = cells.run(cell.source)
        cell.execution_count = cells.count


# --- checking ------------------------------------------------------------------------------------


def problems(name: str, notebook: NotebookNode) -> list[str]:
    """What is wrong with a notebook, in whole sentences; nothing is run."""
    return list(_problems(name, notebook))


def _problems(name: str, notebook: NotebookNode) -> Iterator[str]:
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell is not a title"
    if badge(name) not in first.source:
        yield "the first cell lacks the badge of this notebook"
    if not code or code[0].source != install(name):
        yield "the first code cell is not the one that installs the package"
    yield from _parameters(code)
    for number, cell in enumerate(code, 1):
        where = f"code cell {number}"
        if cell.execution_count != number:
            yield f"{where} was not run in order: its outputs are not those of one run"
        if _shows(cell.source) and not cell.outputs:
            yield f"{where} shows something, and nothing is kept of it"
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"{where} failed"
        yield from (f"{where} imports from behind a door: {m}" for m in _behind(cell.source))
    text = nbformat.writes(notebook)
    if found := PATHS.search(text):
        yield f"there is a path of one machine in it: {found[0]}"
    if len(text.encode()) > LARGEST:
        yield f"it has {len(text.encode()):,} bytes, at most {LARGEST:,} are allowed"


def _parameters(code: Sequence[NotebookNode]) -> Iterator[str]:
    found = [cell for cell in code if _tagged(cell, "parameters")]
    if len(found) != 1:
        yield f"{len(found)} cells are tagged parameters, expected one"
        return
    names = _assigned(found[0].source)
    if len(names) != 1 or names[0] not in VARIABLES:
        yield f"the parameters are {names}: expected one of {', '.join(VARIABLES)}"
    if "a real model" not in found[0].source:
        yield "the parameter does not say what to write for a real model"


def _tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def _assigned(source: str) -> list[str]:
    targets = [node.targets for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [target.id for some in targets for target in some if isinstance(target, ast.Name)]


def _shows(source: str) -> bool:
    """Whether a cell prints, or ends in a value."""
    body = ast.parse(MAGIC.sub(r"\1pass", source)).body
    prints = any(
        isinstance(node, ast.Name) and node.id == "print"
        for part in body
        for node in ast.walk(part)
    )
    ends = bool(body) and isinstance(body[-1], ast.Expr) and not _silent(source)
    return prints or ends


def _behind(source: str) -> Iterator[str]:
    """The modules of ours that a cell imports from and that are not doors."""
    for node in ast.walk(ast.parse(MAGIC.sub(r"\1pass", source))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qwen_scope_lens"):
            module = str(node.module)
            stub = ROOT / Path(*module.split(".")) / "__init__.pyi"
            if module not in DOORLESS and not stub.is_file():
                yield module


# --- files ---------------------------------------------------------------------------------------


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(path: Path, notebook: NotebookNode) -> None:
    with whole_file(path) as partial:
        nbformat.write(notebook, partial)


@dataclass(frozen=True)
class _Outcome:
    name: str
    wall: float
    cpu: float
    failure: str = ""


def _run(path: Path, group: str | None, channel: Any) -> None:
    """In a fork: run one notebook in an empty folder, and write it back."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(torch.get_num_threads())  # a fork makes its threads now, or never
    notebook, began, failure = read(path), time.perf_counter(), ""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            execute(notebook, group)
        except BaseException:
            failure = traceback.format_exc()
    if not failure and group is None:
        write(path, notebook)
    used = os.times()
    seconds = used.user + used.system + used.children_user + used.children_system
    channel.send(_Outcome(path.stem, time.perf_counter() - began, seconds, failure))


def _forked(path: Path, group: str | None) -> _Outcome:
    mine, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(path, group, theirs))
    process.start()
    theirs.close()
    try:
        outcome: _Outcome = mine.recv()
    except EOFError:
        process.join()
        failure = f"the process ended with {process.exitcode}"
        return _Outcome(path.stem, 0, 0, failure)
    process.join()
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 01; default: all")
    parser.add_argument("--check", action="store_true", help="run nothing")
    parser.add_argument("--group", help="other SAEs, whose model runs; nothing is written")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    paths = [
        path
        for path in sorted(EXAMPLES.glob("*.ipynb"))
        if not arguments.names or path.stem.startswith(tuple(arguments.names))
    ]
    if not paths:
        parser.error(f"no notebook in {EXAMPLES.name}/ begins with {' or '.join(arguments.names)}")
    outcomes = [] if arguments.check else _run_all(paths, arguments.group)
    failed = {outcome.name for outcome in outcomes if outcome.failure}
    wrong = [
        f"{path.name}: {line}"
        for path in paths
        if path.stem not in failed
        for line in problems(path.stem, read(path))
    ]
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if failed or wrong else 0


def _run_all(paths: Sequence[Path], group: str | None) -> list[_Outcome]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if group is None:
        os.environ["HF_HUB_OFFLINE"] = "1"
    # What every fork needs, once.
    import matplotlib.pyplot  # noqa: F401
    import sae_lens  # noqa: F401
    import transformer_lens  # noqa: F401
    import transformers

    transformers.utils.logging.disable_progress_bar()
    outcomes = []
    for path in paths:
        found = _forked(path, group)
        outcomes.append(found)
        said = f"FAILED\n{found.failure}" if found.failure else f"{found.wall:.1f} s"
        print(f"{path.stem}: {said}", file=sys.stderr, flush=True)
    rows = [(o.name, o.wall, o.cpu, "FAILED" if o.failure else "ok") for o in outcomes]
    print(Table.of(("notebook", "seconds", "CPU seconds", "result"), rows).text())
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
