"""The live examples of the home page, made with the toy model: a reading, and a feature site.

    python -m tools.site.live --out build/live

What is there already is kept, because it takes a minute; remove the folder to have it made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli import main as qsl

SENTENCE = "The kernel reads a file. 内核读取文件。"


def make(folder: Path) -> None:
    """Write `reading.html` and `site/` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page, site = folder / "reading.html", folder / "site"
    commands = {
        page: ["read", SENTENCE, "--layers", "6", "--out", str(page), "--quiet"],
        site: ["demo", "--out", str(site)],
    }
    for made, command in commands.items():
        if not made.exists() and qsl(command):
            raise SystemExit(f"qsl {' '.join(command)} failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    make(parser.parse_args().out)
