"""Steering a model: every backend against plain float64 arithmetic, places, reports, manners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import steering_reference as reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import D_MODEL, make_model, make_tokenizer

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import BadPlan, PlanNeverFired, WrongModel
from qwen_scope_lens.models import decoder_layers
from qwen_scope_lens.steering import OPERATIONS, Edit, Plan, Where, steer
from qwen_scope_lens.steering.layer_edits import LayerEdits
from qwen_scope_lens.steering.readers import directions_of, layer_edits
from qwen_scope_lens.steering.token_masks import roles_of, token_classes

NEW = 5
SHORT, LONG = list(b"steer me"), list(b"a longer prompt, really")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> reference.World:
    return reference.write_saes(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _home(world: reference.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(world.home))


def ref(layer: int, feature: int) -> str:
    return f"local/tiny/{layer}/{feature}"


# --- the arithmetic of one layer -----------------------------------------------------------------


def residuals(weights: Any, tokens: int, seed: int) -> torch.Tensor:
    """Of several lengths, with and without the features of interest among the top k."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D_MODEL, generator=rng) * 3 + weights["b_dec"]
    return x + 4 * weights["W_dec"][:, :4].T.repeat(tokens // 4 + 1, 1)[:tokens]


features = st.integers(0, 7)
some_edit = st.builds(
    lambda row, feature, strength, unit: (
        Edit(
            ref(1, feature),
            row.name,
            strength if row.least is None else abs(strength) if row.takes_strength else None,
            row.units[unit % len(row.units)] if row.takes_strength else "raw",
            typical=1.7,
        )
        if row.takes_strength
        else Edit(ref(1, feature), row.name)
    ),
    st.sampled_from(OPERATIONS),
    features,
    st.integers(-24, 24).map(lambda n: n / 8),
    st.integers(0, 2),
)


def agreeing(edits: list[Edit]) -> Plan:
    """A plan of these edits, less those that would decide a feature's activation again."""
    chosen: list[Edit] = []
    for edit in edits:
        reads = edit.operation.reads != "nothing"
        if not reads or all(e.ref != edit.ref or e.operation.reads == "nothing" for e in chosen):
            chosen.append(edit)
    return Plan(chosen)


@given(st.lists(some_edit, min_size=1, max_size=5).map(agreeing), st.integers(0, 10**6))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_operation_is_its_formula(world: Any, plan: Plan, seed: int) -> None:
    weights = world[1]
    x = residuals(weights, 12, seed)
    selected = torch.rand(12, len(plan), generator=torch.Generator().manual_seed(seed)) < 0.7
    new, c = layer_edits(plan.edits).change(x, selected)
    for at in range(len(x)):
        mine = [edit for edit, on in zip(plan.edits, selected[at], strict=True) if on]
        truth = reference.steered_token(x[at], mine, weights)
        torch.testing.assert_close(new[at].double(), truth, rtol=2e-5, atol=2e-4)
    assert bool((c[~selected] == 0).all())
    untouched = (c == 0).all(-1)
    assert torch.equal(new[untouched], x[untouched])


def test_what_happens_outside_the_top_k(world: Any) -> None:
    """The table's word for every operation, on tokens where the feature is silent."""
    weights = world[1]
    x = residuals(weights, 40, 0)
    codes = reference.planted.model_card_encode(weights, x, reference.K)
    silent = codes[:, 9] == 0
    assert 0 < int(silent.sum()) < len(x)
    for row in OPERATIONS:
        edit = Edit(ref(1, 9), row.name, 2.0 if row.takes_strength else None)
        _, c = layer_edits([edit]).change(x, torch.ones(len(x), 1, dtype=torch.bool))
        acts = c[silent, 0] != 0
        assert bool(acts.any()) != row.silent.startswith("nothing"), row.name
        if row.name in ("add", "set", "clamp", "floor"):
            assert torch.equal(c[silent, 0], torch.full((int(silent.sum()),), 2.0))


def test_the_error_of_the_sae_is_kept(world: Any) -> None:
    """x = decode(a) + error before; after a `set` it is decode(a') + the same error."""
    weights = world[1]
    x = residuals(weights, 16, 3).double()
    before = reference.planted.model_card_encode(weights, x, reference.K)
    new, _ = layer_edits([Edit(ref(1, 2), "set", 1.25)]).change(x, torch.ones(16, 1).bool())
    after = before.clone()
    after[:, 2] = 1.25
    decoder = weights["W_dec"].double()
    torch.testing.assert_close(new - after @ decoder.T, x - before @ decoder.T, rtol=0, atol=1e-4)


def test_nothing_is_left_along_projected_directions(world: Any) -> None:
    weights = world[1]
    x = residuals(weights, 8, 5)
    edits = [Edit(ref(1, f), "project_out") for f in (0, 1, 2)]
    new, _ = layer_edits(edits).change(x, torch.ones(8, 3, dtype=torch.bool))
    assert float((new @ weights["W_dec"][:, :3]).abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neutral_strengths_touch_no_bit(world: Any, dtype: torch.dtype) -> None:
    x = residuals(world[1], 16, 1).to(dtype)
    x[0, 0] = -0.0  # an addition of zero would lose the sign
    edits = [
        Edit(ref(1, 0), "add", 0.0),
        Edit(ref(1, 1), "scale", 1.0),
        Edit(ref(1, 2), "floor", 0.0),
    ]
    new, _ = layer_edits(edits).change(x, torch.ones(16, 3, dtype=torch.bool))
    assert new.view(torch.uint8).equal(x.view(torch.uint8))


def test_half_precision_rounds_once(world: Any) -> None:
    x = residuals(world[1], 16, 1).to(torch.bfloat16)
    edits = [Edit(ref(1, f), "add", 0.01) for f in range(8)]
    new, _ = layer_edits(edits).change(x, torch.ones(16, 8, dtype=torch.bool))
    push = 0.01 * world[1]["W_dec"][:, :8].sum(1)
    assert new.dtype == torch.bfloat16
    torch.testing.assert_close(new, (x.float() + push).to(torch.bfloat16), rtol=0, atol=0)


def test_add_reads_decoder_rows_only(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an add loaded an SAE")

    monkeypatch.setattr("qwen_scope_lens.steering.readers.open_sae", refuse)
    edits = [Edit(ref(1, 4), "add", 1.0), Edit(ref(1, 5), "project_out")]
    made = layer_edits(edits)
    assert made.readers == ()
    assert torch.equal(made.directions, world[1]["W_dec"][:, 4:6].T)
    loaded = qsl.load_sae("local/tiny/1")
    assert torch.equal(directions_of(edits, loaded), made.directions)
    with pytest.raises(BadPlan, match="no direction"):
        LayerEdits.build([edits[1]], torch.zeros(1, D_MODEL), {})


def test_a_code_that_is_surely_zero_costs_no_encode(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the change is that of a full encode, at every token."""
    sae, x = qsl.load_sae("local/tiny/1"), residuals(world[1], 64, 5)
    encoded: list[int] = []
    encode = sae.encode_sparse

    def counting(x: torch.Tensor) -> qsl.SparseCodes:
        encoded.append(len(x))
        return encode(x)

    monkeypatch.setattr(sae, "encode_sparse", counting)
    edit = Edit(ref(1, 4), "set", 3.0)
    made = LayerEdits.build([edit], world[1]["W_dec"][:, 4:5].T, {"local/tiny/1": sae})
    c = made.coefficients(x, torch.ones(64, 1, dtype=torch.bool))[:, 0]
    codes = encode(x)
    active = ((codes.indices == 4) & codes.active).any(1)
    positive = x.double() @ world[1]["W_enc"].T[:, 4].double() + world[1]["b_enc"][4] > 0
    assert encoded == [int(positive.sum())]
    assert 0 < int(active.sum()) <= int(positive.sum()) < 64
    torch.testing.assert_close(c, 3 - sae.encode(x)[:, 4])


def test_codes_by_certificate_follow_witnesses_weights_and_hooks(world: Any) -> None:
    sae, x = qsl.load_sae("local/tiny/1"), residuals(world[1], 700, 5)
    edit = Edit(ref(1, 4), "set", 3.0)
    made = LayerEdits.build([edit], world[1]["W_dec"][:, 4:5].T, {"local/tiny/1": sae})
    everywhere = torch.ones(700, 1, dtype=torch.bool)

    def check() -> int:
        c, codes = made.coefficients(x, everywhere)[:, 0], sae.encode(x)[:, 4]
        torch.testing.assert_close(c, 3 - codes)
        return int((codes > 0).sum())

    first = check()
    assert check() == first
    [reader] = made.readers
    assert reader.members.settled["outnumbered"] > 0
    with torch.no_grad():
        sae.b_enc[4] += 5
    second = check()
    sae.hook_sae_acts_pre.add_hook(lambda pre, hook: pre + 7 * (torch.arange(pre.shape[-1]) == 4))
    assert first < second < check()


# --- models --------------------------------------------------------------------------------------

PLANS = {
    "several layers": [
        f"{ref(0, 3)}:add:+2",
        f"{ref(1, 5)}:set:3",
        f"{ref(1, 11)}:ablate",
        f"{ref(2, 8)}:cap:0.5",
        f"{ref(2, 9)}:project_out",
    ],
    "prompt only": [f"{ref(1, 3)}:add:+3@prompt", f"{ref(1, 4)}:add:-0.3norm@prompt"],
    "generation only": [f"{ref(1, 3)}:add:+3@generation", f"{ref(2, 4)}:set:4@generation"],
    "positions": [f"{ref(1, 3)}:add:+3@pos=0+-2-", f"{ref(2, 5)}:floor:2@pos=3-4"],
}


def chosen(edit: Edit, row: int, at: int, lengths: tuple[int, ...]) -> bool:
    """The plain meaning of the places used in PLANS."""
    where, prompt = edit.where, lengths[row]
    if where.phase == "prompt" and at >= prompt:
        return False
    if where.phase == "generation" and at < prompt:
        return False
    if where.positions is None:
        return at > 0
    return any(
        at >= (start if start >= 0 else prompt + start)
        and (stop is None or at < (stop if start >= 0 else prompt + stop))
        for start, stop in where.positions
    )


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[256] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def no_end(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=["Qwen3ForCausalLM", "Qwen3_5ForConditionalGeneration"])
def model(request: Any) -> Any:
    return no_end(make_model(request.param, dtype=torch.float64))


@pytest.mark.parametrize("name", PLANS)
def test_all_backends_do_the_same(world: Any, model: Any, name: str) -> None:
    plan = Plan(PLANS[name])
    lengths = (len(SHORT), len(LONG))

    def on(edit: Edit, row: int, at: int) -> bool:
        return chosen(edit, row, at, lengths)

    truth = reference.generate(model, [SHORT, LONG], plan.edits, world, on, NEW)
    plain = reference.generate(model, [SHORT, LONG], [], world, on, NEW)
    assert truth != plain
    logits = reference.run(model, [LONG], plan.edits, world, lambda e, r, at: on(e, 1, at))[0]
    batch, alone = padded([SHORT, LONG]), {"input_ids": torch.tensor([LONG])}
    found = {}
    for cache in (True, False):
        with steer(model, plan):
            out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, use_cache=cache)
        found["hf", cache] = out[:, -NEW:].tolist()
    with steer(model, plan, must_fire=name != "generation only"), torch.no_grad():
        torch.testing.assert_close(model(**alone).logits[0], logits, rtol=0, atol=2e-4)
    bridge = qsl.load_model(model, tokenizer=make_tokenizer())
    try:
        for cache in (True, False):
            with steer(bridge, plan):
                out = bridge.generate(
                    batch["input_ids"],
                    max_new_tokens=NEW,
                    do_sample=False,
                    verbose=False,
                    attention_mask=batch["attention_mask"],
                    use_past_kv_cache=cache,
                    stop_at_eos=False,
                )
            found["bridge", cache] = out[:, -NEW:].tolist()
        seen = []
        with steer(bridge, plan, must_fire=name != "generation only"), torch.no_grad():
            got = bridge.run_with_hooks(
                alone["input_ids"],
                fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: seen.append(x.clone()))],
            )[0]
        torch.testing.assert_close(got, logits, rtol=0, atol=2e-4)
    finally:
        bridge.release()
    assert found == dict.fromkeys(found, truth)
    assert seen[0].shape == (1, len(LONG), D_MODEL)


def test_a_bridge_with_all_hook_points(world: Any) -> None:
    model = no_end(make_model(dtype=torch.float64))
    plan = Plan(PLANS["several layers"])
    truth = reference.run(model, [LONG], plan.edits, world, lambda e, r, at: at > 0)[0]
    bridge = qsl.load_model(model, tokenizer=make_tokenizer(), full_hooks=True)
    with steer(bridge, plan), torch.no_grad():
        got = bridge(torch.tensor([LONG]))[0]
    torch.testing.assert_close(got, truth, rtol=0, atol=2e-4)


def test_rows_with_plans_of_their_own(world: Any, model: Any) -> None:
    plans = [
        Plan([f"{ref(1, 3)}:add:+4"]),
        None,
        Plan([f"{ref(1, 5)}:set:6", f"{ref(2, 3)}:ablate"]),
    ]
    rows = [SHORT, LONG, SHORT]
    truth = []
    for row, one in zip(rows, plans, strict=True):
        edits = one.edits if one else ()
        truth += reference.generate(model, [row], edits, world, lambda e, r, at: at > 0, NEW)
    batch = padded(rows)
    with steer(model, plans) as report:
        out = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        twice = model.generate(
            **batch, max_new_tokens=NEW, do_sample=False, num_beams=2, num_return_sequences=1
        )
    assert out[:, -NEW:].tolist() == truth
    assert twice.shape == out.shape
    assert [row.edit for row in report.edits] == [e for one in plans if one for e in one.edits]
    with (
        pytest.raises(BadPlan, match="3 plans were given for the 2 rows of the batch"),
        steer(model, plans),
    ):
        model(torch.tensor([SHORT, SHORT]))


def test_a_cache_carried_by_hand(world: Any, model: Any) -> None:
    """A loop of one's own over `past_key_values` counts columns as `generate` does."""
    plan = Plan([f"{ref(1, 3)}:add:+4@generation"])
    ids = torch.tensor([SHORT])
    with steer(model, plan):
        truth = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, len(SHORT) :].tolist()
    found, past = [], None
    with steer(model, plan), torch.no_grad():
        for _ in range(NEW):
            out = model(ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(int(ids))
    assert found == truth


def test_arguments_by_position_are_understood(world: Any, model: Any) -> None:
    plan, batch = Plan([f"{ref(1, 3)}:add:+4@pos=0"]), padded([SHORT, LONG])
    with torch.no_grad(), steer(model, plan) as report:
        named = model(**batch).logits
        placed = model(batch["input_ids"], batch["attention_mask"]).logits
    assert torch.equal(named, placed)
    assert report.edits[0].fired == 4  # the first real token of each row, twice


def test_neutral_plans_leave_the_logits_alone(world: Any) -> None:
    model = make_model(dtype=torch.bfloat16)
    ids = torch.tensor([LONG])
    with torch.no_grad():
        before = model(ids).logits
        with steer(model, Plan([f"{ref(1, 3)}:add:0", f"{ref(2, 3)}:scale:1"])) as report:
            assert torch.equal(model(ids).logits, before)
        assert [row.selected for row in report.edits] == [len(LONG) - 1] * 2
        assert [row.fired for row in report.edits] == [0, 0]
        # A bfloat16 model with float32 SAEs keeps its dtype.
        with steer(model, Plan([f"{ref(1, 3)}:set:3"])):
            assert model(ids).logits.dtype == torch.bfloat16


def test_order_does_not_matter(world: Any) -> None:
    model = make_model()
    ids, edits = torch.tensor([LONG]), [*PLANS["several layers"], f"{ref(1, 20)}:add:0.2norm"]
    logits = []
    for order in (edits, edits[::-1]):
        with steer(model, Plan(order)), torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_the_report_counts_and_measures(world: Any) -> None:
    model = make_model()
    plan = Plan([f"{ref(1, 3)}:add:-3", f"{ref(1, 4)}:add:0.25norm", f"{ref(2, 60)}:ablate"])
    with steer(model, plan) as report:
        model.generate(torch.tensor([LONG]), max_new_tokens=NEW, min_new_tokens=NEW)
    added, normed, ablated = report.edits
    tokens = len(LONG) - 1 + NEW - 1  # the first is skipped, the last is never run
    assert added.selected == added.fired == normed.fired == ablated.selected == tokens
    length = float(world[1]["W_dec"][:, 3].norm())
    assert added.moved == pytest.approx(3 * length, rel=1e-5)
    assert normed.share == pytest.approx(0.25, rel=1e-5)
    assert ablated.fired < tokens
    assert f"fired on {tokens} of {tokens} tokens" in str(report)


def test_a_plan_that_never_fired_raises(world: Any) -> None:
    model = make_model()
    ids = torch.tensor([SHORT])
    with (
        pytest.raises(PlanNeverFired, match="did not run"),
        steer(model, Plan([f"{ref(1, 3)}:ablate"])),
    ):
        pass
    never = Plan([f"{ref(1, 3)}:add:2@generation"])
    with pytest.raises(PlanNeverFired, match="no token was selected"), steer(model, never):
        model(ids)
    with steer(model, never, must_fire=False) as report:
        model(ids)
    assert not report.fired
    with pytest.raises(RuntimeError, match="my own"), steer(model, never):
        raise RuntimeError("my own")


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("bridged", [False, True])
def test_nothing_stays_behind(world: Any, bridged: bool) -> None:
    hf = make_model()
    model = qsl.load_model(hf, tokenizer=make_tokenizer()) if bridged else hf
    before, names = hooks_of(model), set(vars(model)) | set(vars(hf))
    plan = Plan([f"{ref(1, 3)}:add:2", f"{ref(2, 3)}:set:2"])
    with steer(model, plan):
        model(torch.tensor([SHORT]))
        assert hooks_of(model) > before
        with pytest.raises(BadPlan, match="active"), steer(model, plan):
            pass
    with pytest.raises(ZeroDivisionError), steer(model, plan):
        raise ZeroDivisionError
    broken = Plan([f"{ref(1, 3)}:add:2", f"{ref(2, 3)}:set:2typical"])
    with pytest.raises(BadPlan, match="calibrat"), steer(model, broken):
        model(torch.tensor([SHORT]))
    assert hooks_of(model) == before
    assert set(vars(model)) | set(vars(hf)) == names


def test_features_of_another_model_are_refused(world: Any) -> None:
    with (
        pytest.raises(WrongModel, match="d_model"),
        steer(make_model(), "mini-qwen3/w1k-l0-16/1/3:ablate"),  # an edit as text is a plan
    ):
        pass
    shallow = make_model(num_hidden_layers=2)
    with pytest.raises(WrongModel, match=r"0\.\.1"), steer(shallow, Plan([f"{ref(3, 3)}:ablate"])):
        pass


# --- token classes and roles ---------------------------------------------------------------------


def test_token_classes_by_text() -> None:
    assert token_classes(" word") == {"letter", "latin"}
    assert token_classes("中文") == {"letter", "han"}
    assert token_classes("かな") == {"letter", "kana"}
    assert token_classes("한글") == {"letter", "hangul"}
    assert token_classes("слово") == {"letter", "cyrillic"}
    assert token_classes("عربي") == {"letter", "arabic"}
    assert token_classes("3") == {"digit"}
    assert token_classes("，") == {"punctuation"}
    assert token_classes(" ?!") == {"punctuation"}
    assert token_classes("😀") == {"punctuation"}
    assert token_classes("\n\n") == {"space", "newline"}
    assert token_classes("\ufffd") == {"fragment"}
    assert token_classes("<|im_end|>", special=True) == {"special"}


def test_classes_and_roles_select_tokens(world: Any) -> None:
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "a1 b2"}, {"role": "assistant", "content": "c3"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    roles = roles_of(ids, tokenizer)
    assert tokenizer.decode([i for i, r in zip(ids, roles, strict=True) if r == "user"]) == "a1 b2"
    model = make_model()
    edits = [
        Edit(ref(1, 0), "add", 1.0, where="role=user"),
        Edit(ref(1, 1), "add", 1.0, where="class=digit"),
        Edit(ref(1, 2), "add", 1.0, where="class=digit,role=user"),
        Edit(ref(1, 3), "add", 1.0, where=Where(token_ids=tokenizer("cb")["input_ids"])),
        Edit(ref(1, 4), "add", 1.0, where="class=special,first"),
        Edit(ref(1, 5), "add", 1.0, where="role=assistant,generation"),
    ]
    with steer(model, Plan(edits), tokenizer=tokenizer) as report:
        model(torch.tensor([ids]))
    assert [row.selected for row in report.edits] == [5, 3, 2, 2, 4, 0]
    opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(opened)["input_ids"]])
    no_end(model)
    with steer(model, Plan([edits[5]]), tokenizer=tokenizer) as report:
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    made = out[0, ids.shape[1] : -1].tolist()
    known = roles_of(out[0].tolist(), tokenizer)[ids.shape[1] : -1]
    assert report.edits[0].selected == sum(role == "assistant" for role in known)
    assert len(made) == NEW - 1


def test_embeddings_have_no_tokens_to_select_by(world: Any) -> None:
    model = make_model()
    embeds = model.get_input_embeddings()(torch.tensor([SHORT]))
    with steer(model, Plan([f"{ref(1, 3)}:add:2"])) as report:
        model(inputs_embeds=embeds)
    assert report.edits[0].fired == len(SHORT) - 1
    with (
        pytest.raises(BadPlan, match="embeddings"),
        steer(model, Plan([f"{ref(1, 3)}:add:2@class=digit"]), tokenizer=make_tokenizer()),
    ):
        model(inputs_embeds=embeds)


def test_a_mask_is_a_place(world: Any) -> None:
    model = make_model()
    where = Where.mask([1, 0, 0, 1, 1])
    with steer(model, Edit(ref(1, 3), "add", 2.0, where=where)) as report:
        model(torch.tensor([SHORT]))
    assert report.edits[0].fired == 3


def test_gradients_flow_through_a_plan(world: Any, tmp_path: Path) -> None:
    model = make_model()
    with steer(model, Plan([f"{ref(1, 3)}:set:2", f"{ref(1, 5)}:add:1"])):
        model(torch.tensor([SHORT])).logits.sum().backward()
    first: Any = decoder_layers(model)[0]
    grad = first.mlp.down_proj.weight.grad
    assert grad is not None
    assert bool(grad.abs().sum() > 0)
