"""Every test is offline, and sees no SAE files but those it wrote."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

# Before huggingface_hub is imported anywhere: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import planted
import pytest
from browser import NO_BROWSER, Browser, open_browser

OUTSIDE = {
    NO_BROWSER: "BROWSER TESTS DID NOT RUN",
    "no llama-server": "TESTS AGAINST THE REAL llama-server DID NOT RUN",
}

if TYPE_CHECKING:
    from serving import Served
    from steering_reference import World

    from qwen_scope_lens.stores import FeatureStore

# A shell's `&` starts processes that ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN_SCOPE_HOME", raising=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """QWEN_SCOPE_HOME with one group of one's own: `local/mine`."""
    folder = tmp_path / "home"
    planted.write_group(folder / "mine")
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """SAEs for the layers of a tiny random model: see `steering_reference.py`."""
    from steering_reference import write_saes

    return write_saes(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """The model of `tiny_world`, which never ends a text."""
    from steering_reference import endless_bridge

    return endless_bridge()


@pytest.fixture
def tiny_home(tiny_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """QWEN_SCOPE_HOME with the SAEs of `tiny_world`."""
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(tiny_world.home))


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Some documents of every language, and some hostile ones: see `dash_site.py`."""
    from dash_site import build_small_store

    return build_small_store(tmp_path_factory.mktemp("dash") / "store")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`qsl serve` on the mini: see `serving.py`."""
    from serving import serving

    with serving(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """Every test of a page: no error or warning in the console or of the page, no dialog, and no
    request to anywhere else."""
    chromium.complaints.clear()
    chromium.outside.clear()
    yield chromium
    assert chromium.complaints == []
    assert chromium.outside == []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tests that need something from outside, and did not find it, are said once more, where nobody
    can overlook them."""
    for reason, title in OUTSIDE.items():
        skipped = [
            report
            for report in terminalreporter.stats.get("skipped", [])
            if isinstance(report.longrepr, tuple) and reason in report.longrepr[2]
        ]
        if skipped:
            terminalreporter.section(title, red=True, bold=True)
            terminalreporter.write_line(f"{len(skipped)} tests: {skipped[0].longrepr[2]}", red=True)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The place of a store on a server of the S3 protocol, which ends with the test."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    fs = pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    # Servers of one process share their buckets.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("QWEN_SCOPE_CACHE", str(tmp_path / "cache"))
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fs.S3FileSystem.clear_instance_cache()
    fs.S3FileSystem().mkdir("shelf")
    yield "s3://shelf/store"
    server.stop()
    fs.S3FileSystem.clear_instance_cache()
