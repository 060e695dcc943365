"""Label packs: read, write, merge, refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from feature_stores import build_store
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadFile, BadText, CannotWrite, UnknownName
from qwen_scope_lens.labels import Label, LabelPack

SAE = LayerRef.parse("mini-qwen3/w1k-l0-16/6")


def label(feature: int, text: str = "a text", score: float | None = None) -> Label:
    return Label(SAE.feature(feature), text, score)


words = st.text(min_size=1).filter(lambda text: text.strip())


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.integers(0, 1023), st.tuples(words, st.none() | st.floats(-9, 9))))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, given: dict[int, tuple[str, float | None]]
) -> None:
    pack = LabelPack(label(feature, *rest) for feature, rest in given.items())
    path = pack.write(tmp_path_factory.mktemp("labels") / "labels.jsonl")
    if not pack:
        with pytest.raises(BadFile, match="no label"):
            LabelPack.read(path)
        return
    assert LabelPack.read(path) == pack
    assert len(path.read_text(encoding="utf-8").split("\n")) == len(pack) + 1


def test_a_hand_written_file_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    rows = (
        '{"address": "mini-qwen3/w1k-l0-16/6/7", "text": "مرحبا 内核 🙂"}\n\n'
        '{"address": "qwen-scope-mini-qwen3-w1k-l16/layer5/3", "text": " two\\n lines ",'
        ' "score": 1}'
    )
    path.write_bytes("\ufeff".encode() + rows.encode())  # as Windows editors begin a file
    pack = LabelPack.read(path)
    assert [str(ref) for ref in pack] == ["mini-qwen3/w1k-l0-16/5/3", "mini-qwen3/w1k-l0-16/6/7"]
    assert pack.text("mini-qwen3/w1k-l0-16/6/7") == "مرحبا 内核 🙂"
    assert pack["mini-qwen3/w1k-l0-16/5/3"].text == "two lines"
    assert pack["mini-qwen3/w1k-l0-16/5/3"].score == 1.0
    assert pack.text("mini-qwen3/w1k-l0-16/6/8", "none") == "none"
    assert "nonsense" not in pack
    assert pack.saes == (LayerRef.parse("mini-qwen3/w1k-l0-16/5"), SAE)
    assert set(pack.of_sae(SAE)) == {7}


def test_half_a_character_can_be_written(tmp_path: Path) -> None:
    pack = LabelPack([label(1, "half \ud83d of a smile")])
    assert LabelPack.read(pack.write(tmp_path / "labels.jsonl")) == pack


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{nonsense", "line 1"),
        ("[1]", "expected an object"),
        ('{"address": "mini-qwen3/w1k-l0-16/6/7"}', "needs address and text"),
        ('{"address": "mini-qwen3/w1k-l0-16/6/7", "text": " "}', "has no text"),
        ('{"address": "mini-qwen3/w1k-l0-16/6/7", "text": 3}', "has no text"),
        ('{"address": "mini-qwen3/w1k-l0-16/6/1024", "text": "x"}', "it has 0..1023"),
        ('{"address": "mini-qwen3/w1k-l0-16/6", "text": "x"}', "names a whole group"),
        ('{"address": "mini-qwen3/w1k-l0-16/6/7", "text": "x", "socre": 1}', "'socre'"),
        ('{"address": "mini-qwen3/w1k-l0-16/6/7", "text": "x", "score": "1"}', "finite number"),
        ('{"address": "mini-qwen3/w1k-l0-16/6/7", "text": "x", "score": NaN}', "finite number"),
        ('{"address": "mini-qwen3/w1k-l0-16/6/7", "text": "x", "provenance": 3}', "provenance"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(line)
    with pytest.raises(BadFile, match=words):
        LabelPack.read(path)


def test_no_file_no_text_no_place(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="does not exist"):
        LabelPack.read(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadFile, match="UTF-8"):
        LabelPack.read(tmp_path / "binary")
    with pytest.raises(CannotWrite):
        LabelPack([label(1)]).write(tmp_path / "binary" / "labels.jsonl")


def test_two_labels_of_one_feature_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadText, match="two labels"):
        LabelPack([label(1, "a"), label(1, "b")])
    assert len(LabelPack([label(1, "a"), label(1, "a")])) == 1
    path = tmp_path / "labels.jsonl"
    rows = [label(1, "a"), label(2), label(1, "b")]
    path.write_text("\n".join(json.dumps(row.to_row()) for row in rows))
    with pytest.raises(BadFile, match="lines 1 and 3"):
        LabelPack.read(path)


def test_merge() -> None:
    one = LabelPack([label(1, "one", 0.5), label(2, "untested"), label(3, "alone")])
    two = LabelPack([label(1, "two", 0.6), label(2, "tested", 0.1), label(4, "also")])
    texts = {
        prefer: [one.text for one in LabelPack.merge([one, two], prefer).values()]
        for prefer in ("first", "last", "score")
    }
    assert texts == {
        "first": ["one", "untested", "alone", "also"],
        "last": ["two", "tested", "alone", "also"],
        "score": ["two", "tested", "alone", "also"],
    }
    assert LabelPack.merge([two, one], "score")[SAE.feature(1)].text == "two"
    assert LabelPack.merge([]) == LabelPack()
    with pytest.raises(UnknownName):
        LabelPack.merge([one], "best")  # type: ignore[arg-type]


def test_an_address_is_a_key_as_text_or_object() -> None:
    pack = LabelPack([label(7)])
    ref = FeatureRef.parse("mini-qwen3/w1k-l0-16/6/7")
    assert pack[ref] is pack[str(ref)]
    assert pack.get(SAE.feature(8)) is None


def test_a_pack_is_compared_with_a_store_that_lacks_a_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = build_store(tmp_path / "store", [[{3: 1.0}] * 4])
    here = LayerRef.parse(store.sae(store.layers[0]).ref)
    away = LayerRef.parse("mini-qwen3.5/w1k-l0-16/2")
    pack = LabelPack([Label(ref.feature(n), f"{n}") for ref in (here, away) for n in (3, 4)])
    pack.write(tmp_path / "labels.jsonl")
    command = ["label", "check", str(tmp_path / "labels.jsonl"), "--store", str(store.path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{here}: 2 of " in said
    assert f"have a label, 1 of them never fire in {store.path}" in said
    assert f"{away}: 2 of 1024 features have a label, the SAE is not in {store.path}" in said
