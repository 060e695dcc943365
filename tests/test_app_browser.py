"""The app in a real Chromium: a click steers, two visitors never mix, runs stop, plans are kept."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from feature_stores import GROUP
from playwright.sync_api import expect

import qwen_scope_lens as qsl
from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.app import Workbench
from qwen_scope_lens.app.server import make_web_app
from qwen_scope_lens.app.steering_run import Outcome, run_steering
from qwen_scope_lens.labels import Label, LabelPack
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.models import unwrap
from qwen_scope_lens.site.build import site_of_documents
from qwen_scope_lens.steering import Plan, Sampling

pytestmark = pytest.mark.browser

LAYER = 6
LABEL = "<b>bold</b><img src=x onerror=alert(1)>"
SLOW = 60_000


@pytest.fixture(scope="module")
def bench() -> Workbench:
    labels = LabelPack(Label(FeatureRef(GROUP, LAYER, n), LABEL) for n in range(1024))
    return Workbench(qsl.load_model("mini-qwen3"), qsl.find_group(GROUP), labels)


@pytest.fixture(scope="module")
def address(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import uvicorn

    texts, out = list(heldout("prose", "en"))[:6], tmp_path_factory.mktemp("app") / "site"
    site = site_of_documents(texts, bench.model, GROUP, [LAYER], out)
    web = make_web_app(bench, [LAYER], site)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(web, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


def field(page: Any, name: str) -> Any:
    return page.locator(f"#{name} textarea, #{name} input").first


def opened(page: Any, address: str) -> Any:
    page.set_default_timeout(SLOW)
    page.goto(address)
    expect(page.locator("#about")).to_contain_text("Promotes", timeout=SLOW)
    return page


def choose(page: Any, feature: int) -> None:
    field(page, "chosen").fill(f"{GROUP}/{LAYER}/{feature}")
    field(page, "chosen").press("Enter")


def add_edit(page: Any, feature: int, strength: str) -> None:
    page.get_by_role("tab", name="Steer").click()
    page.get_by_role("radio", name="Custom").check()  # else a preset follows the chosen feature
    choose(page, feature)
    field(page, "strength").fill(strength)
    field(page, "strength").press("Tab")
    page.locator("#add-edit").click()
    row = page.locator("#plan-table").get_by_role("row").last
    expect(row).to_contain_text(f"{GROUP}/{LAYER}/{feature}", timeout=SLOW)
    expect(row.get_by_role("gridcell").nth(2)).to_have_text(strength)


def upload(page: Any, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#load").click()
    chooser.value.set_files(file)


def generate(page: Any, prompt: str, expected: tuple[str, str]) -> None:
    """Click on Generate and wait for the two texts that are expected of it."""
    field(page, "prompt").fill(prompt)
    field(page, "new-tokens").fill("20")
    field(page, "new-tokens").press("Tab")
    page.locator("#steer-go").click()
    for name, text in zip(("plain", "steered"), expected, strict=True):
        expect(field(page, name)).to_have_value(text, timeout=SLOW)
    expect(page.locator("#status")).to_contain_text("perplexity", timeout=SLOW)


def directly(bench: Workbench, prompt: str, feature: int, strength: str) -> tuple[str, str]:
    """The same without a browser."""
    plan = Plan(f"{GROUP}/{LAYER}/{feature}:add:{strength}typical")
    *_, end = run_steering(bench, prompt, plan, Sampling(20))
    assert isinstance(end, Outcome)
    return end.plain, end.steered


def strongest(bench: Workbench, text: str) -> int:
    reading = bench.read(text, [LAYER])
    [found] = reading.strongest(LAYER, range(1, len(reading.token_ids)), 1)
    return found.ref.feature


def test_read_compare_and_steer(
    bench: Workbench, address: str, browser: Browser, tmp_path: Path
) -> None:
    with browser.page(width=1360, height=1000) as page:
        opened(page, address)
        page.locator("#read-go").click()
        table = page.locator("#read-table")
        expect(table).to_contain_text(f"{GROUP}/{LAYER}/", timeout=SLOW)
        expect(table).to_contain_text(LABEL)  # as text: nothing of it ran
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-go").click()
        line = page.locator("#compare-table").get_by_role("gridcell").first
        expect(line).to_be_visible(timeout=SLOW)
        ref = line.inner_text().strip()
        line.click()
        expect(field(page, "chosen")).to_have_value(ref, timeout=SLOW)
        link = page.locator("#about a")
        expect(link).to_have_attribute("href", f"/features/index.html#{ref}", timeout=SLOW)
        feature = int(ref.rpartition("/")[2])
        add_edit(page, feature, "3")
        plain, steered = directly(bench, "The kernel", feature, "+3")
        assert plain
        assert steered != plain
        generate(page, "The kernel", (plain, steered))  # the click changed the output
        expect(page.locator("#report textarea")).to_have_value(re.compile("fired on"), timeout=SLOW)
        with page.expect_download() as download:
            page.locator("#save").click()
        saved = tmp_path / "plan.json"
        download.value.save_as(saved)
        plan = Plan.load(saved)
        assert [str(edit) for edit in plan.edits] == [f"{ref}:add:+3typical"]
        saved.write_text(json.dumps(json.loads(saved.read_text()) | {"version": 99}))
        upload(page, saved)
        expect(page.locator("#plan-refused")).to_contain_text("version 99", timeout=SLOW)
        expect(page.locator("#plan-table")).to_contain_text(ref)  # as it was
        page.locator("#clear").click()
        expect(page.locator("#plan-table")).not_to_contain_text(ref, timeout=SLOW)
        plan.save(saved)
        upload(page, saved)
        expect(page.locator("#plan-table")).to_contain_text(ref, timeout=SLOW)
        with page.context.expect_page() as other:
            link.click()
        expect(other.value.locator("#address")).to_have_text(ref, timeout=SLOW)


@contextmanager
def slowed(model: Any) -> Iterator[None]:
    """A tenth of a second a token, as a large model takes: time enough to press Stop."""
    handle = unwrap(model).register_forward_pre_hook(lambda module, args: time.sleep(0.1))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.slow
def test_two_visitors_do_not_mix_and_each_stops_its_own(
    bench: Workbench, address: str, browser: Browser
) -> None:
    texts = ("内核从磁盘读取文件", "Die Paketverwaltung installiert es")
    features = [strongest(bench, text) for text in texts]
    assert features[0] != features[1]
    with browser.page() as one, browser.page() as other:
        for page, feature in ((one, features[0]), (other, features[1])):
            opened(page, address)
            add_edit(page, feature, "4")
        for page, mine, theirs in ((one, *features), (other, *reversed(features))):
            expect(page.locator("#plan-table")).to_contain_text(f"/{LAYER}/{mine}")
            expect(page.locator("#plan-table")).not_to_contain_text(f"/{LAYER}/{theirs}")
        for page, feature in ((one, features[0]), (other, features[1])):
            plain, steered = directly(bench, "The kernel", feature, "+4")
            assert steered != plain
            generate(page, "The kernel", (plain, steered))
        field(one, "new-tokens").fill("300")
        field(one, "new-tokens").press("Tab")
        with slowed(bench.model):
            one.locator("#steer-go").click()
            expect(one.locator("#status")).to_contain_text(" of 300 tokens", timeout=SLOW)
            other.locator("#steer-stop").dispatch_event("click")  # somebody else's Stop
            other.wait_for_timeout(500)
            expect(one.locator("#status")).to_contain_text(" of 300 tokens")
            one.locator("#steer-stop").dispatch_event("click")
            expect(one.locator("#status")).to_contain_text("Stopped after", timeout=SLOW)
        # The model is free again, and nothing of the stopped plan is left in it.
        generate(other, "A file", directly(bench, "A file", features[1], "+4"))
