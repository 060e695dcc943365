"""The wheel: builds, installs into an empty environment, and everything in it imports."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORT_ALL = """
import importlib, pkgutil, sys
import qwen_scope_lens
assert qwen_scope_lens.__file__.startswith(sys.prefix), qwen_scope_lens.__file__
names = [m.name for m in pkgutil.walk_packages(qwen_scope_lens.__path__, "qwen_scope_lens.")]
for name in names:
    importlib.import_module(name)
for name in qwen_scope_lens.__all__:
    getattr(qwen_scope_lens, name)
assert "qwen_scope_lens.converters.official_to_saelens" in names
assert importlib.util.find_spec("converters") is None, "a global module name is claimed"
print(len(names))
"""


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


@pytest.mark.slow
def test_it_installs_into_an_empty_environment_and_imports(wheel: Path, tmp_path: Path) -> None:
    """Empty but for the dependencies, which are lent by path instead of being downloaded again."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    with zipfile.ZipFile(wheel) as archive:  # what installing a pure wheel does
        archive.extractall(site)
    lent = Path(site) / "lent.pth"
    lent.write_text(
        "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} | _extra())
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", IMPORT_ALL],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 10


def _extra() -> set[str]:
    """Site folders of the running interpreter that its own .pth files added."""
    return {path for path in sys.path if path.endswith("site-packages")}
