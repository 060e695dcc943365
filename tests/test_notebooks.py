"""The notebooks in `examples/`: as they have to be, and they run."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Fork

from tools.notebooks import (
    EXAMPLES,
    REPOSITORY,
    Cells,
    badge,
    execute,
    install,
    problems,
    read,
)

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SHORT = ("01_load_and_read", "10_graph")
"""They take about two seconds of CPU each, without the imports; the others are marked slow."""


def test_there_is_one_for_each_thing_that_people_do() -> None:
    assert len(NOTEBOOKS) == 13
    assert set(SHORT) <= {path.stem for path in NOTEBOOKS}
    assert [path.name for path in EXAMPLES.iterdir() if path.suffix not in (".ipynb", "")] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_as_notebooks_have_to_be(path: Path) -> None:
    """Badge, install cell, one variable, kept outputs of one run, doors, no path of a machine."""
    assert problems(path.stem, read(path)) == []
    text = path.read_text("utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (EXAMPLES / link).exists(), f"{path.name} links to {link}"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in SHORT else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
)
def test_runs(path: Path, tmp_path: Path) -> None:
    """Every cell, in an empty folder; what shows something in the file shows something here."""
    kept = read(path)

    def run() -> None:
        import matplotlib

        matplotlib.use("Agg")
        found = copy.deepcopy(kept)
        with contextlib.chdir(tmp_path):
            execute(found)
        for mine, theirs in zip(found.cells, kept.cells, strict=True):
            if mine.cell_type == "code":
                assert [o.output_type for o in mine.outputs] == [
                    o.output_type for o in theirs.outputs
                ], mine.source

    log = tmp_path / "log"
    assert Fork(run, log).wait(600) == 0, log.read_text()


def test_cells_show_what_jupyter_shows() -> None:
    class Shaded:
        def __repr__(self) -> str:
            return "plain"

        def _repr_html_(self) -> str:
            return "<b>shaded</b>"

    cells = Cells()
    cells.names["Shaded"] = Shaded
    printed, shown = cells.run("import sys\nprint('a')\nprint('no', file=sys.stderr)\nShaded()")
    assert printed.text == "a\n"
    assert shown.data == {"text/plain": "plain", "text/html": "<b>shaded</b>"}
    assert shown.execution_count == 1
    assert cells.run("x = 1\nx;") == []
    assert cells.run("None") == []
    assert cells.run("x + 1")[0].data == {"text/plain": "2"}
    with pytest.raises(ImportError, match="missing"):
        cells.run("if x:\n    %pip install it")
    assert cells.run(install("x")) == []  # it is installed here
    with pytest.raises(ZeroDivisionError):
        cells.run("1 / 0")


def test_figures_are_kept_as_pictures() -> None:
    [figure] = Cells().run("import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    assert figure.output_type == "display_data"
    assert figure.data["image/png"]


WRONG: dict[str, Callable[..., object]] = {
    "lacks the badge": lambda nb: nb.cells[0].update(source="# Title"),
    "is not a title": lambda nb: nb.cells[0].update(source="Title"),
    "installs the package": lambda nb: nb.cells[1].update(source="import torch"),
    "0 cells are tagged parameters": lambda nb: nb.cells[2].metadata.pop("tags"),
    "expected one of GROUP": lambda nb: nb.cells[2].update(source="A, B = 1, 2"),
    "for a real model": lambda nb: nb.cells[2].update(source='GROUP = "a"'),
    "not run in order": lambda nb: nb.cells[3].update(execution_count=7),
    "nothing is kept of it": lambda nb: nb.cells[3].update(outputs=[]),
    "behind a door": lambda nb: nb.cells[3].update(
        source="from qwen_scope_lens.features.rank import rank\nprint(rank)"
    ),
    "a path of one machine": lambda nb: nb.cells[3].outputs[0].update(text="/root/here\n"),
    "bytes, at most": lambda nb: nb.cells[3].outputs[0].update(text="a" * 400_000),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_is_said(said: str) -> None:
    found = read(NOTEBOOKS[0])
    del found.cells[3:]
    code = read(NOTEBOOKS[0]).cells[1]
    code.update(source="print(1)", execution_count=3)
    code.metadata, code.id = {}, "another"
    code.outputs = Cells().run("print(1)")
    found.cells.append(code)
    assert problems(NOTEBOOKS[0].stem, found) == []
    WRONG[said](found)
    assert any(said in line for line in problems(NOTEBOOKS[0].stem, found))


def test_the_badge_and_the_install_cell_name_one_repository() -> None:
    assert f"github/{REPOSITORY}/blob/main/examples/01_x.ipynb" in badge("01_x")
    assert f"github.com/{REPOSITORY}" in install("01_x")
    assert "[train]" in install("09_train")
