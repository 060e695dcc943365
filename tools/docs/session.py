"""A fresh Python that runs the blocks of one page, one after the other, as one script.

Each line of its input is a JSON object with `text` and `where`; for each it writes a line with what
the block printed, its seconds, and the traceback if it failed. `follow.py` starts it.
"""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import sys
import time
import traceback
from typing import Any


def run(text: str, where: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run one block among the names that the blocks before it made."""
    linecache.cache[where] = (len(text), None, text.splitlines(keepends=True), where)
    printed, failure, started = io.StringIO(), "", time.perf_counter()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(text, where, "exec"), names)
        except BaseException:
            failure = traceback.format_exc()
    seconds = time.perf_counter() - started
    return {"output": printed.getvalue(), "seconds": seconds, "failure": failure}


def main() -> None:
    sys.path[0] = ""  # the folder of the page, as in a script of the reader's own
    names: dict[str, Any] = {"__name__": "__main__"}
    while line := sys.stdin.readline():
        print(json.dumps(run(**json.loads(line), names=names)), flush=True)


if __name__ == "__main__":
    main()
