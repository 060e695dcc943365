"""The static site, its server and the Neuronpedia export: what they say, against the store."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dash_site import HOSTILE_LABEL, read_data, small_labels
from feature_stores import GROUP, LAYER, build_store
from tiny_models import make_model, make_tokenizer

import qwen_scope_lens as qsl
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadFile, CannotWrite, StoreMismatch
from qwen_scope_lens.labels import LabelPack
from qwen_scope_lens.models import Vocabulary
from qwen_scope_lens.site import make_server
from qwen_scope_lens.site.build import Sources
from qwen_scope_lens.site.data_files import deliver
from qwen_scope_lens.site.earlier import EarlierSite
from qwen_scope_lens.site.neuronpedia import neuronpedia_id
from qwen_scope_lens.site.static import VIEWER
from qwen_scope_lens.stores import FeatureStore

FOLDER = "mini-qwen3_w1k-l0-16_6"


@pytest.fixture(scope="module")
def store(small_store: FeatureStore) -> FeatureStore:
    return small_store


@pytest.fixture(scope="module")
def frequent(store: FeatureStore) -> list[int]:
    """Features of the layer, those that fire on most tokens first."""
    counts = np.zeros(1024)
    for block in store.iter_blocks(LAYER, keep=True):
        counts += block.codes.to_dense().gt(0).sum(0).numpy()
    return np.argsort(-counts, kind="stable").tolist()


@pytest.fixture(scope="module")
def site(store: FeatureStore, frequent: list[int]) -> Path:
    labels = small_labels(store.path.parent / "labels.jsonl", frequent[0], frequent[1])
    out = store.path.parent / "site"
    command = ["dash", "build", str(store.path), "--layers", "2,6", "--labels", str(labels)]
    assert main([*command, "--out", str(out), "--title", "A </title> test"]) == 0
    return out


def page_of(site: Path, feature: int) -> dict[str, Any]:
    return read_data(site, f"{FOLDER}/block-{feature // 128:04d}")[feature % 128]


def test_every_data_file_is_one_call_and_no_text(site: Path) -> None:
    files = sorted(p.relative_to(site / "data") for p in (site / "data").rglob("*.js"))
    [documents] = {p.parent for p in files if p.parent.name.startswith("documents-")}
    assert len(files) == 1 + 2 * (1 + 1024 // 128) + len(
        list((site / "data" / documents).iterdir())
    )
    for path in files:
        read_data(site, str(path.with_suffix("")))
    facts = read_data(site, "site")
    assert [layer["ref"] for layer in facts["layers"]] == [f"{GROUP}/2", f"{GROUP}/6"]
    assert facts["title"] == "A </title> test"


def test_the_viewer_never_makes_markup_of_text(site: Path) -> None:
    """And it is delivered whole: what index.html names is there."""
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|srcdoc"
        r"|https?://(?!www\.w3\.org/2000/svg)"
    )
    for name in VIEWER:
        text = (site / name).read_text("utf-8")
        assert not re.search(forbidden, text), name
    index = (site / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="([\w.]+)"', index)) == set(VIEWER) - {"index.html"}
    assert "default-src 'none'" in index
    assert not re.search(r"<script>|style=|\son\w+=", index)


def test_pages_say_what_the_store_says(
    site: Path, store: FeatureStore, frequent: list[int]
) -> None:
    index = read_data(site, f"{FOLDER}/index")
    kept = sum(len(block.doc) for block in store.iter_blocks(LAYER, keep=True))
    lang = store.labels("lang")
    for feature in [*frequent[:3], frequent[200], frequent[-1]]:
        hits = store.by_feature((LAYER, feature))
        doc, position, value = (x[hits.keep] for x in (hits.doc, hits.position, hits.value))
        page = page_of(site, feature)
        assert page["tokens"] == index["count"][feature] == len(doc)
        assert page["documents"] == len(set(doc.tolist()))
        assert sum(page["histogram"]) == len(doc)
        if not len(doc):
            assert page["top"] == page["quantiles"] == []
            continue
        assert page["maximum"] == pytest.approx(value.max(), rel=1e-3)
        assert page["mean"] == pytest.approx(value.mean(), rel=1e-3)
        strongest = {int(d): value[doc == d].max() for d in set(doc.tolist())}
        expected = sorted(strongest.values(), reverse=True)[:12]
        assert [e["v"] for e in page["top"]] == pytest.approx(expected, rel=1e-3)
        for example in [*page["top"], *(e for _, group in page["quantiles"] for e in group)]:
            place = (doc == example["d"]) & (position == example["p"])
            assert example["v"] == pytest.approx(value[place][0], rel=1e-3)
            assert (
                page["from"][str(example["d"])][0]
                == store.documents(["key"])["key"][example["d"]].as_py()
            )
        [[name, rows]] = page["groups"]  # `n` tells documents apart and is left out
        assert name == "lang"
        fired = {kind: sum(lang[d] == kind for d in doc) for kind in set(lang)}
        assert {kind: count for kind, count, _ in rows} == fired
        assert sum(total for *_, total in rows) == kept


def test_passages_are_the_text_around_the_token(
    site: Path, store: FeatureStore, frequent: list[int]
) -> None:
    texts = store.documents(["text"])["text"].to_pylist()
    documents = [store.by_token(doc, LAYER) for doc in range(store.n_docs)]
    joined = 0
    for feature in frequent[:15]:
        for example in page_of(site, feature)["top"]:
            document, place = documents[example["d"]], example["p"]
            passage = "".join(example["t"])
            assert passage in texts[example["d"]] or "<0x" in passage or "\0" in passage
            start, end = document.spans[place]
            assert texts[example["d"]][start:end] in example["t"][example["at"]]
            first, last = max(0, place - 24), min(len(document), place + 11)
            joined += len(example["t"]) < last - first
            # What is marked is what fires there: the same values, those of one character joined.
            fires = document.codes.to_dense()[:, feature].numpy()
            here = fires[max(0, first - 3) : last + 3]
            marked = np.array([value for _, value in example["on"]])
            assert len(marked) <= (here > 0).sum()
            assert all(np.isclose(here, value, rtol=1e-3).any() for value in marked)
            assert marked.max() == pytest.approx(fires[first:last].max(), rel=1e-3)
            assert dict(map(tuple, example["on"]))[example["at"]] >= example["v"] * 0.999
    assert joined, "no character of several tokens was among these examples"


def test_promoted_tokens_are_those_of_the_model(site: Path, frequent: list[int]) -> None:
    model = qsl.load_model("mini-qwen3")
    sae = qsl.load_sae(f"{GROUP}/{LAYER}")
    inner = model.original_model
    assert len(frequent) >= 3
    for feature in frequent[:3]:
        with torch.no_grad():
            logits = model.unembed(inner.model.norm(sae.direction([feature]))[None])[0, 0]
        best = logits[: len(model.tokenizer)].topk(3).indices.tolist()
        shown = [token for token, _ in page_of(site, feature)["promoted"][:3]]
        # Bytes that are part of a character are `<0xA9>` on the site, as one mark in `decode`.
        plain = [re.sub("(<0x[0-9A-F]{2}>)+", "\ufffd", token) for token in shown]
        decoded = [model.tokenizer.decode([token]) for token in best]
        assert plain == [re.sub("\ufffd+", "\ufffd", token) for token in decoded]
        assert shown == [Vocabulary(model.tokenizer).text(token) for token in best]


def test_neighbours_and_geometry(site: Path, frequent: list[int]) -> None:
    sae = qsl.load_sae(f"{GROUP}/{LAYER}")
    unit = torch.nn.functional.normalize(sae.W_dec.double(), dim=-1)
    feature = frequent[0]
    cosines = unit @ unit[feature]
    cosines[feature] = -2
    page = page_of(site, feature)
    assert [f for f, _ in page["nearest"]] == cosines.topk(8).indices.tolist()
    other = torch.nn.functional.normalize(qsl.load_sae(f"{GROUP}/2").W_dec.double(), dim=-1)
    best = (other @ unit[feature]).topk(3)
    assert [(ref, f) for ref, f, _ in page["across"]] == [
        (f"{GROUP}/2", f) for f in best.indices.tolist()
    ]
    shown = [cosine for *_, cosine in page["across"]]
    assert shown == pytest.approx(best.values.tolist(), abs=6e-4)
    assert page["geometry"]["bias"] == pytest.approx(float(sae.b_enc[feature]), rel=1e-3)
    read, write = sae.encoder_row(feature), sae.direction(feature)
    assert page["geometry"]["cosine"] == pytest.approx(
        float(torch.nn.functional.cosine_similarity(read, write, dim=0)), rel=1e-3
    )


@pytest.mark.slow
def test_a_build_keeps_what_was_there_and_replaces_nothing_else(
    site: Path,
    store: FeatureStore,
    frequent: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    quick = ["dash", "build", str(store.path), "--no-tokens", "--examples", "1"]
    command = [*quick, "--layers", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "other files" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    out = tmp_path / "site"
    shutil.copytree(site, out)
    # Another layer and the labels that were there stay, and so does the title.
    assert main([*command, "--out", str(out)]) == 0
    assert f"kept from an earlier build: {GROUP}/6" in capsys.readouterr().err
    facts = read_data(out, "site")
    assert [layer["ref"] for layer in facts["layers"]] == [f"{GROUP}/2", f"{GROUP}/6"]
    assert facts["title"] == "A </title> test"
    block = read_data(out, "mini-qwen3_w1k-l0-16_2/block-0000")
    assert block[0]["promoted"] is None
    assert block[0]["across"] == []
    for name in ("index", "block-0000", "block-0007"):
        assert read_data(out, f"{FOLDER}/{name}") == read_data(site, f"{FOLDER}/{name}")
    one, two = frequent[:2]
    again = [*quick, "--layers", "6", "--out", str(out)]
    newer = small_labels(tmp_path / "newer.jsonl", one, frequent[2])
    newer.write_text(newer.read_text().replace("a label to search for", "a better label"))
    assert main([*again, "--labels", str(newer)]) == 0
    shown = read_data(out, f"{FOLDER}/index")["labels"]
    assert set(shown) == {str(one), str(two), str(frequent[2])}
    assert shown[str(one)] == "a better label"
    label = page_of(out, two)["label"]
    assert label == page_of(site, two)["label"]
    assert label["score"] == 0.75
    other = tmp_path / "of-another-model.jsonl"
    other.write_text('{"address": "mini-qwen3.5/w1k-l0-16/4/3", "text": "elsewhere"}\n')
    assert main([*again, "--labels", str(other)]) == 1  # also where old labels would fit
    assert "no feature has a label" in capsys.readouterr().err
    # --replace begins from nothing.
    assert main([*command, "--replace", "--no-texts", "--out", str(out)]) == 0
    assert [p.name for p in (out / "data").iterdir() if p.is_dir()] == ["mini-qwen3_w1k-l0-16_2"]


@pytest.mark.slow
def test_a_site_that_cannot_be_kept_is_not_touched(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    shutil.copytree(site, out)
    earlier = EarlierSite.read(out)
    assert earlier is not None
    with pytest.raises(StoreMismatch, match=r"pages of mini-qwen3,.*--replace"):
        earlier.check_model("Qwen3-8B")
    facts = read_data(out, "site")
    documents = facts["layers"][0]["documents_folder"]
    some = next((out / "data" / documents).glob("*.js")).stem
    for name in (f"{FOLDER}/index", f"{FOLDER}/block-0003", f"{documents}/{some}"):
        path = out / "data" / f"{name}.js"
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:200] + b"A" + whole[201:], None):
            if content is not None:
                path.write_bytes(content)
            elif name.startswith(FOLDER):
                path.unlink()
            else:
                continue  # which documents are there, only the pages know
            with pytest.raises(BadFile, match="--replace"):
                earlier.copy(list(earlier.layers), tmp_path / "new")
            assert not any((tmp_path / "new").rglob("*.js"))
        path.write_bytes(whole)
    for change in (
        {"version": 1},
        {"layers": [{"ref": "a/b/1", "folder": "../elsewhere"}]},
        {"layers": [facts["layers"][0] | {"documents_folder": "../../elsewhere"}]},
        {"layers": 3},
    ):
        deliver(out / "data", "site", facts | change)
        with pytest.raises(BadFile, match="--replace"):
            EarlierSite.read(out)
    (out / "data" / "site.js").write_text("alert(1)")
    with pytest.raises(BadFile, match="not one call"):
        EarlierSite.read(out)
    assert EarlierSite.read(tmp_path) is None


def test_what_does_not_belong_together_is_refused(
    store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "site")]
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model")]
    assert main(["dash", "build", str(store.path), *model, *out]) == 1
    assert "tokenizer" in capsys.readouterr().err
    assert main(["dash", "build", str(store.path), "--layers", "5", *out]) == 1
    assert "layer 5" in capsys.readouterr().err
    other = tmp_path / "labels.jsonl"
    other.write_text('{"address": "mini-qwen3/w1k-l0-16/4/3", "text": "elsewhere"}\n')
    with pytest.warns(UserWarning, match="no feature has a label"):  # layer 4 may come later
        Sources(store, (6,), labels=LabelPack.read(other)).check_labels()
    other.write_text('{"address": "mini-qwen3.5/w1k-l0-16/4/3", "text": "elsewhere"}\n')
    assert main(["dash", "build", str(store.path), "--labels", str(other), *out]) == 1
    assert "no feature has a label" in capsys.readouterr().err
    planted = build_store(tmp_path / "planted", [[{1: 2.0}] * 3])
    assert main(["dash", "build", str(planted.path), "--model", "mini-qwen3", *out]) == 1
    assert not (tmp_path / "site").exists()


@pytest.fixture
def server(site: Path) -> Iterator[int]:
    (site / "link.txt").symlink_to("/etc/hostname")
    os.mkfifo(site / "fifo.txt")
    with make_server(site, port=0) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running.server_address[1]
        running.shutdown()
    (site / "link.txt").unlink()
    (site / "fifo.txt").unlink()


def ask(port: int, path: str, host: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path, headers={"Host": host} if host else {})
    return connection.getresponse()


def test_the_server_gives_the_site_and_nothing_else(server: int, site: Path) -> None:
    answer = ask(server, "/")
    assert answer.status == 200
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert answer.read() == (site / "index.html").read_bytes()
    assert ask(server, "/data/site.js").getheader("Content-Type", "").startswith("text/javascript")
    for path in (
        "/data/",
        "/link.txt",
        "/fifo.txt",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/none",
    ):
        assert ask(server, path).status == 404, path
    assert ask(server, "/", host="attacker.example").status == 403
    assert ask(server, "/", host=f"localhost:{server}").status == 200


def test_serving_what_is_no_site(tmp_path: Path, server: int, site: Path) -> None:
    with pytest.raises(BadFile, match="qsl dash build"):
        make_server(tmp_path)
    with pytest.raises(CannotWrite, match="--port"):
        make_server(site, port=server)


# Neuronpedia's tables, from its schema: column -> (type, must be there).
TEXT, NUMBER, WHOLE, FLAG = str, (int, float), int, bool
TABLES: dict[str, dict[str, tuple[Any, bool]]] = {
    "release": {
        "name": (TEXT, True),
        "visibility": (TEXT, False),
        "description": (TEXT, True),
        "descriptionShort": (TEXT, False),
        "urls": ([TEXT], False),
        "creatorName": (TEXT, True),
        "creatorNameShort": (TEXT, False),
        "creatorEmail": (TEXT, False),
        "isNewUi": (FLAG, False),
        "featured": (FLAG, False),
        "creatorId": (TEXT, True),
        "createdAt": (TEXT, False),
        "defaultSourceSetName": (TEXT, False),
        "defaultSourceId": (TEXT, False),
        "defaultUmapSourceIds": ([TEXT], False),
    },
    "model": {
        "id": (TEXT, True),
        "displayName": (TEXT, False),
        "displayNameShort": (TEXT, False),
        "creatorId": (TEXT, True),
        "tlensId": (TEXT, False),
        "dimension": (WHOLE, False),
        "visibility": (TEXT, False),
        "instruct": (FLAG, False),
        "layers": (WHOLE, True),
        "neuronsPerLayer": (WHOLE, True),
        "owner": (TEXT, True),
        "website": (TEXT, False),
        "createdAt": (TEXT, False),
        "updatedAt": (TEXT, False),
        "inferenceEnabled": (FLAG, False),
    },
    "sourceset": {
        "modelId": (TEXT, True),
        "name": (TEXT, True),
        "hasDashboards": (FLAG, False),
        "allowInferenceSearch": (FLAG, False),
        "visibility": (TEXT, False),
        "description": (TEXT, True),
        "type": (TEXT, False),
        "creatorName": (TEXT, True),
        "urls": ([TEXT], False),
        "creatorId": (TEXT, True),
        "releaseName": (TEXT, False),
        "createdAt": (TEXT, False),
    },
    "source": {
        "id": (TEXT, True),
        "modelId": (TEXT, True),
        "setName": (TEXT, True),
        "hasDashboards": (FLAG, False),
        "inferenceEnabled": (FLAG, False),
        "saelensRelease": (TEXT, False),
        "saelensSaeId": (TEXT, False),
        "hfRepoId": (TEXT, False),
        "hfFolderId": (TEXT, False),
        "visibility": (TEXT, False),
        "creatorId": (TEXT, True),
        "num_prompts": (WHOLE, False),
        "num_tokens_in_prompt": (WHOLE, False),
        "dataset": (TEXT, False),
        "notes": (TEXT, False),
        "createdAt": (TEXT, False),
    },
    "features": {
        "modelId": (TEXT, True),
        "layer": (TEXT, True),
        "index": (TEXT, True),
        "sourceSetName": (TEXT, False),
        "creatorId": (TEXT, False),
        "createdAt": (TEXT, False),
        "maxActApprox": (NUMBER, False),
        "hasVector": (FLAG, False),
        "vector": ([NUMBER], False),
        "hookName": (TEXT, False),
        "topkCosSimIndices": ([WHOLE], False),
        "topkCosSimValues": ([NUMBER], False),
        "correlated_features_indices": ([WHOLE], False),
        "neg_str": ([TEXT], False),
        "neg_values": ([NUMBER], False),
        "pos_str": ([TEXT], False),
        "pos_values": ([NUMBER], False),
        "frac_nonzero": (NUMBER, False),
        "freq_hist_data_bar_heights": ([NUMBER], False),
        "freq_hist_data_bar_values": ([NUMBER], False),
    },
    "activations": {
        "id": (TEXT, True),
        "tokens": ([TEXT], True),
        "dataIndex": (TEXT, False),
        "index": (TEXT, True),
        "layer": (TEXT, True),
        "modelId": (TEXT, True),
        "maxValue": (NUMBER, True),
        "maxValueTokenIndex": (WHOLE, True),
        "minValue": (NUMBER, True),
        "values": ([NUMBER], True),
        "creatorId": (TEXT, True),
        "createdAt": (TEXT, False),
        "binMin": (NUMBER, False),
        "binMax": (NUMBER, False),
        "binContains": (NUMBER, False),
        "qualifyingTokenIndex": (WHOLE, False),
    },
    "explanations": {
        "id": (TEXT, True),
        "modelId": (TEXT, True),
        "layer": (TEXT, True),
        "index": (TEXT, True),
        "description": (TEXT, True),
        "authorId": (TEXT, True),
        "notes": (TEXT, False),
        "createdAt": (TEXT, False),
        "updatedAt": (TEXT, False),
    },
}


def check_row(table: str, row: dict[str, Any]) -> None:
    columns = TABLES[table]
    assert not set(row) - set(columns), f"{table} has no such column"
    for name, (kind, required) in columns.items():
        value = row.get(name)
        if value is None:
            assert not required, f"{table}.{name} is missing"
        elif isinstance(kind, list):
            assert all(isinstance(entry, kind[0]) for entry in value), f"{table}.{name}"
        else:
            assert isinstance(value, kind), f"{table}.{name}"
            assert isinstance(value, bool) == (kind is bool), f"{table}.{name}"
        assert "\\u0000" not in json.dumps(value)  # PostgreSQL takes no such text


def lines(path: Path) -> list[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_neuronpedia(store: FeatureStore, site: Path, frequent: list[int]) -> None:
    out = store.path.parent / "export"
    labels = str(store.path.parent / "labels.jsonl")
    command = ["dash", "export", str(store.path), "--format", "neuronpedia", "--layers", "6"]
    assert main([*command, "--labels", labels, "--out", str(out)]) == 0
    ref = qsl.LayerRef(GROUP, LAYER)
    assert neuronpedia_id(ref) == "mini-qwen3/6-mini-res-1k-l0-16"
    place = out / "v1" / neuronpedia_id(ref)
    rows = {name: lines(place / f"{name}.jsonl") for name in list(TABLES)[:4]}
    for name in list(TABLES)[4:]:
        files = sorted((place / name).glob("batch-*.jsonl.gz"))
        assert files
        rows[name] = [row for path in files for row in lines(path)]
    for table, entries in rows.items():
        for row in entries:
            check_row(table, row)
    [release], [model], [source_set], [source] = (rows[name] for name in list(TABLES)[:4])
    assert source["modelId"] == source_set["modelId"] == model["id"]
    assert source["setName"] == source_set["name"]
    assert source_set["releaseName"] == release["name"]
    # SAELens finds the SAE under the names that the source carries.
    assert qsl.find_group(source["saelensRelease"]).short == GROUP
    assert source["saelensSaeId"] == "layer6"

    features = {int(row["index"]): row for row in rows["features"]}
    assert sorted(features) == list(range(1024))
    assert {row["layer"] for row in rows["features"]} == {source["id"]}
    ids = [row["id"] for row in rows["activations"]]
    assert len(ids) == len(set(ids))
    for row in rows["activations"]:
        assert len(row["tokens"]) == len(row["values"])
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert row["minValue"] == min(row["values"])
    for feature in (frequent[0], frequent[-1]):
        row, page = features[feature], page_of(site, feature)
        assert row["maxActApprox"] == pytest.approx(page["maximum"], rel=1e-3)
        assert len(row["freq_hist_data_bar_heights"]) == len(row["freq_hist_data_bar_values"])
        assert sum(row["freq_hist_data_bar_heights"]) == page["tokens"]
        assert row["pos_str"] == [token for token, _ in page["promoted"]]
    described = {int(row["index"]): row for row in rows["explanations"]}
    assert set(described) == set(frequent[:2])
    assert described[frequent[1]]["description"] == " ".join(HOSTILE_LABEL.split())
    assert json.loads(described[frequent[0]]["notes"]) == {"score": 0.75, "source": "a test"}


@pytest.mark.parametrize("group", qsl.GROUPS, ids=lambda group: group.short)
def test_every_group_has_an_id_of_its_own(group: qsl.Group) -> None:
    ids = {neuronpedia_id(qsl.LayerRef(other.short, other.layers[0])) for other in qsl.GROUPS}
    assert len(ids) == len(qsl.GROUPS)
    assert re.fullmatch(
        r"[a-z0-9._-]+/\d+-[a-z0-9-]+", neuronpedia_id(qsl.LayerRef(group.short, group.layers[-1]))
    )
