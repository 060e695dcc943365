"""`capture`: what it returns, how it bounds memory, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import before_each_run, make_model, make_tokenizer
from torch import Tensor

from qwen_scope_lens.errors import BadText, LayerOutOfRange, WrongModel, WrongTokenizer
from qwen_scope_lens.models import Capture, capture, decoder_layers, iter_captures, load_model

TEXTS = ["one", "a much longer text than one", "été 字", "x", "middle sized"]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_the_form_of_a_capture(model: Any, tokenizer: Any) -> None:
    found = capture(model, TEXTS, [2, 0, 2], tokenizer=tokenizer)
    lengths = [len(text.encode()) for text in TEXTS]  # one token per byte
    assert found.layers == (0, 2)
    assert found.doc_ids == (0, 1, 2, 3, 4)
    assert found.offsets.diff().tolist() == lengths
    assert found.n_tokens == sum(lengths)
    assert len(found) == 5
    for layer in (0, 2):
        assert found.residuals[layer].shape == (found.n_tokens, 32)
        assert torch.equal(found.norms[layer], found.residuals[layer].norm(dim=-1))
        assert not found.residuals[layer].requires_grad
    assert found.token_ids.tolist() == [t for x in TEXTS for t in tokenizer(x)["input_ids"]]
    assert found.first.nonzero().flatten().tolist() == found.offsets[:-1].tolist()
    assert found.doc_rows().tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    one = found.doc(2)
    assert one.texts == ("été 字",)
    spans = one.char_spans[0]
    assert spans is not None
    assert [one.texts[0][a:b] for a, b in spans] == [
        *[*"éété", " ", *"字字字"][0:2],
        *"téé",
        " ",
        *"字字字",
    ]
    assert torch.equal(found.doc(-1).residuals[0], found.residuals[0][found.offsets[4] :])


def test_several_layers_in_one_pass_and_nothing_after_the_last(model: Any, tokenizer: Any) -> None:
    ran: list[str] = []
    layers = decoder_layers(model)
    watched = [("0", layers[0]), ("2", layers[2]), ("3", layers[3]), ("head", model.lm_head)]
    handles = [
        module.register_forward_hook(lambda *a, name=name: ran.append(name))
        for name, module in watched
    ]
    capture(model, TEXTS, [0, 2], tokenizer=tokenizer)
    for handle in handles:
        handle.remove()
    assert ran == ["0", "2"]
    assert not layers[2]._forward_hooks


def test_layers_that_return_tuples(tokenizer: Any) -> None:
    model = make_model()
    truth = capture(model, TEXTS, [1], tokenizer=tokenizer).residuals[1]

    class OldStyle(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str]:
            return self.layer(*args, **kwargs), "cache"

    model.model.layers[1] = OldStyle(model.model.layers[1])
    assert torch.equal(capture(model, TEXTS, [1], tokenizer=tokenizer).residuals[1], truth)


def test_a_corpus_is_read_in_bounded_pieces(model: Any, tokenizer: Any) -> None:
    shapes: list[tuple[int, int]] = []
    read = 0

    def corpus() -> Iterator[str]:
        nonlocal read
        for i in range(1000):
            read += 1
            yield "word " * (1 + i % 7)

    pieces = iter_captures(
        model, corpus(), [0], tokenizer=tokenizer, token_budget=64, window=16, max_tokens=40
    )
    with before_each_run(model, lambda texts, tokens: shapes.append((texts, tokens))):
        first = next(pieces)
        assert read == 16  # one window ahead, not the corpus
        numbers = list(first.doc_ids)
        for piece in pieces:
            numbers += piece.doc_ids
    assert sorted(numbers) == list(range(1000))
    assert len(shapes) > 1000 / 16
    assert all(count * longest <= 64 for count, longest in shapes)
    padded = sum(count * longest for count, longest in shapes)
    assert padded < 1.25 * sum(5 * (1 + i % 7) for i in range(1000))  # sorted by length


def test_batches_do_not_change_flags(model: Any, tokenizer: Any) -> None:
    whole = capture(model, TEXTS, [1], tokenizer=tokenizer)
    small = capture(model, TEXTS, [1], tokenizer=tokenizer, token_budget=1, window=2)
    assert torch.equal(whole.token_ids, small.token_ids)
    assert torch.equal(whole.extreme[1], small.extreme[1])
    torch.testing.assert_close(whole.residuals[1], small.residuals[1], rtol=1e-4, atol=1e-4)


def test_extreme_and_first_tokens(model: Any, tokenizer: Any) -> None:
    found = capture(model, TEXTS, [1], tokenizer=tokenizer, extreme_norm_ratio=1.1)
    flags = []
    for norms in (found.doc(i).norms[1] for i in range(len(found))):
        median = (norms[1:] if len(norms) > 1 else norms).median()
        flags += (norms > 1.1 * median).tolist()
    assert found.extreme[1].tolist() == flags
    assert set(flags) == {True, False}
    found = capture(model, TEXTS, [1], tokenizer=tokenizer, extreme_norm_ratio=1e-9)
    assert not found.keep(1).any()
    found = capture(model, TEXTS, [1], tokenizer=tokenizer, extreme_norm_ratio=1e9)
    assert torch.equal(found.keep(1), ~found.first)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_and_says_so(
    model: Any, tokenizer: Any, error: Exception
) -> None:
    truth = capture(model, TEXTS, [1], tokenizer=tokenizer)
    sizes: list[int] = []

    def small_card(texts: int, tokens: int) -> None:
        if texts > 2:
            raise error
        sizes.append(texts)

    with (
        before_each_run(model, small_card),
        pytest.warns(UserWarning, match="out of memory with 5 documents"),
    ):
        found = capture(model, TEXTS, [1], tokenizer=tokenizer)
    assert found.doc_ids == truth.doc_ids
    torch.testing.assert_close(found.residuals[1], truth.residuals[1], rtol=1e-4, atol=1e-4)
    assert max(sizes) <= 2

    def no_card(texts: int, tokens: int) -> None:
        raise error

    with before_each_run(model, no_card), pytest.raises(type(error)) as raised:
        capture(model, TEXTS[:1], [1], tokenizer=tokenizer)
    assert "does not fit into memory" in raised.value.__notes__[-1]


def test_other_errors_are_not_swallowed(model: Any, tokenizer: Any) -> None:
    def broken(texts: int, tokens: int) -> None:
        raise RuntimeError("something else")

    with before_each_run(model, broken), pytest.raises(RuntimeError, match="something else"):
        capture(model, TEXTS, [1], tokenizer=tokenizer)


def test_chats_go_through_the_template(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    with pytest.raises(BadText, match="enable_thinking=True or False"):
        capture(model, [chat], [0], tokenizer=tokenizer)
    found = capture(model, [chat, "plain"], [0], tokenizer=tokenizer, enable_thinking=False)
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False)
    assert found.texts == (rendered, "plain")
    ids = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, enable_thinking=False
    )["input_ids"]
    assert found.doc(0).token_ids.tolist() == list(ids)
    options: dict[str, Any] = {"tokenizer": tokenizer, "add_generation_prompt": True}
    thinking = capture(model, [chat], [0], enable_thinking=True, **options)
    without = capture(model, [chat], [0], enable_thinking=False, **options)
    assert without.n_tokens > thinking.n_tokens
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(WrongTokenizer, match="no chat template"):
        capture(model, [chat], [0], tokenizer=bare, enable_thinking=True)


def test_token_ids_need_no_tokenizer(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("token ids")["input_ids"]
    for document in (ids, torch.tensor(ids)):
        found = capture(model, [document], [1])
        assert found.token_ids.tolist() == ids
        assert found.texts == found.char_spans == (None,)
    with pytest.raises(WrongTokenizer, match="pass `tokenizer=`"):
        capture(model, ["text"], [1])
    with pytest.raises(BadText, match="outside"):
        capture(model, [[1, 5000]], [1])


def test_length_limits(model: Any, tokenizer: Any) -> None:
    with pytest.raises(BadText, match="document 1 has 300 tokens, the limit is 256"):
        capture(model, ["short", "a" * 300], [0], tokenizer=tokenizer)
    with pytest.raises(BadText, match="the limit is 3"):
        capture(model, ["short"], [0], tokenizer=tokenizer, max_tokens=3)
    cut = capture(model, ["sh", "a" * 300], [0], tokenizer=tokenizer, truncate=True)
    assert cut.truncated == (False, True)
    assert cut.offsets.tolist() == [0, 2, 258]
    assert len(cut.char_spans[1] or ()) == 256


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (["ok", ""], "document 1 is empty"),
        ([[]], "document 0 is empty"),
        ("a string", "put it into a list"),
        ([], "no documents"),
        ([3.5], "is a float"),
        ([[{"role": "user"}, "x"]], "is a list"),
    ],
)
def test_bad_documents(model: Any, tokenizer: Any, documents: Any, said: str) -> None:
    with pytest.raises(BadText, match=said):
        capture(model, documents, [0], tokenizer=tokenizer)


def test_bad_arguments_raise_before_anything_runs(model: Any, tokenizer: Any) -> None:
    with pytest.raises(LayerOutOfRange):
        iter_captures(model, TEXTS, [4], tokenizer=tokenizer)
    with pytest.raises(BadText, match="no layer"):
        iter_captures(model, TEXTS, [], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="positive"):
        iter_captures(model, TEXTS, [0], tokenizer=tokenizer, token_budget=0)
    training = make_model().train()
    with pytest.raises(WrongModel, match="training mode"):
        capture(training, TEXTS, [0], tokenizer=tokenizer)


def test_dtype_and_device(model: Any, tokenizer: Any) -> None:
    found = capture(model, TEXTS, [0], tokenizer=tokenizer, dtype=torch.bfloat16, device="cpu")
    assert found.residuals[0].dtype == torch.bfloat16
    assert found.norms[0].dtype == torch.float32


def test_hooks_on_a_bridge_take_part(tokenizer: Any) -> None:
    bridge = load_model(make_model(), tokenizer=tokenizer)
    plain = capture(bridge, TEXTS, [2])
    with bridge.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda x, hook: x + 1)]):
        edited = capture(bridge, TEXTS, [2])
    assert isinstance(edited, Capture)
    assert torch.equal(edited.residuals[2], plain.residuals[2] + 1)
