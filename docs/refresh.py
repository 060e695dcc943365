"""Make every output in these pages again: run the commands they name, put in what those print.

A page says what a block is the output of, in a comment just before it:

    <!-- run: qsl rank store/ --label lang --positive zh --out zh.json -->
    ```
    ... replaced by what the command prints ...
    ```

`<!-- first: COMMAND -->` runs without a block (a store that later commands need). Commands run in
the shell, a scratch folder for each page, on the embedded minis; `heldout.jsonl` lies there.
Pages whose output is the same stay untouched. Usage: `python docs/refresh.py [PAGE.md ...]`
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qwen_scope_lens.files import whole_file
from qwen_scope_lens.mini import HELDOUT

DOCS = Path(__file__).parent
STEP = re.compile(r"^<!-- (?P<kind>run|first): (?P<command>.+?) -->\n", re.MULTILINE)
BLOCK = re.compile(r"(?P<fence>```\w*\n)(?P<text>.*?)(?P<end>^```$)", re.MULTILINE | re.DOTALL)


def output_of(command: str, folder: Path) -> str:
    """What a command prints; its progress goes to stderr, which is shown only when it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode not in (0, 141):  # 141: `| head` closed the pipe
        raise SystemExit(f"{command}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def refreshed(text: str, folder: Path) -> str:
    """A page with every output made again."""
    parts, at = [], 0
    for step in STEP.finditer(text):
        print(f"  {step['command']}", flush=True)
        found = output_of(step["command"], folder)
        if step["kind"] == "first":
            continue
        block = BLOCK.match(text, step.end())
        if block is None:
            raise SystemExit(f"no block of output follows {step[0].strip()}")
        parts += [text[at : step.end()], block["fence"], found, "\n", block["end"]]
        at = block.end()
    return "".join([*parts, text[at:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="default: all of docs/")
    parser.add_argument("--work", type=Path, help="a folder to keep, instead of a temporary one")
    arguments = parser.parse_args()
    pages = [DOCS / Path(name).name for name in arguments.pages] or sorted(DOCS.glob("*.md"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        for page in pages:
            text = page.read_text("utf-8")
            if STEP.search(text) is None:
                continue
            print(page.name, flush=True)
            (folder / page.stem).mkdir(parents=True, exist_ok=True)
            shutil.copy(HELDOUT, folder / page.stem / "heldout.jsonl")
            new = refreshed(text, folder / page.stem)
            if new != text:
                with whole_file(page) as partial:
                    partial.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
