"""Take pictures of pages at 390 and 1280 pixels, in light and dark, to be looked at by a person.

    python -m tools.shots pictures/ report.html 'site/index.html#mini-qwen3/w1k-l0-16/6/3'

A page is an HTML file, with an address inside it where it has one, or the address of a server that
runs on this machine; `--click` presses something on it first. It prints what the browser
complains about and how far a page is wider than the window, and then exits with 1. The picture in
`docs/dash.md` is one with `--width 1180 --scheme light --height 800`, that in `docs/serve.md`:

    python -m tools.shots pictures/ 'http://127.0.0.1:8765/#PAGE' --click '#send' \
        --until '.compared b' --width 1180 --scheme light --height 800
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.browser import get_browser

__all__ = ["main"]

WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
SETTLE = 800
"""Milliseconds that a page has to load its data."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of the pictures")
    parser.add_argument(
        "pages",
        nargs="+",
        help="HTML files or http://127.0.0.1..., with #address where there is one",
    )
    parser.add_argument(
        "--click", action="append", default=[], help="a selector, before the picture"
    )
    parser.add_argument("--until", help="a selector to wait for, before the picture")
    parser.add_argument("--width", nargs="+", type=int, default=WIDTHS, help="of the window")
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--height", type=int, help="the top of the page, not the whole of it")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    path, line = get_browser()
    if path is None:
        print(line, file=sys.stderr)
        return 1
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with sync_playwright() as play:
        engine = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for page in given.pages:
            file, mark, inside = page.partition("#")
            address = page
            if not page.startswith("http://127.0.0.1"):
                address = Path(file).resolve(strict=True).as_uri() + mark + inside
            name = re.sub(r"\W+", "-", f"{Path(file).parent.name} {Path(file).stem} {inside}")[:100]
            for width in given.width:
                for scheme in given.scheme:
                    view = engine.new_page(
                        viewport={"width": width, "height": given.height or 900},
                        color_scheme=scheme,
                    )
                    picture = given.out / f"{name.strip('-')}-{width}-{scheme}.png"
                    complaints: list[str] = []
                    view.on("console", lambda message, to=complaints: to.append(message.text))
                    view.on("pageerror", lambda error, to=complaints: to.append(str(error)))
                    view.goto(address)
                    view.wait_for_timeout(SETTLE)
                    for selector in given.click:
                        view.locator(selector).click()
                    if given.until:
                        view.locator(given.until).first.wait_for()
                        view.wait_for_timeout(SETTLE)
                    wide = view.evaluate("document.documentElement.scrollWidth - innerWidth")
                    if wide > 0:
                        complaints.append(f"{wide} pixels wider than the window")
                    view.screenshot(path=picture, full_page=given.height is None)
                    view.close()
                    print(picture)
                    wrong += [f"{picture.name}: {text}" for text in complaints]
        engine.close()
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
