"""A real headless Chromium for tests; what it complains about and where it connects is recorded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tools.browser import find_browser, get_browser

NO_BROWSER = "no browser"
"""How the reason of a skip begins, for the summary in conftest.py."""

PATIENCE = 30_000
"""Milliseconds that a page may take, for a machine that does much else."""

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Browser:
    """Opens pages; `complaints` must stay empty, `outside` too."""

    engine: Any
    complaints: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @contextmanager
    def page(self, width: int = 1280, height: int = 900, **options: Any) -> Iterator[Any]:
        context = self.engine.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", self._request)
        try:
            yield page
        finally:
            context.close()

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        local = ("file:", "data:", "blob:", "http://127.0.0.1:", "ws://127.0.0.1:")
        if not request.url.startswith(local):
            self.outside.append(request.url)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium of this machine. Where there is none, the tests are skipped; in CI they fail."""
    path = find_browser()
    if path is None:
        _, why = get_browser(run=lambda command: False)
        if os.environ.get("CI"):
            pytest.fail(why, pytrace=False)
        pytest.skip(f"{NO_BROWSER}: {why}")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)

    with sync_playwright() as play:
        engine = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield Browser(engine)
        finally:
            engine.close()
