"""Promoted tokens, nearest directions and token texts, against the model itself and brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CLASSES, D_MODEL, make_model, make_tokenizer

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import WrongKeys, WrongModel, WrongTokenizer
from qwen_scope_lens.features import token_effects
from qwen_scope_lens.features.extremes import extremes
from qwen_scope_lens.features.token_effects import nearest
from qwen_scope_lens.mini import model_path
from qwen_scope_lens.models import Vocabulary, read_unembedding
from qwen_scope_lens.models.architecture import part, places_of
from qwen_scope_lens.models.token_text import readable


@pytest.mark.parametrize("kind", CLASSES)
def test_effects_are_those_of_the_models_own_norm_and_head(kind: str) -> None:
    model = make_model(kind)
    with torch.no_grad():
        for parameter in part(model, places_of(model).norm).parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(7, D_MODEL)
    with torch.no_grad():
        norm, head = places_of(model).norm, places_of(model).head
        assert head is not None
        logits = part(model, head)(part(model, norm)(x))
    out = read_unembedding(model)
    torch.testing.assert_close(out.logits(x), logits, rtol=1e-5, atol=1e-5)
    found = token_effects(x, out, count=5, vocabulary=200)
    centred = logits[:, :200] - logits[:, :200].mean(-1, keepdim=True)
    top = centred.sort(-1, descending=True)
    assert np.array_equal(found.promoted, top.indices[:, :5])
    assert np.array_equal(found.suppressed, top.indices.flip(-1)[:, :5])
    np.testing.assert_allclose(found.promoted_by, top.values[:, :5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        found.suppressed_by, top.values.flip(-1)[:, :5], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3_5ForConditionalGeneration"])
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_end_of_a_checkpoint_is_read(kind: str, tied: bool, tmp_path: Path) -> None:
    model = make_model(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    x = torch.randn(3, D_MODEL)
    expected = read_unembedding(model).logits(x)
    assert torch.equal(read_unembedding(tmp_path).logits(x), expected)
    bridge = qsl.load_model(model, tokenizer=make_tokenizer())
    assert torch.equal(read_unembedding(bridge).logits(x), expected)


def test_a_model_without_head_is_refused(tmp_path: Path) -> None:
    inner = make_model().model
    with pytest.raises(WrongModel, match="unembedding"):
        read_unembedding(inner)
    inner.save_pretrained(tmp_path)
    with pytest.raises(WrongKeys, match="no unembedding"):
        read_unembedding(tmp_path)
    with pytest.raises(WrongModel, match="another model"):
        token_effects(torch.randn(2, 5), read_unembedding(make_model()))


@pytest.mark.parametrize("half", [False, True])
def test_extremes_equal_brute_force(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_scope_lens.features.extremes.SIDE", 13)
    rng = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(50, 24, generator=rng), torch.randn(400, 24, generator=rng)
    exact = rows.double() @ columns.double().T
    most, least = extremes(rows, columns, 6, smallest=True, half=half)
    for found, largest in ((most, True), (least, False)):
        right = exact.topk(6, largest=largest)
        assert torch.equal(found.indices, right.indices)
        torch.testing.assert_close(found.values.double(), right.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_nearest_leaves_itself_out(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_scope_lens.features.extremes.SIDE", 7)
    rng = torch.Generator().manual_seed(1)
    directions = torch.randn(30, 16, generator=rng)
    directions[7] = 3 * directions[4]  # the same direction, another length
    directions[9] = 0
    found = nearest(directions, count=40, half=half)
    assert found.features.shape == (30, 29)
    assert found.features[7, 0] == 4
    assert found.features[4, 0] == 7
    assert found.cosines[7, 0] == pytest.approx(1)
    assert all(i not in row for i, row in enumerate(found.features))
    assert np.abs(found.cosines[9]).max() == 0
    unit = torch.nn.functional.normalize(directions.double(), dim=-1)
    exact = (unit @ unit.T).fill_diagonal_(-2).sort(-1, descending=True)
    np.testing.assert_allclose(found.cosines, exact.values[:, :29], atol=1e-5)


@pytest.fixture(scope="module")
def bytewise() -> Vocabulary:
    return Vocabulary(make_tokenizer())


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=12))
def test_pieces_give_back_the_text(text: str) -> None:
    tokenizer = make_tokenizer() if not _CACHE else _CACHE[0]
    _CACHE[:] = [tokenizer]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Vocabulary(tokenizer).pieces(ids)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert sum(piece.tokens for piece in pieces) == len(ids)


_CACHE: list = []


def test_half_characters(bytewise: Vocabulary) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("aé中👍", add_special_tokens=False)["input_ids"]
    assert [(p.text, p.tokens) for p in bytewise.pieces(ids)] == [
        ("a", 1),
        ("é", 2),
        ("中", 3),
        ("👍", 4),
    ]
    # Cut in the middle of a character, at both ends: shown as bytes, nothing lost.
    assert [p.text for p in bytewise.pieces(ids[2:-1])] == [
        "<0xA9>",
        "中",
        "<0xF0>",
        "<0x9F>",
        "<0x91>",
    ]
    assert bytewise.text(ids[1]) == "<0xC3>"
    assert bytewise.continues[ids[2]]
    assert not bytewise.continues[ids[1]]
    assert bytewise.text(259) == "<think>"
    assert bytewise.text(262) == "<unused 262>"
    assert [p.text for p in bytewise.pieces([ids[1], 259, 262, ids[0]])] == [
        "<0xC3>",
        "<think>",
        "<unused 262>",
        "a",
    ]
    assert readable(b" \xe4\xb8") == " <0xE4><0xB8>"
    assert readable("‮<b>".encode()) == "‮<b>"


def test_the_minis_vocabulary_is_that_of_its_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path("mini-qwen3"))
    vocabulary = Vocabulary(tokenizer)
    assert len(vocabulary) == len(tokenizer)
    text = "程序 программа مرحبا 👩‍👩‍👧 naïve\n\tif x:"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(vocabulary.bytes_of(i) or b"" for i in ids).decode() == text
    assert "".join(p.text for p in vocabulary.pieces(ids)) == text


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(WrongTokenizer, match="byte-level"):
        Vocabulary(object())  # type: ignore[arg-type]
