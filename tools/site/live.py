"""The live examples of the home page, made with the toy model: a reading, and a feature site.

    python -m tools.site.live --out build/live

What is there already is kept; remove the folder to have it made again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from qwen_scope_lens.cli import main as qsl

GROUP = "mini-qwen3/w1k-l0-16"
SENTENCE = "The kernel reads a file. 内核读取文件。"


def make(folder: Path) -> None:
    """Write `reading.html` and `site/` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page, site = folder / "reading.html", folder / "site"
    if not page.exists():
        _qsl("read", SENTENCE, "--layers", "6", "--out", str(page), "--quiet")
    if not site.exists():
        with tempfile.TemporaryDirectory() as work:
            texts, store = Path(work, "texts"), str(Path(work, "store"))
            _qsl("mini", "texts", "--out", str(texts), "--quiet")
            corpus = [str(texts / "anchor.jsonl"), "--sae", GROUP, "--layers", "6"]
            _qsl("extract", *corpus, "--out", store, "--quiet")
            _qsl("dash", "build", store, "--out", str(site), "--quiet")


def _qsl(*words: str) -> None:
    if qsl(words):
        raise SystemExit(f"qsl {' '.join(words)} failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    make(parser.parse_args().out)
