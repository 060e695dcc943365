"""The page of the server in a real Chromium: nothing stale, side by side, plans, labels."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from playwright.sync_api import expect
from serving import GROUP, LABEL, Served

from qwen_scope_lens.labels import LabelPack
from qwen_scope_lens.serve.run import listen, make_server
from qwen_scope_lens.serve.site import Site
from qwen_scope_lens.serve.web import Serving, make_app
from qwen_scope_lens.site import build_site
from qwen_scope_lens.site.build import Sources
from qwen_scope_lens.steering import Plan
from qwen_scope_lens.stores import FeatureStore

pytestmark = pytest.mark.browser

FEATURE = f"{GROUP}/6/423"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def sheet(chromium: Browser) -> Iterator[Any]:
    """One page for all tests: a new one takes a second of a processor."""
    with chromium.page(permissions=["clipboard-read", "clipboard-write"]) as page:
        yield page


@pytest.fixture
def page(sheet: Any, browser: Browser) -> Any:
    sheet.unroute_all()  # of a test that failed
    sheet.goto("about:blank")  # another fragment alone would load nothing
    sheet.set_viewport_size({"width": 1280, "height": 900})
    return sheet


def opened(page: Any, served: Served, state: str = "") -> Any:
    page.goto(f"{served.url}/#{state}")
    expect(page.locator("#chosen-address")).to_be_visible()
    return page


def plain(strip: Any) -> str:
    """The text of tokens as the model wrote it, without what the page adds to be seen."""
    text: str = strip.evaluate(
        """strip => { const copy = strip.cloneNode(true);
           copy.querySelectorAll(".mark, .special").forEach(mark => mark.replaceWith(
             mark.textContent.startsWith("·") ? " ".repeat(mark.textContent.length) : ""));
           return copy.textContent }"""
    )
    return text


def refusals(browser: Browser, status: int) -> None:
    """What Chromium itself says of an answer that the test provoked, and nothing else."""
    expected = f"error: Failed to load resource: the server responded with a status of {status} "
    assert browser.complaints
    assert all(one.startswith(expected) for one in browser.complaints), browser.complaints
    browser.complaints.clear()


def test_the_first_screen_reads_and_nothing_stale_is_shown(served: Served, page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 900})
    opened(page, served)
    text = page.locator("#text").input_value()
    read = served.post("/api/read", text=text, layers=[4], top=50, all_tokens=True)
    best = max(
        (
            (value, feature)
            for piece, layers in zip(read["pieces"], read["tokens"], strict=True)
            if not piece["first"] and not piece["extreme"]
            for feature, value in layers["4"]
        ),
        key=lambda pair: pair[0],
    )[1]
    expect(page.locator("#chosen-address")).to_have_text(best)
    [track] = [one["track"] for one in read["features"]["4"] if one["feature"] == best]
    tokens = page.locator("#read-result .strip > span")
    hot = page.locator("#read-result .strip > .on")
    assert tokens.count() == len(track)
    assert hot.count() == sum(value > 0 for value in track)
    # Light and dark, and never wider than the window.
    grounds = set()
    for width, scheme in ((390, "dark"), (1280, "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        for tab in ("chat", "compare", "feature", "read"):
            page.locator(f"#tab-{tab}").dispatch_event("click")  # quicker than a real one
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    # The keyboard alone: a token, and what fires on it.
    tokens.first.focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    expect(tokens.nth(2)).to_have_attribute("aria-pressed", "true")
    rows = page.locator("#read-result .features .feature-button")
    strongest = max(read["tokens"][2]["4"], key=lambda pair: pair[1])[0]
    expect(rows.first).to_have_attribute("data-feature", strongest)
    # Where a feature is pointed at, the text has its colours, and after that those of before.
    other = page.locator(f"#chosen .feature-button:not([data-feature='{best}'])").first
    wanted = other.get_attribute("data-feature")
    other.hover()
    expect(page.locator("#read-result .caption b")).to_have_text("/".join(wanted.split("/")[2:]))
    page.mouse.move(0, 0)
    expect(page.locator("#read-result .caption b")).to_have_text("/".join(best.split("/")[2:]))
    # A feature of another layer is read, too; a changed text has no colour until it is read.
    page.locator("#search").fill(FEATURE)
    page.locator("#found .feature-button").first.click()
    expect(page.locator("#chosen-address")).to_have_text(FEATURE)
    monitor = served.post("/api/read", text=text, layers=[4], top=1, monitor=[FEATURE])
    expect(hot).to_have_count(sum(value > 0 for value in monitor["monitor"][0]["track"]))
    expect(page.locator("#read-result .caption")).to_contain_text("6/423")
    held: list[Any] = []
    page.route("**/api/read", lambda route: held.append(route))
    page.locator("#text").fill("A file")
    expect(tokens).to_have_count(0)
    expect(page.locator("#read-result .features li")).to_have_count(0)
    deadline = time.monotonic() + 10
    while not held and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    held[0].continue_()
    page.unroute("**/api/read")
    expect(tokens.first).to_be_visible()
    assert plain(page.locator("#read-result .strip")) == "A file"


def test_steered_beside_unsteered(served: Served, page: Any) -> None:
    opened(page, served, f"feature={FEATURE}&layer=6&say=The+kernel&tokens=10&tab=chat")
    page.locator("#steer-it").click()
    slider = page.get_by_role("slider", name="Strength of 6/423 in typical activations")
    slider.fill("3")
    expect(page.locator("#edits .means")).to_contain_text("raw")
    page.locator("#say").press("Enter")
    verdict = page.locator(".compared b")
    expect(verdict).to_be_visible()
    expect(page.locator(".compared")).to_contain_text("perplexity")
    expect(page.locator("#outdated")).to_be_hidden()
    asked = {
        "model": "mini-qwen3",
        "messages": [{"role": "user", "content": "The kernel"}],
        "enable_thinking": False,
        "max_tokens": 10,
        "temperature": 0,
        "seed": 0,
        "monitor": [FEATURE],
    }
    edits = [{"ref": FEATURE, "op": "add", "strength": 3, "unit": "typical"}]
    strips = {}
    for name, plan in (("plain", None), ("steered", {"edits": edits})):
        answer = served.post("/v1/chat/completions", **asked, plan=plan)["choices"][0]
        strips[name] = page.locator(f".reply.{name} .strip").last
        assert plain(strips[name]) == answer["message"]["content"]
        fires = [one["monitor"][FEATURE] > 0 for one in answer["qsl"]["tokens"]]
        assert strips[name].locator(".on").count() == sum(fires)
    assert plain(strips["plain"]) != plain(strips["steered"])
    assert strips["steered"].locator(".differs").count() > 0
    expect(page.locator(".reply.steered .report")).to_contain_text(f"{FEATURE}:add:+3typical")
    # A token tells what fires on it, and what else was probable.
    strips["steered"].locator("span").nth(1).click()
    expect(page.locator(".reply.steered .firing")).to_contain_text("Most probable here")
    # The slider answers once more; in another layer the same replies are read again.
    before = plain(strips["steered"])
    slider.fill("1")
    expect(page.locator(".reply.steered .report")).to_contain_text(":add:+1typical")
    expect(verdict).to_be_visible()
    assert plain(strips["steered"]) != before
    unread = page.locator(".reply.steered .strip .on")
    assert unread.count() > 0
    said = [plain(strips[name]) for name in strips]
    differing = strips["steered"].locator(".differs").count()
    page.locator("#layers").select_option("4")
    caption = page.locator(".reply.steered .caption b")
    expect(caption).to_contain_text("4/")
    expect(page.locator(".reply.steered .caption")).not_to_contain_text("not computed")
    expect(page.locator("#outdated")).to_be_hidden()
    expect(strips["steered"].locator(".differs")).to_have_count(differing)
    assert [plain(strips[name]) for name in strips] == said


@pytest.mark.slow
def test_plans_are_kept_shared_and_refused_in_words(
    served: Served, page: Any, browser: Browser, tmp_path: Path
) -> None:
    saved, row = tmp_path / "plan.json", "#edits > li"

    def give(page: Any) -> None:
        with page.expect_file_chooser() as chooser:
            page.locator("#plan-import").click()
        chooser.value.set_files(saved)

    opened(page, served, f"feature={FEATURE}&text=A+kernel")
    page.locator("#steer-it").click()
    page.get_by_label("Where 6/423 acts").fill("generation,class=han")
    page.get_by_label("Where 6/423 acts").press("Tab")
    expect(page.locator("#plan-export")).to_be_enabled()
    with page.expect_download() as download:
        page.locator("#plan-export").click()
    download.value.save_as(saved)
    text = f"{FEATURE}:add:+2typical@generation,class=han"
    assert [str(edit) for edit in Plan.load(saved).edits] == [text]
    page.locator("summary", has_text="Saved plans").click()
    page.locator("#plan-name").fill("kept-here")
    page.locator("#plan-save").click()
    expect(page.locator("#plan-says")).to_contain_text("Saved as kept-here")
    assert "kept-here" in [one["name"] for one in served.http.get("/api/plans").json()["plans"]]
    page.locator("#plan-link").click()
    expect(page.locator("#plan-says")).to_contain_text("Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    # What is not a plan is refused in words, and the plan stays as it was.
    good = json.loads(saved.read_text())
    saved.write_text(json.dumps(good | {"version": 99}))
    give(page)
    expect(page.locator("#plan-says [role=alert]")).to_contain_text("of version 99")
    assert browser.complaints == []
    saved.write_text(json.dumps(good | {"edits": [{"ref": HOSTILE}]}))
    give(page)
    expect(page.locator("#plan-says [role=alert]")).to_contain_text("<img")
    refusals(browser, 400)
    expect(page.locator(row)).to_have_count(1)
    page.locator("#plan-clear").click()
    expect(page.locator(row)).to_have_count(0)
    page.locator("#plans").select_option("kept-here")
    expect(page.locator(row)).to_have_count(1)
    page.locator("#plan-delete").click()
    expect(page.locator("#plan-says")).to_contain_text("Deleted")
    # The address has all of it, for somebody else.
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator("#chosen-address")).to_have_text(FEATURE)
    assert page.locator("#text").input_value() == "A kernel"
    expect(page.get_by_label("Where 6/423 acts")).to_have_value("generation,class=han")
    page.goto("about:blank")
    page.goto(f"{served.url}/#edit={HOSTILE}&feature={HOSTILE}&text={HOSTILE}")
    expect(page.locator("#plan-says [role=alert]")).to_contain_text("plan of this address")
    expect(page.locator("#chosen [role=alert]")).to_contain_text(HOSTILE)
    expect(page.locator("#read-result .strip")).to_be_visible()
    assert plain(page.locator("#read-result .strip")) == HOSTILE
    assert page.locator("main img").count() == 0
    refusals(browser, 400)


@pytest.mark.slow
def test_compare_find_and_label(served: Served, page: Any) -> None:
    opened(page, served, "tab=compare&layer=6")
    page.locator("#compare-go").click()
    lines = page.locator("#compare-table tbody .feature-button")
    expect(lines.first).to_be_visible()
    ref = lines.nth(1).get_attribute("data-feature")
    lines.nth(1).click()
    expect(page.locator("#chosen-address")).to_have_text(ref)
    expect(page.locator("#result-b .caption")).to_contain_text(ref.split("/")[-1])
    # A feature that was found in another layer is read for both texts.
    page.mouse.move(0, 0)  # off the line, which colours the texts while the pointer rests on it
    page.goto(f"{served.url}/#{GROUP}/4/36")
    for side in ("a", "b"):
        expect(page.locator(f"#result-{side} .caption")).to_contain_text("tokens")
        expect(page.locator(f"#result-{side} .caption b")).to_have_text("4/36")
    page.locator("#leave input").nth(1).check()  # the table is of the old choice: it goes
    expect(page.locator("#compare-table")).to_be_hidden()
    # By label, by token, by sentence. A label is text.
    page.keyboard.press("/")
    found = page.locator("#found")
    for query, heading in (("installing", "By label"), ("kernel", "By token")):
        page.locator("#search").fill(query)
        expect(found.locator("h3", has_text=heading)).to_be_visible()
        if query == "installing":
            expect(found).to_contain_text(LABEL)
    page.locator("#search").fill("The kernel reads a file")
    expect(found).to_contain_text("Fires on this sentence")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(found).to_be_hidden()
    ref = page.locator("#chosen-address").inner_text()
    try:
        page.locator("#label-text").fill(HOSTILE)
        page.locator("#label-save").click()
        expect(page.locator("#chosen")).to_contain_text("Saved")
        page.locator("#tab-feature").click()
        expect(page.locator("#label")).to_contain_text(HOSTILE)
        with page.expect_download() as download:
            page.locator("#labels-export").click()
        pack = LabelPack.read(download.value.path())
        assert {str(one.ref): one.text for one in pack.values()}[ref] == HOSTILE
        assert page.locator("main img, main script").count() == 0
    finally:
        served.http.put(f"/api/labels/{ref}", json={"text": ""})


@pytest.fixture(scope="module")
def with_site(
    served: Served, small_store: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The same model behind a token, and with a site."""
    folder = tmp_path_factory.mktemp("serve-site") / "site"
    site: Future[Site] = Future()
    site.set_result(Site(build_site(Sources(small_store, (6,)), folder)))
    listening = listen("127.0.0.1", 0)
    server = make_server(make_app(Serving(served.lens, site=site, token="secret-token")))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


def test_a_feature_has_the_page_of_the_site_behind_the_token(
    with_site: str, page: Any, browser: Browser
) -> None:
    page.goto(with_site)
    expect(page.get_by_text("This server wants its token")).to_be_visible()
    refusals(browser, 401)
    page.goto("about:blank")
    page.goto(f"{with_site}#token=secret-token&feature={FEATURE}&layer=6&tab=feature")
    expect(page.locator("#feature-page .passage").first).to_be_visible()
    assert "secret" not in page.url
    expect(page.locator("#feature-page")).to_contain_text("Fires together with")
    similar = (
        page.locator("#feature-page a", has_text="")
        .filter(has=page.locator("xpath=self::*[starts-with(@href, '#')]"))
        .first
    )
    wanted = similar.get_attribute("href").removeprefix("#")
    similar.click()
    expect(page.locator("#chosen-address")).to_have_text(wanted)
    page.go_back()
    expect(page.locator("#chosen-address")).to_have_text(FEATURE)
    link = page.locator("#site-link")
    expect(link).to_have_attribute("href", f"/site/index.html#{FEATURE}")


@contextmanager
def slowed(model: Any) -> Iterator[None]:
    """A twentieth of a second per step, as a large model takes: time enough to press Stop."""
    handle = model.register_forward_pre_hook(lambda module, args: time.sleep(0.05))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.slow
def test_visitors_do_not_mix_and_each_stops_its_own(
    served: Served, page: Any, browser: Browser
) -> None:
    one = page
    with browser.page() as other:
        state = f"layer=6&feature={FEATURE}&tab=chat&tokens=300&say=The+kernel"
        opened(one, served, state)
        opened(other, served, state.replace("300", "12"))
        one.locator("#steer-it").click()
        expect(one.locator("#edits > li")).to_have_count(1)
        expect(other.locator("#edits > li")).to_have_count(0)
        with slowed(served.lens.model):
            for visitor in (one, other):
                visitor.locator("#send").click()
            expect(one.locator(".reply.steered .strip").last.locator("span").first).to_be_visible()
            one.locator("#stop").click()
            expect(one.locator(".reply.steered h3")).to_contain_text("stopped")
            expect(one.locator("#stop")).to_be_disabled()
        expect(other.locator(".reply.plain h3")).not_to_contain_text(" of 12 tokens")
        alone = served.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "The kernel"}],
            enable_thinking=False,
            max_tokens=12,
            temperature=0,
        )
        said = alone["choices"][0]["message"]["content"]
        assert plain(other.locator(".reply.plain .strip").last) == said
        assert other.locator(".reply.steered").count() == 0
