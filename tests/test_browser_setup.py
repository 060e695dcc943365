"""How `make test` finds or gets a browser, without one being downloaded here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tools import browser


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any browser."""
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(browser, "of_playwright", lambda: None)


def test_a_browser_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "chromium"
    program.touch(mode=0o755)
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def never(command: Sequence[str]) -> bool:
        raise AssertionError(f"nothing had to be run, and {command} was")

    assert browser.get_browser(never) == (str(program), f"browser tests use {program}")


@pytest.mark.usefixtures("nothing")
def test_a_wrong_path_is_named_and_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    ran: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> bool:
        ran.append(command)
        return True

    path, line = browser.get_browser(run)
    assert path is None
    assert "CHROMIUM names /nowhere/chromium" in line
    assert ran == []


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize("program", ["playwright", "apt-get"])
def test_one_is_got_by_the_first_way_that_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    monkeypatch.setattr(browser, "may_install", lambda: True)

    def run(command: Sequence[str]) -> bool:
        if program not in command or "update" in command:
            return "update" in command
        (tmp_path / "chromium").touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return True

    path, line = browser.get_browser(run)
    assert path == str(tmp_path / "chromium")
    assert "now" in line


@pytest.mark.usefixtures("nothing")
def test_where_none_can_be_had_the_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "may_install", lambda: False)
    path, line = browser.get_browser(lambda command: False)
    assert path is None
    assert "Install Chromium" in line
