"""Label exports are accepted where the SAE fires on the same texts; harder scores of labels."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from label_exports import write_batch, write_export

import qwen_scope_lens as qsl
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadFile, CannotWrite, TooLittleData, UnknownName
from qwen_scope_lens.hosted import candidates, record, verified_id
from qwen_scope_lens.labels import bm25, import_labels
from qwen_scope_lens.labels.exports import Passage, exports_in, labels_of, measure
from qwen_scope_lens.labels.scores import (
    KINDS,
    Question,
    questions,
    requests_of,
    score,
    table_of,
)
from qwen_scope_lens.labels.search import words_of
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.site.neuronpedia import neuronpedia_id
from qwen_scope_lens.writers.generator import Book, Completion, Request
from qwen_scope_lens.writers.ledger import Ledger, Prices
from qwen_scope_lens.writers.price import price_of
from qwen_scope_lens.writers.templates import Templates

GROUP = "mini-qwen3/w1k-l0-16"
SIX = qsl.LayerRef(GROUP, 6)
TEXTS = [row["text"][:80] for row in heldout("prose")][::40]
OWN, WRONG = "mini-qwen3/6-mini-res-1k", "mini-qwen3/2-mini-res-1k"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources: that of layer 6, and one that says it is layer 2 and has the values of 6."""
    root = tmp_path_factory.mktemp("exports") / "v1"
    model = qsl.load_model("mini-qwen3")
    write_export(root, model, SIX, TEXTS, OWN)
    write_export(root, model, SIX, TEXTS, WRONG)
    return root


def test_a_layer_is_accepted_where_its_sae_agrees(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, home = tmp_path / "labels.jsonl", tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(home))
    command = ["label", "import", str(exports), "--out", str(out), "--sample", "12", "--record"]
    assert main([*command, "--json"]) == 0
    rows = {row["source"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    own, wrong = rows[OWN], rows[WRONG]
    assert (own["answer"], wrong["answer"]) == ("accepted", "refused")
    assert own["same token"] == 1
    assert own["ratio"] == pytest.approx(1, rel=1e-3)
    assert wrong["same token"] < 0.4
    pack = qsl.LabelPack.read(out)
    assert pack.saes == (SIX,)
    ref, label = next(iter(pack.items()))
    assert label.text == f"words of kind {ref.feature}"
    assert label.provenance["id"] == f"{OWN}/{ref.feature}"
    assert label.provenance["describer"] == "a-describer"
    assert label.provenance["verified"]["same_token"] == 1
    # The verified id is that of loaded SAEs and of exports; others keep ours.
    assert qsl.load_sae(SIX).cfg.metadata.neuronpedia_id == OWN == verified_id(SIX)
    assert neuronpedia_id(SIX) == OWN
    assert qsl.load_sae(f"{GROUP}/2").cfg.metadata.neuronpedia_id is None
    assert neuronpedia_id(qsl.LayerRef(GROUP, 2)) == "mini-qwen3/2-mini-res-1k-l0-16"
    monkeypatch.delenv("QWEN_SCOPE_HOME")
    with pytest.raises(CannotWrite, match="set QWEN_SCOPE_HOME"):
        record(SIX, OWN, {})


def test_nothing_is_written_where_no_layer_is_accepted(exports: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    assert main(["label", "import", str(exports / WRONG), "--out", str(out), "--sample", "4"]) == 1
    assert not out.exists()
    found = import_labels(exports / WRONG, features=4)
    assert not found.pack
    assert found.layers[0].sae is None
    assert "no SAE fires" in found.table().text()


def test_both_k_are_candidates() -> None:
    both = candidates("qwen3.5-2b-pt", "11-qwenscope-res-32k")
    assert [str(ref) for ref in both] == [
        "qwen3.5-2b-base/w32k-l0-50/11",
        "qwen3.5-2b-base/w32k-l0-100/11",
    ]
    assert candidates("qwen3.5-27b", "31-qwenscope-res-80k-l0-100") == [
        qsl.LayerRef("qwen3.5-27b/w80k-l0-100", 31)
    ]
    assert candidates(
        "qwen3.5-2b-pt", "11-qwenscope-res-32k", {"hfRepoId": both[1].row.repo_id}
    ) == [both[1]]
    for source in (
        "99-qwenscope-res-32k",
        "11-gemmascope-res-32k",
        "nonsense",
        "11-qwenscope-res-9k",
    ):
        assert candidates("qwen3.5-2b-pt", source) == []
    for group in qsl.GROUPS:  # what we export is found again
        ref = qsl.LayerRef(group.short, group.layers[0])
        model, source = neuronpedia_id(ref).split("/")
        assert ref in candidates(model, source)


def test_agreement_is_measured_token_by_token() -> None:
    passages = [Passage(3, ("a", "b"), (0.0, 2.0)), Passage(4, ("c", "d"), (1.0, 0.0))]
    same = measure(passages, {0: [0.0, 2.0], 1: [1.0, 0.0]}, SIX)
    assert (same.same_token, same.ratio, same.accepted) == (1.0, 1.0, True)
    assert same.correlation == pytest.approx(1)
    other = measure(passages, {0: [0.0, 4.0], 1: [0.0, 0.0]}, SIX)
    assert (other.same_token, other.ratio, other.accepted) == (0.5, 2.0, False)
    with pytest.raises(TooLittleData, match="the same tokens"):
        measure(passages, {}, SIX)


def _damaged(place: Path, kind: str) -> None:
    batch = place / "explanations" / "batch-0.jsonl.gz"
    row = {"index": "1", "description": "words"}
    if kind == "gzip":
        batch.parent.mkdir(parents=True)
        batch.write_bytes(gzip.compress(b"{}" * 999)[:-20])
    elif kind == "mixed":
        write_batch(batch, [{**row, "layer": "9-other"}])
    elif kind == "index":
        write_batch(batch, [{**row, "index": "-1"}])
    elif kind == "column":
        write_batch(batch, [{"index": "1"}])
    elif kind == "json":
        batch.parent.mkdir(parents=True)
        batch.write_bytes(gzip.compress(b"{nonsense"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gzip", "download it again"),
        ("mixed", "the files of two sources are mixed"),
        ("index", "not the number of a feature"),
        ("column", "expected index, description"),
        ("json", "Expected JSON lines"),
        ("nothing", "has no explanations"),
    ],
)
def test_damaged_exports_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    place = tmp_path / "mini-qwen3" / "6-mini-res-1k"
    place.mkdir(parents=True)
    _damaged(place, kind)
    with pytest.raises(BadFile, match=message):
        labels_of(exports_in(tmp_path)[0], SIX)


def test_an_unknown_source_and_a_missing_check_are_refused(tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / "gemma-2-2b" / "20-gemmascope-res-16k"
    write_batch(place / "explanations" / "batch-0.jsonl.gz", [{"index": 1, "description": "x"}])
    with pytest.raises(UnknownName, match="is not an SAE that this package knows"):
        import_labels(tmp_path)
    place = tmp_path / "mini-qwen3" / "6-mini-res-1k"
    write_batch(place / "explanations" / "batch-0.jsonl.gz", [{"index": 1, "description": "x"}])
    with pytest.raises(TooLittleData, match="has no activations"):
        import_labels(place)


# --- search --------------------------------------------------------------------------------------


def test_labels_are_found_by_words() -> None:
    texts = ["polite refusals", "a refusal", "código y números", "中文", "nothing of it", "polite"]
    pack = qsl.LabelPack(qsl.Label(SIX.feature(n), text) for n, text in enumerate(texts))

    def order(query: str) -> list[int]:
        found = bm25(pack, query)
        return [ref.feature for ref in sorted(found, key=lambda ref: -found[ref])]

    assert order("Polite refusal")[0] == 0
    assert set(order("Polite refusal")) == {0, 1, 5}
    assert order("CODIGO") == [2]
    assert order("文") == [3]
    assert order("absent") == []
    assert words_of("Refusals, códigos 12") == ["refusal", "codigo", "12"]
    # One word in a label of one word: tf = 1, df = 2 of 6, by hand.
    lengths = [2, 2, 3, 2, 3, 1]
    idf = math.log(1 + (6 - 2 + 0.5) / (2 + 0.5))
    expected = idf * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 1 / (sum(lengths) / 6)))
    assert bm25(pack, "polite")[SIX.feature(5)] == pytest.approx(expected)


# --- scores --------------------------------------------------------------------------------------


class Judge:
    """Answers every question rightly, or with the same number always."""

    def __init__(self, asked: Sequence[Question], right: bool) -> None:
        self.name = "right" if right else "always 1"
        self._asked, self._right = asked, right

    def generate(self, requests: Sequence[Request], book: Book) -> None:
        for number, one in enumerate(self._asked):
            book.start(number)
            right = [str(i) for i, flag in enumerate(one.right, 1) if flag]
            book.finish(number, Completion(", ".join(right) if self._right else "1"))


def test_harder_scores_tell_a_good_label_from_a_blind_judge(
    small_store: qsl.FeatureStore, tmp_path: Path
) -> None:
    facts = qsl.statistics(small_store, 6)
    busy = [int(f) for f in facts.doc_count.argsort()[::-1] if 6 < facts.doc_count[f] < 14][:3]
    pack = qsl.LabelPack(
        qsl.Label(SIX.feature(f), f"label {f}", None, {"describer": "a writer"}) for f in busy
    )

    def promoted(refs: Sequence[qsl.FeatureRef]) -> dict[qsl.FeatureRef, tuple[str, ...]]:
        return {ref: (f"token{ref.feature}",) for ref in refs}

    asked = questions(small_store, pack, promoted=promoted)
    assert {one.kind for one in asked} == set(KINDS)
    texts = small_store.documents(["text"])["text"].to_pylist()
    for one in asked:
        fires = set(small_store.by_feature(one.ref).doc.tolist())
        if one.kind == "detection":
            assert 0 < sum(one.right) < len(one.right)
            for text, right in zip(one.options, one.right, strict=True):
                inside = [n for n, whole in enumerate(texts) if text in " ".join(whole.split())]
                if len(inside) == 1:  # silent ones are of documents where it never fires
                    assert (inside[0] in fires) == right
        elif one.kind == "output":
            [place] = [i for i, flag in enumerate(one.right) if flag]
            assert one.options[place] == f"'token{one.ref.feature}'"
            assert len(set(one.options)) == 5
        elif one.kind == "intruder":
            assert sum(one.right) == 1
            assert len(one.options) == 5
            assert all(
                "label" not in text for _, text in one.request("label", Templates(), 0).messages
            )
        else:
            marks = [text.count("<<") for text in one.options]
            assert min(marks) > 0
    price = price_of(requests_of(asked, pack), Prices(1.0, 2.0))
    assert price.requests == len(asked)
    assert price.cost == pytest.approx((price.prompt_tokens + 2 * price.answer_tokens) / 1e6)
    scores = {}
    for right in (True, False):
        judge = Judge(asked, right)
        with Ledger.open(tmp_path / judge.name, Prices()) as ledger:
            scored = score(pack, asked, judge, ledger)
        scores[right] = scored
        tests = scored[SIX.feature(busy[0])].provenance["tests"]
        assert tests["judge"] == judge.name
        assert scored[SIX.feature(busy[0])].provenance["describer"] == "a writer"
    assert {label.score for label in scores[True].values()} == {1.0}
    blind = [label.score for label in scores[False].values() if label.score is not None]
    assert max(blind) <= 0.6
    assert "a writer" in table_of(scores[True]).text()
    with pytest.raises(UnknownName, match="is not a test"):
        questions(small_store, pack, ["nonsense"])  # type: ignore[list-item]
    with pytest.raises(TooLittleData, match="needs the tokens"):
        questions(small_store, pack, ["output"])
