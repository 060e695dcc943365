"""The site in a real Chromium: from disk and served, searched, walked through, hostile texts."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from dash_site import ARABIC, HOSTILE, HOSTILE_LABEL, read_data, small_labels
from feature_stores import GROUP, LAYER
from playwright.sync_api import expect

from qwen_scope_lens.labels import LabelPack
from qwen_scope_lens.site import build_site, make_server
from qwen_scope_lens.site.build import Sources
from qwen_scope_lens.steering import Plan
from qwen_scope_lens.stores import FeatureStore

pytestmark = pytest.mark.browser

REF = f"{GROUP}/{LAYER}"
FOLDER = "mini-qwen3_w1k-l0-16_6"


@pytest.fixture(scope="module")
def site(small_store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a site & <its> folder")
    labels = LabelPack.read(small_labels(folder / "labels.jsonl", 3, 4))
    sources = Sources(small_store, (2, LAYER), labels=labels)
    return build_site(sources, folder / "site", title=HOSTILE[0])


def address(site: Path, path: str = "") -> str:
    return (site / "index.html").as_uri() + (f"#{path}" if path else "")


def strongest_on(site: Path, document: int) -> int:
    """A feature with an example from a document."""
    for number in range(8):
        for i, page in enumerate(read_data(site, f"{FOLDER}/block-{number:04d}")):
            if any(example["d"] == document for example in page["top"]):
                return 128 * number + i
    raise AssertionError(f"no feature has an example from document {document}")


def test_the_list_searches_sorts_and_opens(site: Path, browser: Browser) -> None:
    index = read_data(site, f"{FOLDER}/index")
    alive = [f for f, count in enumerate(index["count"]) if count]
    with browser.page() as page:
        page.goto(address(site, REF))
        rows = page.locator("table.list tbody tr")
        rows.first.wait_for()
        assert page.locator("[role=status]").inner_text() == f"{len(alive):,} features"
        assert page.locator("h1").inner_text() == " ".join(HOSTILE[0].split())
        by_density = sorted(alive, key=lambda f: (-index["count"][f], f))
        shown = [int(row.get_attribute("data-feature")) for row in rows.all()[:5]]
        assert shown == by_density[:5]
        page.get_by_role("button", name="Strongest").click()
        by_maximum = sorted(alive, key=lambda f: (-index["maximum"][f], f))
        assert int(rows.first.get_attribute("data-feature")) == by_maximum[0]
        # By label, by token, by number.
        page.keyboard.press("/")
        page.keyboard.type("to search for")
        assert [row.get_attribute("data-feature") for row in rows.all()] == ["3"]
        token = index["words"][index["peaks"][alive[0]][0]].strip().lower()
        page.locator("#search").fill(token)
        expect(rows.first).to_be_visible()
        found = {int(row.get_attribute("data-feature")) for row in rows.all()}
        expected = {
            f
            for f in alive
            if any(
                token in index["words"][w].lower() for w in index["peaks"][f] + index["promoted"][f]
            )
        }
        assert found <= expected | {3, 4}
        assert alive[0] in expected
        page.locator("#search").fill(str(alive[7]))
        assert int(rows.first.get_attribute("data-feature")) == alive[7]
        page.keyboard.press("Enter")
        page.wait_for_selector("#address")
        assert page.locator("#address").inner_text() == f"{REF}/{alive[7]}"
        page.go_back()
        rows.first.wait_for()
        assert page.locator("#search").input_value() == str(alive[7])


def test_a_search_says_what_is_not_there_and_reads_all_layers(site: Path, browser: Browser) -> None:
    index, other = (read_data(site, f"mini-qwen3_w1k-l0-16_{n}/index") for n in (LAYER, 2))
    with browser.page() as page:
        page.goto(address(site, REF))
        more, elsewhere = page.locator("button.more"), page.locator("#elsewhere")
        expect(more).to_be_visible()
        expect(page.locator(".scale")).to_contain_text("logarithmic")
        expect(elsewhere).to_be_hidden()
        page.locator("#search").fill("nowhere to be found")
        expect(page.locator("#nothing")).to_contain_text("Nothing found in this layer")
        expect(elsewhere).to_contain_text("Nothing found there either")
        for part in (more, page.locator("table.list"), page.locator(".scale")):
            expect(part).to_be_hidden()
        page.get_by_role("button", name="Clear the search").click()
        expect(more).to_be_visible()
        more.click()
        rows = page.locator("table.list tbody tr")
        assert rows.count() == 300
        page.locator("#search").fill("a label to search for")
        expect(rows).to_have_count(1)
        expect(more).to_be_hidden()
        # A token that only the other layer's lists have leads there.
        shown = [
            {at["words"][w].strip().lower() for row in at["peaks"] + at["promoted"] for w in row}
            for at in (index, other)
        ]
        only = next(
            word
            for word in sorted(shown[1])
            if word.isalpha() and len(word) > 3 and not any(word in here for here in shown[0])
        )
        page.locator("#search").fill(only)
        expect(page.locator("#nothing")).to_be_visible()
        expect(elsewhere).to_contain_text("Found in 1 of 1 other layers")
        elsewhere.get_by_role("link", name=f"{GROUP}/2", exact=True).click()
        expect(page.locator("#layers")).to_have_value(f"{GROUP}/2")
        expect(rows.first).to_be_visible()
        assert page.locator("#search").input_value() == only


@pytest.mark.slow
def test_a_reader_takes_a_feature_along(site: Path, browser: Browser, tmp_path: Path) -> None:
    content = read_data(site, f"{FOLDER}/block-0000")[3]
    ref = f"{REF}/3"
    with browser.page(permissions=["clipboard-read", "clipboard-write"]) as page:
        page.goto(address(site, ref))
        page.locator("#copy-plan").click()
        expect(page.locator("#taken")).to_contain_text("--plan plan.json")
        (tmp_path / "plan.json").write_text(page.evaluate("navigator.clipboard.readText()"))
        [edit] = Plan.load(tmp_path / "plan.json").edits
        assert (str(edit.ref), edit.op, edit.value) == (ref, "add", content["mean"])
        texts = []
        for kind in ("JSON", "CSV"):
            with page.expect_download() as download:
                page.get_by_role("button", name=f"Download {kind}").click()
            path = tmp_path / download.value.suggested_filename
            download.value.save_as(path)
            texts.append(path.read_text("utf-8"))
        whole = json.loads(texts[0])
        assert whole["address"] == ref
        assert whole["label"]["text"] == "a label to search for"
        assert whole["activation"]["maximum"] == content["maximum"]
        near = [row["address"] for row in whole["similar"]]
        assert near[:8] == [f"{REF}/{f}" for f, _ in content["nearest"]]
        assert near[8:] == [f"{other}/{f}" for other, f, _ in content["across"]]
        rows = list(csv.DictReader(texts[1].splitlines(keepends=True)))
        assert len(rows) == len(whole["examples"]) == page.locator(".passage").count()
        assert [row["text"] for row in rows] == [row["text"] for row in whole["examples"]]
        page.get_by_role("link", name="layer 2, ").first.click()
        expect(page.locator("#address")).to_have_text(near[8])


@pytest.mark.slow
def test_the_whole_document_of_an_example(
    site: Path, small_store: FeatureStore, browser: Browser
) -> None:
    texts = small_store.documents(["text"])["text"].to_pylist()
    with browser.page() as page:
        page.goto(address(site, f"{REF}/3"))
        page.wait_for_selector(".passage")
        examples = read_data(site, f"{FOLDER}/block-0000")[3]["top"]
        assert any(e["c"] != [0, len(texts[e["d"]])] for e in examples[:4])
        for i, example in enumerate(examples[:4]):
            block = page.locator(".example").nth(i)
            before = block.locator(".passage").text_content()
            block.get_by_role("button", name="whole document").click()
            start, end = example["c"]
            text = texts[example["d"]]
            assert "".join(example["t"]) == text[start:end]
            if (start, end) == (0, len(text)):
                expect(block.get_by_text("this is the whole document")).to_be_visible()
                continue
            expect(block.locator(".rest").first).to_be_attached()
            parts = block.locator(".rest").all_text_contents()
            plain = [part.replace("↵", "") for part in parts]
            assert plain == [text[:start], text[end:]]
            block.get_by_role("button", name="only the passage").click()
            assert block.locator(".passage").text_content() == before


def test_a_feature_page_shows_its_examples(site: Path, browser: Browser) -> None:
    with browser.page() as page:
        page.goto(address(site, f"{REF}/3"))  # a deep link, from disk
        page.wait_for_selector(".passage")
        content = read_data(site, f"{FOLDER}/block-0000")[3]
        assert page.locator("#label").inner_text() == "3 · a label to search for"
        passages = page.locator(".passage")
        n_shown = len(content["top"]) + sum(len(group) for _, group in content["quantiles"])
        assert passages.count() == n_shown
        first = content["top"][0]
        marked = passages.first.locator(".on")
        assert marked.count() == len(first["on"])
        assert first["t"][first["at"]].strip("\n") in passages.first.locator(".peak").text_content()
        colours = passages.first.locator(".peak").evaluate(
            "e => getComputedStyle(e).backgroundColor"
        )
        assert "0)" not in colours.replace(" ", "")[-3:]
        for text in ("Promotes", "Suppresses", "How strongly it fires", "Fires on, by lang"):
            assert page.get_by_text(text, exact=True).first.is_visible(), text
        for text in ("Similar features of this layer", "Fires together with", "Weights in the SAE"):
            assert page.get_by_text(text, exact=True).first.is_visible(), text
        page.locator("a", has_text=str(content["nearest"][0][0])).first.click()
        expect(page.locator("#address")).to_have_text(f"{REF}/{content['nearest'][0][0]}")


@pytest.mark.slow
def test_keyboard_alone(site: Path, browser: Browser) -> None:
    with browser.page() as page:
        page.goto(address(site, REF))
        page.wait_for_selector("table.list tbody tr")
        for key in ("j", "j", "ArrowDown", "k", "Enter"):
            page.keyboard.press(key)
        page.wait_for_selector("#address")
        second = page.locator("#address").inner_text()
        page.keyboard.press("n")
        expect(page.locator("#address")).not_to_have_text(second)
        page.keyboard.press("p")
        expect(page.locator("#address")).to_have_text(second)
        page.keyboard.press("Escape")
        page.wait_for_selector("table.list tr.here")
        assert f"{REF}/{page.locator('tr.here').get_attribute('data-feature')}" == second
        page.keyboard.press("[")
        expect(page.locator("#layers")).to_have_value(f"{GROUP}/2")
        page.keyboard.press("?")
        assert page.locator("#keys").get_by_text("next feature").is_visible()


def test_hostile_documents_are_shown_and_do_nothing(site: Path, browser: Browser) -> None:
    keys = read_data(site, "site")
    assert keys["title"] == HOSTILE[0]
    first = 20  # documents before the hostile ones
    with browser.page() as page:
        page.add_init_script("window.alert = text => { throw new Error('alert ' + text) }")
        for number in range(len(HOSTILE)):
            feature = strongest_on(site, first + number)
            page.goto(address(site, f"{REF}/{feature}"))
            page.wait_for_selector(".passage")
            content = read_data(site, f"{FOLDER}/block-{feature // 128:04d}")[feature % 128]
            place = next(i for i, e in enumerate(content["top"]) if e["d"] == first + number)
            block = page.locator(".example").nth(place)
            assert block.get_by_text(f"<i>{number}</i>", exact=True).count() == 1
            assert block.get_by_text("</script><b>", exact=True).count() == 1
            text = block.locator(".passage").text_content()
            plain = "".join(content["top"][place]["t"])
            for mark in ("<script>", "onerror", "javascript:", "${7*7}"):
                assert (mark in text) == (mark in plain)
            assert page.title() == f"{REF}/{feature}"
            assert (
                page.locator("main script, main img, main svg a, main iframe, main b b").count()
                == 0
            )
        page.goto(address(site, f"{REF}/4"))
        page.wait_for_selector("#label")
        assert HOSTILE_LABEL.split(" ")[0] in page.locator("#label").text_content()
        page.goto(address(site, f"{REF}?q=%3Cscript%3Ealert(9)%3C/script%3E"))
        page.wait_for_selector("[role=status]")
        page.goto(address(site, "<img src=x onerror=alert(10)>/1"))
        page.get_by_text("No such feature").wait_for()


@pytest.mark.slow
def test_right_to_left_text_reads_from_the_right(site: Path, browser: Browser) -> None:
    feature = strongest_on(site, 24)
    with browser.page() as page:
        page.goto(address(site, f"{REF}/{feature}"))
        page.wait_for_selector(".passage")
        texts = page.locator(".passage").all()
        mine = next(p for p in texts if any(w in p.text_content() for w in ARABIC.split()))
        assert mine.get_attribute("dir") == "auto"
        assert mine.evaluate("e => getComputedStyle(e).unicodeBidi") == "plaintext"


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (360, "dark"),
        (1280, "light"),
        pytest.param(360, "light", marks=pytest.mark.slow),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
    ],
)
def test_light_and_dark_narrow_and_wide(
    site: Path, browser: Browser, scheme: Any, width: int
) -> None:
    with browser.page(width=width, color_scheme=scheme) as page:
        for path in (REF, f"{REF}/3"):
            page.goto(address(site, path))
            page.wait_for_selector("h1")
            overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert overflow <= 0, f"{path} is wider than the window by {overflow}"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(int(part) for part in ground.strip("rgb()").split(",")) < 3 * 128
        assert dark == (scheme == "dark")
        page.keyboard.press("t")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
        page.emulate_media(media="print")
        assert not page.locator("header.bar").is_visible()


@pytest.mark.slow
def test_served_it_is_the_same(site: Path, browser: Browser) -> None:
    with make_server(site, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browser.page() as page:
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/#{REF}/3")
            page.wait_for_selector(".passage")
            page.keyboard.press("Escape")
            page.wait_for_selector("table.list tbody tr")
        server.shutdown()


def test_an_incomplete_site_says_so(site: Path, browser: Browser, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    (copy / "data" / FOLDER / "block-0000.js").unlink()
    with browser.page() as page:
        page.goto(address(copy, f"{REF}/3"))
        page.get_by_text("This cannot be shown").wait_for()
        page.get_by_text("is the site complete?").wait_for()
    assert all("ERR_FILE_NOT_FOUND" in complaint for complaint in browser.complaints)
    browser.complaints.clear()
