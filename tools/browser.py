"""Find a Chromium for the browser tests, and get one where there is none.

    python -m tools.browser

`make test` runs this before the tests. It tries, in this order: the path in the variable CHROMIUM,
a browser on the PATH, the one that Playwright has downloaded, Playwright's own download, and the
system's package manager where this user may install packages. It prints one line about what it
found or did. It exits with 0 also where none can be had: the tests then say so, and fail in CI.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["find_browser", "get_browser", "main"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 600
"""Seconds that a download or an installation may take."""


def find_browser() -> str | None:
    """The path of a Chromium that is on this machine now, or None."""
    if given := os.environ.get("CHROMIUM"):
        return given if Path(given).is_file() else None
    for name in NAMES:
        if path := shutil.which(name):
            return path
    return of_playwright()


def get_browser(run: Callable[[Sequence[str]], bool] | None = None) -> tuple[str | None, str]:
    """The path of a Chromium, downloaded or installed if necessary, and a line that says how.

    `run` executes a command and returns whether it succeeded.
    """
    if path := find_browser():
        return path, f"browser tests use {path}"
    if given := os.environ.get("CHROMIUM"):
        return None, f"CHROMIUM names {given}, which is not a file: unset it, or give a path"
    run = run or _run
    if run([sys.executable, "-m", "playwright", "install", "chromium"]) and (
        path := find_browser()
    ):
        return path, f"browser tests use {path}, which Playwright downloaded now"
    if may_install() and run(["apt-get", "update", "-q"]):
        install = ["apt-get", "install", "-qy", "--no-install-recommends", "chromium"]
        if run(install) and (path := find_browser()):
            return path, f"browser tests use {path}, which apt-get installed now"
    return None, (
        "no Chromium was found and none could be installed: the browser tests cannot run. Install"
        " Chromium with the system's package manager, or set CHROMIUM to the path of one"
    )


def main() -> int:
    _, line = get_browser()
    print(line)
    return 0


def of_playwright() -> str | None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as play:
        path = play.chromium.executable_path
    return path if path and Path(path).is_file() else None


def may_install() -> bool:
    return shutil.which("apt-get") is not None and os.geteuid() == 0


def _run(command: Sequence[str]) -> bool:
    """Whether the command succeeded; its output is shown only where it failed."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{' '.join(command)}: {error}", file=sys.stderr)
        return False
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        print(f"{' '.join(command)} failed: {' '.join(said)}", file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
