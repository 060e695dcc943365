"""A command that serves pages until Ctrl-C: started, asked for a page, and stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

__all__ = ["serve"]

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+[^\s)`]*")
ONE_AT_A_TIME = threading.Lock()  # they listen on the ports that the pages name
SECONDS_TO_ANSWER, SECONDS_TO_STOP = 300, 30


def serve(script: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Empty if the address that it printed answered and Ctrl-C ended it; else what went wrong."""
    with ONE_AT_A_TIME, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {script}"],
            cwd=folder,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            end, answered = time.monotonic() + SECONDS_TO_ANSWER, False
            while not answered and process.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
                said.seek(0)
                address = ADDRESS.search(said.read())
                answered = address is not None and _answers(address[0])
            os.killpg(process.pid, signal.SIGINT)
            process.wait(SECONDS_TO_STOP)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            answered = False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        return "" if answered else f"no address answered, or Ctrl-C did not end it:\n{said.read()}"


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
