"""Edits that depend on what came before: the thinking phase, and gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen_scope_lens.errors import BadPlan, WrongTokenizer
from qwen_scope_lens.models import load_model
from qwen_scope_lens.saes import load_sae
from qwen_scope_lens.steering import Edit, Gate, Plan, Where, steer
from qwen_scope_lens.steering.calls import Call
from qwen_scope_lens.steering.token_masks import Selector, thinking

G = "mini-qwen3/w1k-l0-16"
THINK, THOUGHT, START, END = 6003, 6004, 6001, 6002


@pytest.fixture(scope="module")
def mini() -> Any:
    return load_model("mini-qwen3")


def test_conditions_have_a_text_form() -> None:
    for text in (
        "generation,think=inside",
        "both,think=after,gate=mini-qwen3/w1k-l0-16/4/12>3.5",
        "prompt,class=han,role=user,gate=mini-qwen3/w1k-l0-16/6/1>0.0",
    ):
        assert str(Where.of(text)) == text
        edit = Edit(f"{G}/6/423", "add", 2, where=text)
        assert Edit.parse(str(edit)) == edit == Edit.from_dict(edit.to_dict())
    where = Where(think="inside", gate=Gate(f"{G}/4/12", 1))  # type: ignore[arg-type]
    assert where.gate is not None
    assert where.gate.threshold == 1.0
    assert Where(think="inside").apart(Where(think="after"))
    assert not Where(think="inside").apart(Where())
    for wrong in ("think=before", "gate=x", f"gate={G}/4/12", f"gate={G}/4/12>-1", "gate=>1"):
        with pytest.raises(ValueError, match=r"think|gate|group|address"):
            Where.of(wrong)
    with pytest.raises(BadPlan, match="later layer"):
        Edit.parse(f"{G}/4/423:add:2@gate={G}/6/1>2")


def test_the_thinking_phase_ends_with_its_message() -> None:
    #     a  <s> think b  c  /think d  end  e  think f start g
    ids = [1, START, THINK, 2, 3, THOUGHT, 4, END, 5, THINK, 6, START, 7]
    found = thinking(torch.tensor([ids]), THINK, THOUGHT, [START, END])
    assert [i for i, on in enumerate(found["inside"][0]) if on] == [3, 4, 10]
    assert [i for i, on in enumerate(found["after"][0]) if on] == [6]


def test_thinking_is_found_token_by_token(mini: Any) -> None:
    """With a cache a pass has one token, and the mask is the same."""
    ids = torch.tensor([[1, THINK, 2, 3, THOUGHT, 4, 5, END, 6]])
    selector = Selector(lambda: mini.tokenizer)
    for phase in ("inside", "after"):
        where = Where.of(f"both,think={phase},first")
        whole = selector.mask(where, Call(1, 9, 0, 9, ids, None, True), ids.device)
        assert whole is not None
        for at in range(1, 9):
            call = Call(1, 1, at, 4, ids[:, : at + 1], None, True)
            one = selector.mask(where, call, ids.device)
            assert one is not None
            assert bool(one[0, 0]) == bool(whole[0, at])

    class Other:
        unk_token_id = None
        all_special_ids: tuple[int, ...] = ()

        def convert_tokens_to_ids(self, token: str) -> None:
            return None

    with pytest.raises(WrongTokenizer, match="<think>"):
        Selector(Other).check(Where(think="after"))


def test_a_gate_acts_from_the_token_on_at_which_it_opens(mini: Any) -> None:
    """The same logits as a plan that begins at that position, with and without a cache, in a
    padded batch, and for a gate that opens while the text is written."""
    texts = ["The kernel reads a file and the kernel writes it", "内核读取文件"]
    saes = [load_sae(f"{G}/{layer}") for layer in (2, 6)]
    rows = [mini.tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad():
        _, cache = mini.run_with_cache(torch.tensor([rows[0]]))
        codes = saes[0].encode_sparse(cache["blocks.2.hook_resid_post"][0])
    # A feature that is silent on the first tokens after position 0 and fires later.
    dense = codes.to_dense()
    for at in range(4, len(rows[0])):
        new = (dense[at] > 0) & (dense[1:at].max(0).values == 0)
        if new.any():
            break
    feature = int(new.nonzero()[0])
    threshold = float(dense[at, feature]) / 2
    act = f"{G}/6/423:add:60"
    gated = Plan.of(f"{act}@gate={G}/2/{feature}>{threshold}")
    placed = Plan.of(f"{act}@pos={at}-")
    ids = torch.tensor([rows[0]])

    def logits(plan: Plan, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        with torch.no_grad(), steer(mini, plan, saes, must_fire=False):
            return mini.original_model(input_ids=ids, **options).logits

    whole, expected = logits(gated, ids), logits(placed, ids)
    assert torch.allclose(whole, expected, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(whole, mini.original_model(input_ids=ids).logits, atol=1e-2)
    pads = len(rows[0]) - len(rows[1])
    batch = torch.tensor([rows[0], [6000] * pads + rows[1]])
    mask = torch.tensor([[1] * len(rows[0]), [0] * pads + [1] * len(rows[1])])
    padded = logits(gated, batch, attention_mask=mask)
    assert torch.allclose(padded[0], expected[0], atol=1e-4)
    with steer(mini, gated, saes) as report, torch.no_grad():  # token by token
        past, steps = None, []
        for i in range(ids.shape[1]):
            out = mini.original_model(
                input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True
            )
            past = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-4)
    assert report.edits[0].selected == len(rows[0]) - at
    with torch.no_grad():
        begun = mini.original_model(input_ids=ids, use_cache=True).past_key_values
    with steer(mini, gated, saes, must_fire=False), pytest.raises(BadPlan, match="the context"):
        mini.original_model(input_ids=ids[:, :1], past_key_values=begun, use_cache=True)
    with steer(mini, gated, saes, must_fire=False), pytest.raises(BadPlan, match="num_beams=1"):
        mini.original_model.generate(ids, max_new_tokens=2, num_beams=2)
