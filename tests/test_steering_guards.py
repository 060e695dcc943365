"""Plans on compiled models, in threads, on copies, and with SAEs of another layer or model."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import steering_reference as reference
import torch
from tiny_models import make_model, make_sae, make_tokenizer
from torch.utils.checkpoint import checkpoint
from transformers import CompileConfig

import qwen_scope_lens as qsl
from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.catalog import GROUPS, find_group
from qwen_scope_lens.cli.verbs import main
from qwen_scope_lens.errors import BadFile, BadPlan, PlanBypassed, UnknownName, WrongModel
from qwen_scope_lens.models import decoder_layers
from qwen_scope_lens.models.backbone import check_backbone, check_name
from qwen_scope_lens.models.eager import eagerly
from qwen_scope_lens.steering import (
    Edit,
    Plan,
    Sampling,
    Where,
    blame,
    calibrate,
    generate,
    steer,
    sweep,
)
from qwen_scope_lens.steering.blame import Case
from qwen_scope_lens.steering.doses import Measure, parse_strengths
from qwen_scope_lens.steering.hooks import is_steered
from qwen_scope_lens.steering.readers import by_address

SHORT, LONG = list(b"steer me"), list(b"a longer prompt, really")
NEW = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reference.write_saes(tmp_path_factory.mktemp("guards")).home


@pytest.fixture(autouse=True)
def _home(home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(home))


def ref(layer: int, feature: int) -> str:
    return f"local/tiny/{layer}/{feature}"


def one_edit() -> Plan:
    return Plan([f"{ref(0, 3)}:add:4"])


def two_edits() -> Plan:
    return Plan([f"{ref(0, 3)}:add:4", f"{ref(1, 5)}:set:9"])


def model_of_two_layers(**changes: Any) -> Any:
    model = make_model(num_hidden_layers=2, **changes)
    model.generation_config.eos_token_id = None
    return model


def logits(model: Any, ids: list[int] = LONG) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits
    return found


def allowed(model: Any, plan: Plan, **options: Any) -> Any:
    return steer(model, plan, allow_other_model=True, **options)


# --- compiled models -----------------------------------------------------------------------------


class Graphs:
    """A back end for torch.compile that counts how often its graphs run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, module: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return module.forward(*args)

        return run


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def _whole(model: Any, graphs: Graphs) -> Any:
    return torch.compile(model, backend=graphs)


def _in_place(model: Any, graphs: Graphs) -> Any:
    model.compile(backend=graphs)
    return model


def _forward(model: Any, graphs: Graphs) -> Any:
    model.forward = torch.compile(model.forward, backend=graphs)
    return model


def _layers(model: Any, graphs: Graphs) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=graphs)
    return model


@pytest.mark.parametrize("compiled", [_whole, _in_place, _forward, _layers])
def test_compiled_models_are_steered_read_and_hooked(
    compiled: Callable[[Any, Graphs], Any], graphs: Graphs
) -> None:
    plain, model = model_of_two_layers(), compiled(model_of_two_layers(), graphs)
    base = logits(plain)
    assert torch.equal(logits(model), base)  # a graph without any hook is there now
    warm = graphs.runs
    assert warm > 0
    for plan in (one_edit(), two_edits()):
        with allowed(plain, plan) as expected:
            truth = logits(plain)
        with allowed(model, plan) as report:
            assert torch.equal(logits(model), truth)
        assert str(report) == str(expected)
        assert not torch.equal(truth, base)
    read = qsl.capture(model, [LONG], [0, 1])
    truth_read = qsl.capture(plain, [LONG], [0, 1])
    assert all(torch.equal(read.residuals[n], truth_read.residuals[n]) for n in (0, 1))
    assert graphs.runs == warm
    assert torch.equal(logits(model), base)
    assert graphs.runs == 2 * warm  # the graph serves again

    hook = [("blocks.1.hook_resid_post", lambda x, hook: 1.5 * x)]
    bridge = qsl.load_model(model, tokenizer=make_tokenizer())
    other = qsl.load_model(plain, tokenizer=make_tokenizer())
    ids = torch.tensor([LONG])
    with torch.no_grad():
        hooked = bridge.run_with_hooks(ids, fwd_hooks=hook)
        assert torch.equal(hooked, other.run_with_hooks(ids, fwd_hooks=hook))
        assert torch.equal(bridge(ids), base)
        if compiled is _whole:
            again = torch.compile(bridge, backend=graphs)
            assert torch.equal(again(ids), base)
            with bridge.hooks(fwd_hooks=hook):
                assert torch.equal(again(ids), hooked)


def test_a_decode_step_that_generate_compiles_is_steered(graphs: Graphs) -> None:
    config = CompileConfig(fullgraph=False, backend=lambda *a, **k: graphs(*a, **k))
    config._compile_all_devices = True  # as on a GPU
    static = {"cache_implementation": "static", "compile_config": config}
    ids = torch.tensor([[256] * (len(LONG) - len(SHORT)) + SHORT, LONG])
    mask = (ids != 256).long()

    def run(model: Any, **options: Any) -> Any:
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options
        )

    plain, model = model_of_two_layers(), model_of_two_layers()
    base = run(plain)
    assert torch.equal(run(model, **static), base)
    warm = graphs.runs
    assert warm == NEW - 1
    for edit in ("add:4", "add:4@generation", "add:4@pos=1-3+-1"):
        plan = Plan([f"{ref(0, 3)}:{edit}"])
        with allowed(plain, plan) as expected:
            truth = run(plain)
        with allowed(model, plan) as report:
            assert torch.equal(run(model, **static), truth)
        assert str(report) == str(expected)
    assert graphs.runs == warm
    assert torch.equal(run(model, **static), base)
    assert graphs.runs > warm


def test_passes_that_the_plan_did_not_see_are_an_error() -> None:
    """Counted apart from the hooks: at the model's end, at a compiled wrapper, at `generate`'s."""
    model, ids = model_of_two_layers(), torch.tensor([SHORT])
    layers = decoder_layers(model)
    own = layers[1].forward
    never = pytest.raises(PlanBypassed, match="not called at layer 1")
    with never, allowed(model, two_edits(), must_fire=False):
        layers[1]._compiled_call_impl = own  # as a graph does: it runs the layer and no hook
        logits(model)
    layers[1]._compiled_call_impl = None
    with allowed(model, one_edit()):
        model(ids)  # seen
        model._compiled_call_impl = model.forward
        model.model._compiled_call_impl = model.model.forward
        layers[0]._compiled_call_impl = layers[0].forward
        with pytest.raises(PlanBypassed, match="0 of the 5 runs"):
            model.generate(ids, max_new_tokens=NEW, do_sample=False)
    for module in (model, model.model, layers[0]):
        module._compiled_call_impl = None
    whole: Any = torch.compile(model, backend="eager")
    whole.forward = lambda ids: None  # a graph that was exported
    with (
        pytest.raises(PlanBypassed, match="did nothing"),
        allowed(whole, one_edit(), must_fire=False),
    ):
        whole(ids)
    layers[0]._compiled_call_impl = layers[0].forward
    with pytest.raises(WrongModel, match=r"layers \[0\] were not seen"):
        qsl.capture(model, [SHORT], [0])


def test_the_compilers_stance_is_given_back() -> None:
    """Blocks of several threads overlap, and end in any order."""
    graphs, first, second = Graphs(), eagerly(), eagerly()
    double = torch.compile(lambda x: 2 * x, backend=graphs)
    first.__enter__()
    second.__enter__()
    double(torch.ones(3))
    first.__exit__(None, None, None)
    double(torch.ones(3))
    assert graphs.runs == 0
    second.__exit__(None, None, None)
    double(torch.ones(3))
    assert graphs.runs == 1

    @torch.compile(backend="eager")
    def inside(x: torch.Tensor) -> torch.Tensor:
        with eagerly():
            return x + 1

    with pytest.raises(WrongModel, match="outside of torch"):
        inside(torch.ones(1))


# --- threads and caches --------------------------------------------------------------------------


class InStep:
    """Lets two threads' passes begin before either goes on."""

    def __init__(self, model: Any) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._handle = decoder_layers(model)[0].register_forward_pre_hook(self._wait)

    def _wait(self, module: Any, args: Any) -> None:
        self._barrier.wait()

    def run(self, jobs: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def one(name: str) -> None:
            try:
                found[name] = jobs[name]()
            except Exception as error:
                found[name] = error
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(name,)) for name in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._handle.remove()
        return found


def continued(model: Any, ids: list[int]) -> list[int]:
    out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
    found: list[int] = out[0, len(ids) :].tolist()
    return found


@pytest.mark.parametrize("where", ["both", "generation", "pos=2-3+-1", "class=letter"])
def test_threads_generate_under_one_plan(where: str) -> None:
    model = model_of_two_layers()
    plan = Plan([f"{ref(1, 3)}:add:6@{where}"])
    prompts, truth, counts = {"short": SHORT, "long": LONG}, {}, 0
    for name, ids in prompts.items():
        with allowed(model, plan, tokenizer=make_tokenizer()) as report:
            truth[name] = continued(model, ids)
        counts += report.edits[0].selected
    step = InStep(model)
    with allowed(model, plan, tokenizer=make_tokenizer()) as report:
        found = step.run({n: partial(continued, model, ids) for n, ids in prompts.items()})
    assert found == truth
    assert report.edits[0].selected == counts


def test_threads_read_one_model() -> None:
    model = model_of_two_layers()
    truth = {"0": qsl.capture(model, [LONG], [0]), "1": qsl.capture(model, [LONG[::-1]], [1])}
    found = InStep(model).run(
        {
            "0": lambda: qsl.capture(model, [LONG], [0]),
            "1": lambda: qsl.capture(model, [LONG[::-1]], [1]),
        }
    )
    for name, layer in (("0", 0), ("1", 1)):
        assert torch.equal(found[name].residuals[layer], truth[name].residuals[layer])


def test_texts_by_turns_keep_their_own_prompts() -> None:
    """Two loops of one's own over two caches, step by step: each as if it were alone."""
    model = model_of_two_layers()
    plan = Plan([f"{ref(1, 3)}:add:6@generation", f"{ref(0, 5)}:add:6@pos=-1"])

    def follow(*texts: list[int]) -> list[list[torch.Tensor]]:
        state: list[Any] = [(torch.tensor([ids]), None) for ids in texts]
        found: list[list[torch.Tensor]] = [[] for _ in texts]
        with allowed(model, plan), torch.no_grad():
            for _ in range(NEW):
                for turn, (ids, past) in enumerate(state):
                    out = model(ids, past_key_values=past, use_cache=True)
                    found[turn].append(out.logits[0, -1])
                    state[turn] = (out.logits[:, -1:].argmax(-1), out.past_key_values)
        return found

    alone = [*follow(SHORT), *follow(LONG)]
    for mine, truth in zip(follow(SHORT, LONG), alone, strict=True):
        assert torch.equal(torch.stack(mine), torch.stack(truth))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_belong_to_their_own_pass(reentrant: bool) -> None:
    """Gradient checkpointing: two passes forward, then both backward, in a thread of autograd's.

    transformers 5.23 checkpoints a layer's `forward`; where its call is, hooks run again, too.
    """
    grads = []
    for checkpointing in (False, True):
        model = model_of_two_layers()
        if checkpointing:
            for layer in decoder_layers(model):
                layer.__class__ = _checkpointed(type(layer), reentrant)
                layer.gradient_checkpointing = True  # type: ignore[assignment]
        with allowed(model, Plan([f"{ref(1, 3)}:add:60@pos=1-2"])) as report:
            texts = [model.get_input_embeddings()(torch.tensor([SHORT])) for _ in range(2)]
            masks = [[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]
            loss = sum(
                model(inputs_embeds=text, attention_mask=torch.tensor([mask]), use_cache=False)
                .logits.pow(2)
                .sum()
                for text, mask in zip(texts, masks, strict=True)
            )
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        assert report.passes == (4 if checkpointing else 2)
        first: Any = decoder_layers(model)[0]
        grads.append(first.mlp.down_proj.weight.grad)
    torch.testing.assert_close(grads[1], grads[0])


def _checkpointed(cls: Any, reentrant: bool) -> Any:
    class Again(cls):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            again = partial(super().__call__, **kwargs)
            return checkpoint(again, *args, use_reentrant=reentrant)

    return Again


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bridged", [False, True])
def test_a_copy_of_a_steered_model_is_refused(bridged: bool) -> None:
    model = model_of_two_layers()
    if bridged:
        model = qsl.load_model(model, tokenizer=make_tokenizer())
    with allowed(model, one_edit(), must_fire=False):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(WrongModel, match="before or after the block"):
                copied(model)
        if not bridged:
            with pytest.raises(WrongModel, match="before or after the block"):
                copy.deepcopy(decoder_layers(model)[0])
            shallow = copy.copy(model)
    if not bridged:
        assert not is_steered(shallow)
        with pytest.raises(WrongModel, match="the original's"):
            shallow.generate(torch.tensor([SHORT]))
        clean = copy.deepcopy(model)
        assert torch.equal(logits(clean), logits(model))
        assert "generate" not in vars(clean)
        for weight in clean.parameters():
            weight.data.zero_()
        assert continued(clean, SHORT) != continued(model, SHORT)


def test_other_ways_of_running_a_steered_model_are_refused() -> None:
    model = model_of_two_layers()
    with allowed(model, one_edit(), must_fire=False):
        with pytest.raises(WrongModel, match="packs the tokens"):
            model.generate_batch([SHORT])
        replica = model._replicate_for_data_parallel()  # as DataParallel on two devices
        with pytest.raises(WrongModel, match="replicas"):
            replica(torch.tensor([SHORT]))
    assert "generate_batch" not in vars(model)


# --- whose SAE, whose model ----------------------------------------------------------------------


def test_an_sae_serves_its_own_address_only() -> None:
    one, two = qsl.load_sae("local/tiny/0"), qsl.load_sae("local/tiny/1")
    assert by_address([one, two]) == by_address({"local/tiny/0": one, "local/tiny/1": two})
    with pytest.raises(BadPlan, match="its address is local/tiny/0, expected local/tiny/1"):
        by_address({"local/tiny/1": one})
    nameless = copy.deepcopy(one)
    nameless.cfg.metadata.qwen_scope_ref = None
    with pytest.raises(BadPlan, match="do not name its address"):
        by_address([nameless])
    with pytest.raises(BadPlan, match=r"its hook is blocks\.0\.hook_resid_post"):
        by_address({"local/tiny/1": nameless})
    assert by_address({"local/tiny/0": nameless}) == {"local/tiny/0": nameless}
    nameless.cfg.metadata.model_name = "somebody/another"
    with pytest.raises(BadPlan, match="its model is somebody/another"):
        by_address({"local/tiny/0": nameless})
    with pytest.raises(BadPlan, match="two SAEs"):
        by_address([one, copy.deepcopy(one)])
    two.cfg.k = 3
    with pytest.raises(BadPlan, match="d_in, d_sae and k"):
        by_address(two)
    with pytest.raises(BadPlan, match="found TopKSAE"):
        by_address([make_sae(1)])


SHORTS = {group.backbone.key: group.short for group in GROUPS}


@pytest.mark.parametrize(
    ("trained_on", "name", "verdict"),
    [
        ("qwen3-8b-base", "Qwen/Qwen3-8B-Base", "same"),
        ("qwen3-8b-base", "Qwen/Qwen3-8B", "same"),
        ("qwen3-8b-base", "/models/qwen3_8b-AWQ/", "same"),
        ("qwen3-8b-base", "/c/models--Qwen--Qwen3-8B/snapshots/0123", "same"),
        ("qwen3-30b-a3b-base", "Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "same"),
        ("qwen3.5-27b", "Qwen/Qwen3.6-27B", "other"),
        ("qwen3.6-27b", "Qwen/Qwen3.5-27B-Base", "other"),
        ("qwen3.5-2b-base", "Qwen/Qwen3-1.7B", "other"),
        ("qwen3.5-35b-a3b-base", "Qwen/Qwen3.5-2B", "other"),
        ("qwen3.5-27b", "somebody/Qwen3.6-27B-our-tune", "other"),
        ("qwen3-8b-base", "somebody/Qwen3-8B-our-tune", "unknown"),
        ("qwen3-8b-base", "/runs/checkpoint-4000", "unknown"),
        ("mini-qwen3", "/x/mini-qwen3", "same"),
        ("mini-qwen3", "/x/mini-qwen3.5", "other"),
    ],
)
def test_names_tell_models_apart(trained_on: str, name: str, verdict: str) -> None:
    group = find_group(SHORTS[trained_on])
    if verdict == "other":
        with pytest.raises(WrongModel, match="allow_other_model=True"):
            check_name(name, group)
    elif verdict == "unknown":
        with pytest.warns(UserWarning, match="cannot be known"):
            check_name(name, group)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_name(name, group)


def test_features_of_another_backbone_are_refused() -> None:
    """Of one width: only family, depth and name tell the two minis apart."""
    model = qsl.load_model("mini-qwen3")
    wrong, edit = "mini-qwen3.5/w1k-l0-16/6", "mini-qwen3.5/w1k-l0-16/6/12:add:4"
    for use in (
        lambda **flag: steer(model, Plan([edit]), must_fire=False, **flag).__enter__(),
        lambda **flag: generate(model, ["a text"], Plan([edit]), **flag),
        lambda **flag: calibrate(model, [wrong], ["a text of some words"], **flag),
        lambda **flag: blame(model, [wrong], [Case("a text", "of some words")], **flag),
    ):
        with pytest.raises(WrongModel, match="it is of the family qwen3, not qwen3_5"):
            use()
    with allowed(model, Plan([edit])):
        model(model.to_tokens("a text of some words"))
    # Base and instruct versions, cut models and nameless ones of one's own are not refused.
    check_backbone(qsl.load_model("mini-qwen3", up_to_layer=2), find_group(SHORTS["mini-qwen3"]))
    with (
        pytest.warns(UserWarning, match="cannot be known"),
        steer(make_model(), one_edit(), must_fire=False),
    ):
        pass
    with pytest.raises(WrongModel, match="it has 5 layers, not 4"):
        check_backbone(make_model(num_hidden_layers=5), find_group("local/tiny"))


# --- numbers and names that nobody means ---------------------------------------------------------

DIGITS, HALF = "7" * 5000, "\ud800"
MINE = ref(1, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Edit(MINE, "add", 10**400),
        lambda: Edit(MINE, "add", 10**5000),
        lambda: Edit(MINE, "add", 1.0, "typical", typical=10**400),
        lambda: Plan([f"{MINE}:add:1"]).times(10**400),
        lambda: Plan.from_dict({"edits": [{"ref": MINE, "op": "add", "strength": 10**5000}]}),
        lambda: Plan.from_dict({"edits": [{"op": "add", "strength": 10**5000}]}),
        lambda: Plan([f"{MINE}:add:{DIGITS}"]),
        lambda: Plan([f"{MINE}:add:1@pos={DIGITS}"]),
        lambda: Edit(MINE, "a" * 5000, 1.0),
        lambda: Plan([f"{MINE}:add:1@token={DIGITS}"]),
        lambda: Plan([f"{MINE}:add:1@role={HALF}"]),
        lambda: Where(positions=10**5000),
        lambda: Where(positions=((0, 2**31),)),
        lambda: Where(token_ids=(2**70,)),
        lambda: Where(roles=HALF),
        lambda: parse_strengths(DIGITS),
        lambda: parse_strengths("0:1e9999999:1e-9999999"),
        lambda: Measure.parse(f"regex=a{{{DIGITS}}}"),
        lambda: Measure.parse(f"regex={HALF}"),
        lambda: Sampling(seed=2**70),
        lambda: Sampling(temperature=10**400),
        lambda: Sampling(new_tokens=10**5000),
        lambda: sweep(None, one_edit(), [1.0], ["a"], seed=2**70),
        lambda: steer(None, one_edit(), control=10**5000).__enter__(),
    ],
)
def test_absurd_numbers_in_plans(make: Callable[[], Any]) -> None:
    with pytest.raises(BadPlan) as found:
        make()
    assert len(str(found.value)) < 500


def test_absurd_numbers_in_files_and_addresses(tmp_path: Path) -> None:
    for text in (f"local/tiny/{DIGITS}", f"local/tiny/layer{DIGITS}"):
        with pytest.raises(UnknownName):
            LayerRef.parse(text)
    with pytest.raises(UnknownName):
        FeatureRef.parse(f"local/tiny/1/{DIGITS}")
    path = tmp_path / "plan.json"
    for field in (
        f'"strength": {DIGITS}',
        '"strength": 1e400',
        '"strength": 1, "where": "role=\\ud800"',
    ):
        row = f'{{"ref": "{MINE}", "op": "add", {field}}}'
        path.write_text(f'{{"format": "qsl-plan", "version": 1, "edits": [{row}]}}')
        with pytest.raises(BadFile, match="plan"):
            Plan.load(path)


def test_the_command_line_asks_before_it_takes_another_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["steer", "a text", "--model", "mini-qwen3", "--new-tokens", "2"]
    command += ["--edit", "mini-qwen3.5/w1k-l0-16/6/12:add:4"]
    assert main(command) != 0
    assert "--allow-other-model" in capsys.readouterr().err
    assert main([*command, "--allow-other-model"]) == 0
    assert "fired on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--allow-other-model", "--seed", str(2**70)])
    assert "below 2^63" in capsys.readouterr().err
