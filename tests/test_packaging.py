"""The wheel: builds, installs into an empty folder, and everything in it imports."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from forks import Fork, forget

ROOT = Path(__file__).parent.parent


def packages() -> list[str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: list[str] = tomllib.load(file)["tool"]["setuptools"]["packages"]
    return found


def test_every_package_folder_is_listed() -> None:
    folders = {
        str(path.parent.relative_to(ROOT)).replace(os.sep, ".")
        for path in (ROOT / "qwen_scope_lens").rglob("__init__.py")
    }
    assert set(packages()) == folders | {"qwen_scope_lens.converters"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that no build folder is left in it."""
    import shutil

    source = tmp_path_factory.mktemp("source") / "tree"
    ignore = shutil.ignore_patterns(".git", ".venv*", "*.egg-info", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=300
    )
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qwen_scope_lens"}


def test_it_installs_into_an_empty_folder_and_imports(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are those of this environment; of the repository nothing is in reach."""
    site, log = tmp_path / "site", tmp_path / "log"
    with zipfile.ZipFile(wheel) as archive:  # what installing a pure wheel does
        archive.extractall(site)

    def import_all() -> None:
        os.chdir(tmp_path)
        forget("qwen_scope_lens", "converters", "tools")
        sys.meta_path[:] = [
            finder
            for finder in sys.meta_path
            if not getattr(finder, "__module__", "").startswith("__editable__")
        ]
        there = [path for path in sys.path if path and Path(path) not in (ROOT, ROOT / "tests")]
        sys.path[:] = [str(site), *there]
        package = importlib.import_module("qwen_scope_lens")
        assert str(package.__file__).startswith(str(site)), package.__file__
        names = [
            found.name for found in pkgutil.walk_packages(package.__path__, "qwen_scope_lens.")
        ]
        for name in names:
            importlib.import_module(name)
        for name in package.__all__:
            getattr(package, name)
        assert "qwen_scope_lens.converters.official_to_saelens" in names
        for name in ("converters", "tools"):
            assert importlib.util.find_spec(name) is None, f"a global module name: {name}"
        print("imported", len(names))

    assert Fork(import_all, log).wait() == 0, log.read_text()
    assert int(log.read_text().split("imported ")[1]) > 10
