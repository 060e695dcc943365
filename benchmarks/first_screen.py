"""How soon the first screen of `qsl serve` is alive: its example read, a feature chosen.

    python benchmarks/first_screen.py --out benchmarks/results/first-screen.txt
    python benchmarks/first_screen.py --against OTHER/CHECKOUT ...   # another commit, interleaved

A server on mini-qwen3 runs in a process of its own, a headless Chromium opens its page in a fresh
context each time. Told are the wall-clock seconds from the navigation until a token is coloured and
a feature is chosen, the CPU seconds that the server and the browser spent until then, and how many
requests the page has made. `--busy N` lets N processes compete for the processor meanwhile; so do
all other programs on the machine, which CPU seconds do not notice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from _measure import Printed, cpu_name
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.browser import get_browser

ALIVE = """() => document.querySelector("#read-result .strip > .on")
  && document.querySelector("#chosen-address")"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="a checkout to compare with")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    say = Printed()
    here = Path(__file__).parents[1]
    places = {"here": here} | ({"there": given.against} if given.against else {})
    load = os.getloadavg()[0]
    say(f"CPU: {cpu_name()}, {os.cpu_count()} of them; {date.today()}; load {load:.0f}")
    say("; ".join(f"{name}: commit {commit(place)}" for name, place in places.items()))
    path, _ = get_browser()
    with ExitStack() as stack:
        servers = {name: start(place, stack) for name, place in places.items()}
        play = stack.enter_context(sync_playwright())
        options = {"executable_path": path, "args": ["--no-sandbox", "--disable-gpu"]}
        browser = play.chromium.launch(**options)
        stack.callback(browser.close)
        for busy in dict.fromkeys((0, given.busy)):
            rivals = [multiprocessing.Process(target=spin, daemon=True) for _ in range(busy)]
            for rival in rivals:
                rival.start()
            found: dict[str, list[Opened]] = {name: [] for name in servers}
            for _ in range(given.repeats + 1):
                for name, (url, server) in servers.items():
                    found[name].append(opened(browser, url, server))
            for rival in rivals:
                rival.terminate()
            for name, rows in found.items():
                wall, server, client, _ = (sorted(row) for row in zip(*rows[1:], strict=True))
                say(
                    f"{busy} busy processes, {name}: median {statistics.median(wall):.2f} s, from"
                    f" {wall[0]:.2f} to {wall[-1]:.2f}; CPU seconds of the server"
                    f" {statistics.median(server):.2f}, of the browser"
                    f" {statistics.median(client):.2f}; {rows[-1].requests} requests"
                )
    if given.out is not None:
        say.save(given.out)


class Opened(NamedTuple):
    """One opening of the page."""

    wall: float
    server: float
    browser: float
    requests: int


def start(place: Path, stack: ExitStack) -> tuple[str, int]:
    """`qsl serve` of a checkout, once it answers and has had time to settle."""
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qwen_scope_lens.cli", "serve", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    stack.callback(process.terminate)
    assert process.stdout is not None
    url = process.stdout.readline().decode().split()[0]
    info = urllib.request.urlopen(f"{url}api/info", timeout=120).read()
    assert b"mini-qwen3" in info
    while b'"site": null' in urllib.request.urlopen(f"{url}api/info", timeout=120).read():
        time.sleep(0.5)  # the toy's site is being made
    time.sleep(2)
    return url, process.pid


def spent(pids: Iterable[int]) -> float:
    """CPU seconds of some processes."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return [one for one in found[1:] if "chrom" in name_of(one)]


def name_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def opened(browser: Any, url: str, server: int) -> Opened:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    mine = os.getpid()
    before = spent([server]), spent(descendants(mine))
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_function(ALIVE, timeout=60_000)
    taken = time.perf_counter() - began
    after = spent([server]), spent(descendants(mine))
    context.close()
    return Opened(taken, after[0] - before[0], after[1] - before[1], len(requests))


def spin() -> None:
    while True:
        pass


def commit(place: Path) -> str:
    command = ["git", "-C", str(place), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
