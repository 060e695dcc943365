"""Film chat steering in the page of a running `qsl serve`, as an animated picture.

    python -m tools.film docs/images/serve.webp http://127.0.0.1:8765/

It drives the page as a reader would: reads a text, rests on features, finds one by a sentence,
steers it, asks a question and moves the slider. While replies grow frames last as long as they
took; everything else has the tempo that is written here: a slow machine makes the same film.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.browser import get_browser

__all__ = ["main"]

FEATURE = "mini-qwen3/w1k-l0-16/4/934"
TEXT = "The kernel reads a file. Le noyau lit un fichier."
QUESTION = "How do I open a document?"
SIZE = {"width": 1100, "height": 720}
SHORT, LONG, LONGEST = 120, 1800, 300
"""Milliseconds: of a keystroke, of something to look at, and the most for a step of a reply."""


class Film:
    """The frames so far: pictures, each with the milliseconds that it stays."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.frames: list[tuple[bytes, int]] = []

    def keep(self, milliseconds: int) -> None:
        picture = self.page.screenshot(type="png", animations="disabled")
        if self.frames and self.frames[-1][0] == picture:
            milliseconds += self.frames.pop()[1]
        self.frames.append((picture, milliseconds))

    def type(self, selector: str, text: str) -> None:
        field = self.page.locator(selector)
        field.click()
        for i in range(3, len(text) + 3, 3):
            field.press_sequentially(text[i - 3 : i])
            self.keep(SHORT)

    def until_answered(self) -> None:
        verdict, began = self.page.locator(".compared b"), time.monotonic()
        while not verdict.count():
            now = time.monotonic()
            self.keep(min(LONGEST, round(1000 * (now - began)) or SHORT))
            began = now
        self.keep(2 * LONG)

    def slide(self, values: Sequence[float]) -> None:
        slider = self.page.locator("#edits input[type=range]")
        for value in values:
            slider.fill(str(value))
            self.keep(SHORT)
        self.page.locator(".compared b").wait_for(state="detached")
        self.until_answered()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the picture: .webp")
    parser.add_argument("address", help="of the running server")
    given = parser.parse_args(arguments)
    path, line = get_browser()
    if path is None:
        print(line, file=sys.stderr)
        return 1
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        engine = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = engine.new_page(viewport=SIZE, color_scheme="light")
        page.goto(f"{given.address}#layer=4&tokens=32&text={TEXT}")
        page.locator("#read-result .on").first.wait_for()
        page.wait_for_timeout(1500)
        film = Film(page)
        film.keep(LONG)
        for row in (1, 2, 3):
            page.locator("#read-result .feature-button").nth(row).hover()
            film.keep(LONG // 2)
        film.type("#search", "Le noyau lit un fichier")
        found = page.locator(f"#found [data-feature='{FEATURE}']")
        found.wait_for()
        found.hover()
        film.keep(LONG)
        found.click()
        page.locator("#chosen-address", has_text=FEATURE).wait_for()
        film.keep(LONG)
        page.locator("#steer-it").click()
        page.locator("#edits .means", has_text="raw").wait_for()
        film.keep(LONG // 2)
        where = page.locator("#edits input[list]")
        where.fill("generation")
        where.press("Tab")
        page.locator("#tab-chat").click()
        film.keep(LONG // 2)
        film.type("#say", QUESTION)
        page.locator("#send").click()
        film.until_answered()
        film.slide((2.2, 2.5, 2.8, 3))
        film.slide((2.5, 2, 1.5, 1, 0.5))
        engine.close()
    images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture, _ in film.frames]
    images[0].save(
        given.out,
        save_all=True,
        append_images=images[1:],
        duration=[milliseconds for _, milliseconds in film.frames],
        loop=0,
        quality=55,
        method=4,
    )
    seconds = sum(milliseconds for _, milliseconds in film.frames) / 1000
    print(f"{given.out}: {len(images)} frames, {seconds:.0f} s, {given.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
