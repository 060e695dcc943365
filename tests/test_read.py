"""Reading a text: features, labels and promoted tokens; what counts; page, JSON, colours."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from feature_stores import GROUP
from tiny_models import make_sae

import qwen_scope_lens as qsl
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadText, LayerOutOfRange, UnknownName, WrongModel
from qwen_scope_lens.labels import Label, LabelPack
from qwen_scope_lens.models import ScopeBridge
from qwen_scope_lens.models.unembedding import read_unembedding

TEXT = "The kernel reads a file. 内核读取文件。 مرحبا 🦜"
HOSTILE = "<b>The</b>\x1b[2J file\n\u202eabc"
LABELS = LabelPack(Label(qsl.FeatureRef(GROUP, 6, n), f"<i>label {n}\x1b[31m") for n in range(1024))


@pytest.fixture(scope="module")
def model() -> ScopeBridge:
    return qsl.load_model("mini-qwen3")


@pytest.fixture(scope="module")
def reading(model: ScopeBridge) -> qsl.Reading:
    return qsl.read(TEXT, GROUP, model=model, layers=[2, 6], labels=LABELS, top=3)


@pytest.mark.parametrize("layer", [2, 6])
def test_the_strongest_features_are_those_of_the_dense_codes(
    reading: qsl.Reading, model: ScopeBridge, layer: int
) -> None:
    residual = qsl.capture(model, [TEXT], [layer]).residuals[layer]
    dense = qsl.load_sae(f"{GROUP}/{layer}").encode_sparse(residual).to_dense()
    found = reading.strongest(layer, top=None)
    assert len(found) == int((dense[1:] > 0).any(0).sum())
    for one in found[:20]:
        column = dense[:, one.ref.feature]
        assert one.value == pytest.approx(float(column[1:].max()), rel=1e-5)
        assert one.token == int(column[1:].argmax()) + 1
        assert one.tokens == int((column[1:] > 0).sum())
    assert [one.value for one in found] == sorted((one.value for one in found), reverse=True)
    counted = {one.ref for one in found}
    only_first = set(dense[0].nonzero()[:, 0].tolist()) - {ref.feature for ref in counted}
    assert only_first  # some fire on the first token alone
    assert reading.strongest(layer, [0], 1)[0].ref.feature == dense[0].argmax()


def test_promoted_tokens_and_labels_stand_beside_the_features(
    reading: qsl.Reading, model: ScopeBridge
) -> None:
    sae, end = qsl.load_sae(f"{GROUP}/6"), read_unembedding(model)
    for one in reading.strongest(6, top=3):
        logits = end.logits(sae.direction([one.ref.feature]))[0, : len(model.tokenizer)]
        expected = [model.tokenizer.decode([t]) for t in logits.topk(5).indices.tolist()]
        whole = [(a, b) for a, b in zip(expected, one.promotes, strict=True) if "\ufffd" not in a]
        assert whole
        assert all(a == b for a, b in whole)
        assert one.label == LABELS.text(one.ref)
    table = reading.table(3)
    assert len(table.rows) == 6
    assert table.columns[-2:] == ("promotes", "label")
    assert table.more == len(reading.table().rows) - 6


def test_tokens_that_share_a_character_are_one_row(reading: qsl.Reading) -> None:
    assert "".join(piece.text for piece in reading.pieces) == TEXT
    bird = next(i for i, piece in enumerate(reading.pieces) if "🦜" in piece.text)
    assert reading.pieces[bird].tokens > 1
    row = reading.by_token(1).rows[bird]
    dense = reading.codes[6].to_dense()[list(reading.tokens_of(bird))].amax(0)
    assert row[3] == f"{int(dense.argmax())} ({float(dense.max()):.3g})"
    assert row[1] == reading.piece_of(reading.tokens_of(bird)[-1]).text
    long = reading.tokens(2).to_pandas()
    assert len(long) == 2 * 2 * len(reading.pieces)
    assert set(long["layer"]) == {2, 6}


def test_what_does_not_count_is_said(reading: qsl.Reading, model: ScopeBridge) -> None:
    assert reading.said()[1] == "not counted: the first token, 'The' at 0"
    chat = "<|im_start|>user\nThe file<|im_end|>"
    some = qsl.read(chat, f"{GROUP}/6", model=model, extreme_norm_ratio=1.5, promoted=0)
    extreme = [i for i, is_extreme in enumerate(some.extreme[6]) if is_extreme]
    assert 0 < len(extreme) < len(some.token_ids) - 1
    assert not set(some.counted(6)) & {0, *extreme}
    assert "tokens of extreme norm" in some.said()[1]
    assert some.said()[2].startswith("special tokens: '<|im_start|>' at 0, '<|im_end|>' at ")
    assert "promotes" not in some.table(1).columns
    every = qsl.read(chat, f"{GROUP}/6", model=model, all_tokens=True, promoted=0)
    assert every.counted(6) == list(range(len(every.token_ids)))
    short = qsl.read("The", f"{GROUP}/6", model=model)
    assert short.table(3).rows == ()
    assert "no token counts" in str(short.table(3))
    assert short.by_token(1).rows[0][-1] == "first token"


def test_models_and_saes_by_name_or_in_memory(reading: qsl.Reading, model: ScopeBridge) -> None:
    saes = [qsl.load_sae(f"{GROUP}/{layer}") for layer in (6, 2)]
    same = qsl.read(TEXT, saes, model=model)
    by_name = list(qsl.read_all([TEXT, "A file."], GROUP, layers=[2, 6]))
    assert same.layers == by_name[0].layers == (2, 6)
    for other in (same, by_name[0]):
        for layer in (2, 6):
            assert torch.equal(other.codes[layer].indices, reading.codes[layer].indices)
        assert [one.promotes for one in other.strongest(6, top=3)] == [
            one.promotes for one in reading.strongest(6, top=3)
        ]
    assert by_name[1].text == "A file."
    with pytest.raises(UnknownName, match=r"no SAE was given for the layers \[3\]"):
        qsl.read(TEXT, saes, model=model, layers=[2, 3])
    with pytest.raises(UnknownName, match="does not say which SAE it is"):
        qsl.read(TEXT, make_sae(), model=model)
    with pytest.raises(LayerOutOfRange, match="is the SAE of layer 6"):
        qsl.read(TEXT, f"{GROUP}/6", layers=[2])
    with pytest.raises(UnknownName, match="no group is named"):
        qsl.read(TEXT, "mini-qwen4/6")
    with pytest.raises(WrongModel, match="they were trained on"):
        qsl.read(TEXT, "qwen3-8b-base/w64k-l0-50", model=model)
    with pytest.raises(BadText, match="type some"):
        qsl.read("  ", GROUP, model=model)
    with pytest.raises(BadText, match="single one"):
        qsl.read_all("a text", GROUP, model=model)


def test_what_a_reading_does_not_have_is_refused_by_name(reading: qsl.Reading) -> None:
    assert reading.track(f"{GROUP}/6/423") == reading.track(qsl.FeatureRef(GROUP, 6, 423))
    for ref, said in (("text", "not a feature address"), (f"{GROUP}/5/1", "layers 2, 6")):
        with pytest.raises((UnknownName, LayerOutOfRange), match=said):
            reading.track(ref)
    with pytest.raises(LayerOutOfRange, match="layer 99 was not read"):
        reading.strongest(99)
    with pytest.raises(BadText, match="top=-1"):
        reading.strongest(6, top=-1)
    assert reading.strongest(6, top=0) == []


def test_a_standard_input_that_is_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["read", "-"], ["steer", "-", "--edit", f"{GROUP}/6/1:ablate"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a \xff b")))
        assert main(words) == 1
        assert "standard input is not UTF-8" in capsys.readouterr().err


def test_nothing_from_a_text_runs_on_a_page(model: ScopeBridge) -> None:
    reading = qsl.read(HOSTILE, f"{GROUP}/6", model=model, labels=LABELS)
    for html in (reading.page().render(), reading._repr_html_()):
        assert "<b>" not in html
        assert "<i>" not in html
        assert "&lt;i&gt;label" in html
        shades = [float(found) for found in re.findall(r"rgba\(240,130,30,([\d.]+)\)", html)]
        assert max(shades) == 0.75
        assert len(set(shades)) > 3
    page = reading.page().render()
    assert not any(word in page for word in ("<script", "http://", "https://", "url("))


def test_the_command_prints_versioned_json_and_a_page(
    reading: qsl.Reading, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    words = ["read", TEXT, "A file." * 30, "--layers", "2,6", "--top", "2", "--out", str(page)]
    assert main([*words, "--json", "--max-tokens", "60"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["version"]) == ("qwen-scope-reading", 1)
    assert (found["model"], found["sae"], found["layers"]) == ("mini-qwen3", GROUP, [2, 6])
    first = found["texts"][0]
    assert [row["feature"] for row in first["features"]] == [
        str(one.ref) for layer in (2, 6) for one in reading.strongest(layer, top=2)
    ]
    assert first["tokens"][0]["first"]
    assert sum(len(token["token_ids"]) for token in first["tokens"]) == len(reading.token_ids)
    assert [text["truncated"] for text in found["texts"]] == [False, True]
    assert "the first 60 tokens; the text is longer" in page.read_text("utf-8")
    assert page.read_text("utf-8").count("Token by token") == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_our_colours_and_no_other_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LABELS.write(tmp_path / "labels.jsonl")
    words = ["read", HOSTILE, "--layers", "6", "--labels", str(tmp_path / "labels.jsonl")]
    shown = {}
    for forbidden in ("", "1"):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("NO_COLOR", forbidden)
        out = Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        assert main(words) == 0
        shown[forbidden] = out.getvalue()
    assert "\x1b" not in shown["1"]
    ours = re.compile(r"\x1b\[(?:0|2|38;5;16;48;5;\d+)m")
    assert len(ours.findall(shown[""])) > 10
    plain = ours.sub("", shown[""])
    assert "\x1b" not in plain
    assert "\u202e" not in plain
    assert r"\x1b" in plain
