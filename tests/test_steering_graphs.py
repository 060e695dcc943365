"""Plans as graphs of fixed shapes, and chosen features read from a serving engine."""

from __future__ import annotations

import asyncio
import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import planted
import pytest
import steering_reference as reference
import torch
from test_membership import D_IN, random_sae
from tiny_models import D_MODEL, make_model, make_tokenizer
from torch import Tensor, nn

from qwen_scope_lens.errors import (
    BadPlan,
    BadText,
    PlanBypassed,
    UnknownName,
    UnsupportedSAE,
    WrongModel,
)
from qwen_scope_lens.saes import FixedMembership, load_sae
from qwen_scope_lens.saes.fixed_shapes import CONTESTED
from qwen_scope_lens.steering import Plan
from qwen_scope_lens.steering.readers import layer_edits
from qwen_scope_lens.steering.runtimes import (
    WORKER,
    ScopeWorker,
    graph_edits,
    read_engine,
    report_of,
    request_flags,
    steer_engine,
)

EDITS = "3:set:2 4:ablate 5:cap:0.5 6:add:1 7:scale:2 8:floor:1 9:add:0.3norm 10:project_out"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = list(b"some text to steer")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reference.write_saes(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(autouse=True)
def _home(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(world.home))


def plan_of(*edits: str) -> Plan:
    return Plan([f"local/tiny/{edit}" for edit in edits])


# --- a few features, in fixed shapes -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
def test_fixed_shapes_equal_a_full_encode(whole: bool, subtract: bool, dtype: torch.dtype) -> None:
    """With whole numbers scores are often equal, and the lower feature has to win."""
    sae, features = random_sae(3, subtract, whole).to(dtype), [0, 5, 40, 95]
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1))
    x = ((2 * x).round() if whole else x).to(torch.bfloat16)
    right = sae.encode_sparse(x).to_dense()[:, features]
    wanted = torch.ones(300, 4, dtype=torch.bool)
    wanted[::7, 1] = False
    undecided = {}
    for capacity in (None, 250, 4):
        values, open_ = FixedMembership(sae, features, capacity, x)(x, wanted)
        asked = wanted & ~open_
        torch.testing.assert_close(values, torch.where(asked, right, 0), rtol=1e-6, atol=1e-6)
        assert torch.equal(values > 0, asked & (right > 0))
        undecided[capacity] = int(open_.sum())
        assert not bool((open_ & ~wanted).any())
    assert undecided[None] == undecided[250] == 0
    assert 0 < undecided[4] < 300


def test_what_float32_cannot_order_is_computed_again_or_said() -> None:
    """Two features differ by less than the product's error at every position."""
    sae, k = random_sae(0), 5
    with torch.no_grad():
        sae.W_enc[:, 7] = sae.W_enc[:, 3] * (1 + 2.0**-22)
        sae.b_enc[[3, 7]] = 0
    x = torch.randn(8000, D_IN, generator=torch.Generator().manual_seed(2))
    indices = sae.encode_sparse(x).indices
    last = ((indices == 7).any(1) & ~(indices == 3).any(1)).nonzero().squeeze(1)
    assert len(last) > CONTESTED  # 7 takes the last place, and 3 misses it
    reader = FixedMembership(sae, [3, 7])
    few, many = x[last[:CONTESTED]], x[last]
    for rows, missed in ((few, 0), (many, 2 * (len(many) - CONTESTED))):
        values, open_ = reader(rows, torch.ones(len(rows), 2, dtype=torch.bool))
        assert int(open_.sum()) == missed
        assert not bool(values[:, 0].any())
        assert torch.equal(values[:, 1] > 0, ~open_[:, 1])
    assert sae.cfg.k == k


def test_residuals_that_are_not_finite_are_undecided() -> None:
    x = torch.ones(3, D_IN)
    x[1, 2] = float("nan")
    reader = FixedMembership(random_sae(1), [4])
    assert reader(x, torch.ones(3, 1, dtype=torch.bool))[1][:, 0].tolist() == [False, True, False]
    assert not bool(reader(x, torch.zeros(3, 1, dtype=torch.bool))[1].any())


def test_fixed_shapes_refuse_what_they_would_not_see() -> None:
    sae = random_sae(1)
    with pytest.raises(UnsupportedSAE, match="trained"):
        FixedMembership(sae.requires_grad_(True), [1])
    sae.requires_grad_(False)
    sae.hook_sae_input.register_forward_hook(lambda m, a, o: o)
    with pytest.raises(UnsupportedSAE, match="hook"):
        FixedMembership(sae, [1])


# --- plans as graphs -----------------------------------------------------------------------------


def test_graphs_steer_as_eager_mode_does(world: Any) -> None:
    plan = plan_of(*(f"1/{edit}" for edit in EDITS.split()))
    module, eager = graph_edits(plan)[1], layer_edits(plan.edits)
    x = planted.activations(world[1], tokens=60, k=reference.K)
    rng = torch.Generator().manual_seed(0)
    selected = torch.rand(60, len(plan.edits), generator=rng) < 0.7
    for dtype in DTYPES:
        right, c = eager.change(x.to(dtype), selected)
        found = module(x.to(dtype).view(4, 15, -1), selected.view(4, 15, -1)).view(60, -1)
        assert found.dtype == dtype
        torch.testing.assert_close(found, right)
        untouched = (c == 0).all(1)
        assert torch.equal(found[untouched], x.to(dtype)[untouched])
        rows = module.report().edits
        assert [row.selected for row in rows] == selected.sum(0).tolist()
        assert [row.fired for row in rows] == (c != 0).sum(0).tolist()
        module.clear()
    assert not module.sums.any()


def test_a_graph_asks_the_host_nothing(world: Any) -> None:
    """Export runs on tensors without data, so a branch on data or a word to the host would fail."""
    plan = plan_of("1/3:set:2", "1/4:ablate", "1/5:cap:0.5", "1/6:add:1")
    x = planted.activations(world[1], tokens=40, k=reference.K)
    selected = torch.ones(40, len(plan.edits), dtype=torch.bool)
    module = graph_edits(plan, capacity=30, samples={1: x})[1]
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, selected), module(x, selected))
    graph = torch.export.export(module, (x, selected))
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert names.count("qwen_scope_lens.scores.default") == 2  # of witnesses, and of the encoder
    of_host = {"aten.lift_fresh_copy", "aten.item", "aten._local_scalar_dense", "aten.nonzero"}
    assert not of_host & {name.rpartition(".")[0] for name in names}
    torch.testing.assert_close(graph.module()(x, selected), module(x, selected))


def test_undecided_tokens_stay_and_are_reported(world: Any) -> None:
    plan = plan_of("1/3:set:2", "1/4:add:1")
    sae = load_sae("local/tiny/1")
    module = graph_edits(plan, sae, capacity=1)[1]
    x = planted.activations(world[1], tokens=50, k=reference.K)
    everywhere = torch.ones(50, 2, dtype=torch.bool)
    new = module(x, everywhere)
    missed = int(module.undecided[0])
    assert 0 < missed < 50
    assert int(module.undecided[1]) == 0
    d = layer_edits(plan.edits).directions
    only_added = (new - x - d[1]).abs().amax(1) < 1e-5
    assert int(only_added.sum()) == missed
    with pytest.raises(PlanBypassed, match=r"1/3:set:\+2: " + str(missed)):
        module.report()
    assert module.report(accept_undecided=True).edits[0].fired == 50 - missed
    with torch.no_grad():
        sae.W_enc.mul_(2)
    with pytest.raises(PlanBypassed, match="have changed"):
        module.report(accept_undecided=True)


def test_graphs_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(BadPlan, match="gate"):
        graph_edits(plan_of("1/3:add:1@gate=local/tiny/1/4>2"))
    with pytest.raises(BadPlan, match="several project_out"):
        graph_edits(plan_of("1/3:project_out", "1/4:project_out"))
    for capacity in (0, True):
        with pytest.raises(BadPlan, match="capacity"):
            graph_edits(plan_of("1/3:ablate"), capacity=capacity)


# --- interp-engine: reading ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Any:
    from interp_engine import EagerModel

    hf = make_model()
    hf.generation_config.eos_token_id = None
    return EagerModel("tiny", hf_model=hf, tokenizer=make_tokenizer(), dtype="float32")


@pytest.mark.parametrize("new", [0, 4])
def test_an_engine_is_read_as_it_runs(engine: Any, new: int) -> None:
    features = ["local/tiny/1/7", "local/tiny/3/5", "local/tiny/1/3"]
    plan = plan_of("1/3:add:30@prompt")

    def read(**options: Any) -> Any:
        options |= {"allow_other_model": True, "max_tokens": new}
        return asyncio.run(read_engine(engine, features, IDS, **options))

    with steer_engine(engine, plan, IDS, allow_other_model=True):
        whole, some = read(), read(decide=False)
    assert whole.decided
    assert not some.decided
    assert whole.token_ids == some.token_ids
    assert len(whole.token_ids) == len(IDS) + new
    assert len(whole.pre) == len(IDS) + max(0, new - 1)
    torch.testing.assert_close(whole.pre, some.pre)
    known = ~some.activations.isnan()
    assert torch.equal(known, some.pre <= 0)
    assert not bool(whole.activations[known].any())
    seen: dict[int, Tensor] = {}
    with steer_engine(engine, plan, IDS, allow_other_model=True):
        ids = list(whole.token_ids[: len(whole.pre)])
        points = ["resid_post.1", "resid_post.3"]
        for point, rows in asyncio.run(engine.capture(ids, points)).items():
            seen[point.layer] = rows
    for j, ref in enumerate(whole.refs):
        right = load_sae(ref.sae).encode_sparse(seen[ref.layer]).to_dense()[:, ref.feature]
        torch.testing.assert_close(whole.activations[:, j], right)
    assert bool(whole.activations.any())
    assert whole.track(features[2]) == whole.activations[:, 2].tolist()
    assert read().pre[3, 2] < whole.pre[3, 2]  # the plan was on
    table = some.table(2)
    assert table.rows[0][2:4] == ("prompt", features[0])
    assert table.more == len(some.pre) * 3 - 2


def test_an_engine_is_not_read_wrongly(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp_engine import sync_model

    def read(model: Any, features: list[str], ids: list[int], **options: Any) -> None:
        asyncio.run(read_engine(model, features, ids, allow_other_model=True, **options))

    one = ["local/tiny/1/7"]
    with pytest.raises(WrongModel, match=r"runner\.run"):
        read(sync_model(engine), one, IDS)
    with pytest.raises(BadText, match="no tokens"):
        read(engine, one, [])
    with pytest.raises(UnknownName, match="no feature"):
        read(engine, [], IDS)
    with pytest.raises(WrongModel, match="d_model"):
        read(engine, ["mini-qwen3/w1k-l0-16/6/3"], IDS)
    scope = SimpleNamespace(generated=False)
    module = importlib.import_module("interp_engine.steer")
    monkeypatch.setattr(module, "active_steering", lambda model: scope)
    with pytest.raises(BadPlan, match="prompt alone"):
        read(engine, one, IDS, decide=False, max_tokens=2)


# --- interp-engine: inside a worker --------------------------------------------------------------


class Layer(nn.Module):
    """A decoder layer as vLLM has them: the residual is the sum of the two tensors it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(D_MODEL, D_MODEL)
        self.self_attn = nn.Identity()

    def forward(self, positions: Any, hidden: Tensor, residual: Tensor) -> Any:
        residual = hidden + residual
        return self.mlp(residual), residual


class Runner:
    """What interp-engine needs of vLLM's model runner."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Module()
        self.layers = nn.ModuleList(Layer() for _ in range(reference.N_LAYERS))
        self.model.layers = self.layers

    def prepare_inputs(self, batch: Any) -> Any:
        return batch

    @torch.no_grad()
    def run(self, x: Tensor, steered: Any = None, **counts: tuple[int, int]) -> Tensor:
        """A pass over `request=(rows, first position)`; `steered(layer, x)` by hand."""
        ids = [name.replace("_", "-") for name in counts]
        rows, starts = (np.array(column) for column in zip(*counts.values(), strict=True))
        batch = SimpleNamespace(
            req_ids=ids, num_scheduled_tokens=rows, num_computed_tokens_np=starts
        )
        self.prepare_inputs(batch)
        hidden, residual = x, torch.zeros_like(x)
        for number, layer in enumerate(self.layers):
            hidden, residual = layer(None, hidden, residual)
            if steered is not None:
                hidden = steered(number, hidden + residual) - residual
        return hidden + residual


def test_a_worker_steers_the_rows_of_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(
        "1/3:set:2", "3/5:ablate@first", "1/6:add:1@generation", "1/7:floor:3@prompt,pos=2-4"
    )
    worker: Any = ScopeWorker()
    worker.model_runner = runner = Runner()
    assert WORKER.endswith(".engine_worker.ScopeWorker")
    with pytest.raises(BadPlan, match="qsl_install first"):
        worker.qsl_report()
    with monkeypatch.context() as patch:
        patch.setattr("interp_engine.vllm_capture.graphs.graphs_replaying", lambda: True)
        with pytest.raises(BadPlan, match="enforce_eager"):
            worker.qsl_install(plan.to_dict())
    cached = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=True))
    worker.vllm_config = cached
    with pytest.raises(BadPlan, match="enable_prefix_caching=False"):
        worker.qsl_install(plan.to_dict())
    cached.cache_config.enable_prefix_caching = False
    assert worker.qsl_install(plan.to_dict(), max_rows=40) == [str(edit) for edit in plan.edits]
    with pytest.raises(BadPlan, match="already"):
        worker.qsl_install(plan.to_dict())
    with pytest.raises(BadPlan, match="each of 4 edits"):
        worker.qsl_register("mine", [[True]], [True])
    worker.qsl_register("mine", *request_flags(plan, IDS))
    n, layers = len(IDS), {layer: layer_edits(plan.edits[:]) for layer in (1, 3)}

    def steered(prompt: slice | None, late: int | None) -> Any:
        """What eager mode does to the rows of this request."""

        def act(number: int, x: Tensor) -> Tensor:
            if number not in layers:
                return x
            on = torch.zeros(len(x), 4, dtype=torch.bool)
            if prompt is not None:
                first = prompt.start
                on[first + 1 : prompt.stop, 0] = on[prompt, 1] = True
                on[first + 2 : first + 5, 3] = True
            if late is not None:
                on[late, :3] = True
            here = [edit.ref.layer == number for edit in plan.edits]
            return layers[number].change(x, on & torch.tensor(here))[0]

        return act

    x = 3 * torch.randn(n + 8, D_MODEL)
    passes = [
        ({"other": (3, 0), "mine_0": (n, 0)}, n + 3, steered(slice(3, n + 3), None)),
        ({"mine_0": (1, n), "other": (1, 3)}, 2, steered(None, 0)),
    ]
    for counts, rows, act in passes:  # the rows after the last request are an engine's padding
        right = runner.run(x, act, nobody=(1, 0))[:rows]
        torch.testing.assert_close(runner.run(x, **counts)[:rows], right, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(runner.run(x, nobody=(1, 0))[:rows], right)
    report = report_of(plan, worker.qsl_report())
    assert [row.selected for row in report.edits] == [n - 1 + 1, n + 1, 1, 3]
    runner.run(x, mine=(60, 0))
    with pytest.raises(PlanBypassed, match="1 passes"):
        report_of(plan, worker.qsl_report())
    worker.qsl_unregister("mine")
    plain = runner.run(x, mine=(n, 0))
    worker.qsl_remove()
    assert torch.equal(runner.run(x, mine=(n, 0)), plain)
    assert all("forward" not in vars(layer) for layer in runner.layers)


def test_flags_of_a_request_refuse_what_a_worker_cannot_know() -> None:
    with pytest.raises(BadPlan, match="generated tokens"):
        request_flags(plan_of("1/3:add:1@class=digit"), IDS, make_tokenizer())
    with pytest.raises(PlanBypassed, match=r"1/3:add:\+1: 2"):
        report_of(plan_of("1/3:add:1"), {"undecided": [2], "lost": 0, "sums": [[0.0] * 4]})
