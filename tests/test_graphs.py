"""Feature graphs: edges against finite differences, pruning, ablations, page, export, verb."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.models.qwen2.modeling_qwen2 as qwen2
import transformers.models.qwen3.modeling_qwen3 as qwen3
import transformers.models.qwen3_5.modeling_qwen3_5 as qwen3_5

import qwen_scope_lens as qsl
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadFile, BadText, LayerOutOfRange
from qwen_scope_lens.graphs import (
    FeatureGraph,
    Node,
    agreement,
    attribute,
    circuit_tracer,
    faithfulness,
    graph_page,
    prune,
)
from qwen_scope_lens.labels import Label, LabelPack
from qwen_scope_lens.models import ScopeBridge, decoder_layers, unwrap

TEXT = "The package manager is a tool"
GROUPS = {name: f"{name}/w1k-l0-16" for name in ("mini-qwen3", "mini-qwen3.5")}
GROUP = GROUPS["mini-qwen3"]
LAYERS = [2, 3, 7]


@pytest.fixture(scope="module")
def models() -> dict[str, ScopeBridge]:
    return {name: qsl.load_model(name) for name in GROUPS}


@pytest.fixture(scope="module")
def model(models: dict[str, ScopeBridge]) -> ScopeBridge:
    return models["mini-qwen3"]


@pytest.fixture(scope="module")
def graph(model: ScopeBridge) -> FeatureGraph:
    return attribute(model, TEXT, GROUP, layers=LAYERS, most=24)


class _Double:
    """torch, for code of transformers that computes in float32 whatever the model's dtype is."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextmanager
def in_float64(model: ScopeBridge) -> Iterator[None]:
    plain = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        for module in (qwen2, qwen3, qwen3_5):
            patch.setattr(module, "torch", _Double())
        keep = lambda x, *args, **kwargs: x if x.dtype == torch.float64 else plain(x)  # noqa: E731
        patch.setattr(torch.Tensor, "float", keep)
        model.double()
        try:
            yield
        finally:
            model.to(torch.float32)


@torch.no_grad()
def next_logits(model: ScopeBridge) -> torch.Tensor:
    ids = torch.tensor([model.tokenizer.encode(TEXT)])
    return unwrap(model)(input_ids=ids, use_cache=False).logits[0, -1]


@pytest.mark.parametrize("hold", [(), ("norms", "attention")])
@pytest.mark.parametrize("name", GROUPS)
def test_edges_agree_with_finite_differences(
    models: dict[str, ScopeBridge], name: str, hold: tuple[str, ...]
) -> None:
    model = models[name]
    with in_float64(model):
        found = attribute(model, TEXT, GROUPS[name], layers=LAYERS, hold=hold, most=4)
        table = agreement(model, found, each=1)
    kinds = {row[:2] for row in table.rows}
    sources = {"feature", "error", "bias"}
    ends = {(kind, end) for kind in sources for end in ("feature", "target")}
    assert kinds == {*ends, ("embedding", "feature")}
    assert max(row[3] for row in table.rows) < 1e-4
    assert found.completeness < 1e-11


def test_a_wrong_edge_is_seen(model: ScopeBridge) -> None:
    with in_float64(model):
        found = attribute(model, TEXT, GROUP, layers=[7], most=2)
        wrong = agreement(model, replace(found, weights=found.weights * 1.01), each=1)
    assert min(row[3] for row in wrong.rows) > 0.005


def test_edges_sum_to_the_linearisation(graph: FeatureGraph) -> None:
    """With what is left out, and with errors and biases; with held norms, the whole logit."""
    inner = [i for i, node in enumerate(graph.nodes) if node.linear is not None]
    assert len(inner) == 1 + len(graph.features)
    assert len([n for n in graph.features if n.layer == 3]) == 24
    for i in inner:
        node = graph.nodes[i]
        edges = [weight for _, weight in graph.incoming(i)]
        assert sum(edges) + (node.left_out or 0) == pytest.approx(node.linear, rel=1e-3, abs=1e-2)
    assert graph.completeness < 1e-4
    assert graph.nodes[0].linear == pytest.approx(graph.nodes[0].value, rel=1e-4)
    layers = [graph.nodes[i].layer for i in graph.sources]
    above = [graph.nodes[i].layer for i in graph.targets]
    assert set(zip(layers, above, strict=True)) == {(7, 8), (3, 7), (2, 3), (-1, 2)}


def test_blocks_do_not_change_the_graph(model: ScopeBridge, graph: FeatureGraph) -> None:
    one_by_one = attribute(model, TEXT, GROUP, layers=LAYERS, most=24, memory=1)
    assert [node.name for node in one_by_one.nodes] == [node.name for node in graph.nodes]
    assert np.allclose(one_by_one.weights, graph.weights, rtol=1e-3, atol=1e-3)


def test_an_interrupted_graph_goes_on(
    model: ScopeBridge,
    graph: FeatureGraph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the same graph; finished levels are not made again, those of another graph are."""
    from qwen_scope_lens.graphs import attribution

    keep, really, made = tmp_path / "levels.json", attribution.decompose, []

    def stopped(one: Any, layer: int, sae: Any) -> Any:
        made.append(layer)
        if len(made) == 3:
            raise KeyboardInterrupt
        return really(one, layer, sae)

    monkeypatch.setattr(attribution, "decompose", stopped)
    with pytest.raises(KeyboardInterrupt):
        attribute(model, TEXT, GROUP, layers=LAYERS, most=24, keep=keep)
    whole = attribute(model, TEXT, GROUP, layers=LAYERS, most=24, keep=keep)
    assert made == [7, 3, 2, 2, -1]
    assert whole.nodes == graph.nodes
    assert all(
        np.array_equal(getattr(whole, name), getattr(graph, name))
        for name in ("sources", "targets", "weights")
    )
    again = attribute(model, TEXT, GROUP, layers=LAYERS, most=24, keep=keep)
    assert len(made) == 5
    assert again.nodes == graph.nodes
    attribute(model, TEXT, GROUP, layers=LAYERS, most=4, keep=keep)
    assert made[5:] == [7, 3, 2, -1]


def test_the_model_is_left_as_it_was(model: ScopeBridge) -> None:
    inner = unwrap(model)
    before = next_logits(model)
    hooks = [len(module._forward_hooks) for module in inner.modules()]
    trained = [p.requires_grad for p in inner.parameters()]
    with pytest.raises(BadText, match="target 'two words' is 3 tokens"):
        attribute(model, TEXT, GROUP, target="two words", hold=("norms", "attention"))
    attribute(model, TEXT, GROUP, layers=[7], hold=("norms", "attention"), most=2)
    assert torch.equal(next_logits(model), before)
    assert hooks == [len(module._forward_hooks) for module in inner.modules()]
    assert trained == [p.requires_grad for p in inner.parameters()]
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_integrated_gradients_follow_what_is_not_linear(
    model: ScopeBridge, graph: FeatureGraph
) -> None:
    integrated = attribute(model, TEXT, GROUP, layers=LAYERS, most=24, steps=8)
    assert graph.misfit is not None
    assert integrated.misfit is not None
    assert integrated.misfit < 0.01 < graph.misfit
    with pytest.raises(BadText, match="no derivative"):
        agreement(model, integrated)


def test_a_difference_of_logits_is_explained(model: ScopeBridge) -> None:
    found = attribute(model, TEXT, GROUP, layers=[7], target=" that", target_minus=" to", most=2)
    logits = next_logits(model)
    a, b = found.target_ids
    assert found.nodes[0].value == pytest.approx(float(logits[a] - logits[b]), rel=1e-5)
    assert found.probability == pytest.approx(float(logits.softmax(-1)[a]), rel=1e-4)
    for target, minus, why in ((" to", " to", "one token"), ("", None, "0 tokens")):
        with pytest.raises(BadText, match=why):
            attribute(model, TEXT, GROUP, layers=[7], target=target, target_minus=minus)
    with pytest.raises(LayerOutOfRange):
        attribute(model, TEXT, GROUP, layers=[8])


def planted() -> FeatureGraph:
    """The target from a (3) and an error (1); a from two embeddings (1 and -1, and 2 left out)."""
    node = Node("target", 8, 1, 5, 4.0, 1.0, linear=4.0, left_out=0.0, gap=0.0)
    a = Node("feature", 7, 1, 9, 2.0, 0.0, linear=2.0, left_out=2.0, gap=0.0)
    more = [Node("error", 7, 1, None, 1.0, 0.0)]
    more += [Node("embedding", -1, at, at, 1.0, 0.0) for at in (0, 1)]
    edges = np.array([[1, 0, 3], [2, 0, 1], [3, 1, 1], [4, 1, -1]])
    return FeatureGraph(
        *("a b", ("a", " b"), (0, 1), "mini", 8, GROUP, (7,), "x", (5,), 0.5, (("x", 0.5),)),
        *(("norms",), 1, (node, a, *more)),
        *(edges[:, 0], edges[:, 1], edges[:, 2].astype(float)),
    )


def test_pruning_follows_influence() -> None:
    small = prune(planted(), nodes=0.7, edges=1.0)
    assert [node.name for node in small.nodes] == [
        *("target", "7.9@1", "-1.embedding@0", "-1.embedding@1")
    ]
    assert [node.influence for node in small.nodes] == [1.0, 0.75, 0.1875, 0.1875]
    assert small.nodes[0].left_out == 1.0  # of the error that went
    whole = prune(planted(), nodes=1.0, edges=1.0)
    assert len(whole.nodes) == 5
    assert whole.error_share == pytest.approx(0.25 / (0.25 + 2 * 0.1875))
    with pytest.raises(BadText, match="share"):
        prune(planted(), nodes=0)


def test_a_pruned_graph_is_connected(graph: FeatureGraph) -> None:
    small = prune(graph, nodes=0.6, edges=0.9)
    assert 0 < len(small.features) < len(graph.features)
    for i, node in enumerate(small.nodes):
        if node.kind in ("feature", "error", "bias"):
            assert i in small.sources
        if node.kind in ("feature", "target"):
            assert i in small.targets
    assert "left_out" not in str(small)
    assert small.said()[2].startswith(f"{len(small.nodes)} nodes")


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_all_features_are_faithful_and_none_are_not(model: ScopeBridge, ablation: Any) -> None:
    every = attribute(model, TEXT, GROUP, layers=[2, 7], most=10_000)
    last = [n for n in every.features if n.layer == 7 and n.position != len(every.tokens) - 1]
    assert not last  # after the last SAE, the other tokens do not matter
    found = faithfulness(model, every, ablation=ablation, sizes=(1, 4), draws=2)
    assert found.faithful[-1] == pytest.approx(1.0, abs=1e-3)
    assert found.complete[-1] > 0.9  # without them, others fire at layer 7
    assert found.sizes == (1, 4, len(every.features))
    assert len(found.table().rows) == 3
    assert found.random_complete[0] != found.complete[0]


def test_an_ablation_is_that_of_a_plan(model: ScopeBridge) -> None:
    found = attribute(model, TEXT, GROUP, layers=[7], most=10_000)
    codes = qsl.load_sae(f"{GROUP}/7").encode_sparse(qsl.capture(model, [TEXT], [7]).residuals[7])
    alone = [n for n in found.features if codes.indices.flatten().tolist().count(n.number) == 1]
    one = replace(found, nodes=(found.nodes[0], alone[0]), sources=np.array([], dtype=int))
    test = faithfulness(model, one, draws=1)
    with qsl.steer(model, found.plan([alone[0].name], "ablate")):
        logits = next_logits(model)
    value = float(logits[found.target_ids[0]] - logits.mean())
    kept = (value - test.none) / (test.model - test.none)
    assert 1 - test.complete[0] == pytest.approx(kept, abs=1e-4)


def test_a_graph_comes_back_from_its_file(graph: FeatureGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "graph.json")
    again = FeatureGraph.load(tmp_path / "graph.json")
    assert again.nodes == graph.nodes
    assert again.said() == graph.said()
    assert np.array_equal(again.weights, graph.weights)
    content = json.loads((tmp_path / "graph.json").read_text())
    for damage in ({"edges": [[0, 10**6, 1.0]]}, {"nodes": [{"kind": "x"}]}, {"more": 1}):
        (tmp_path / "bad.json").write_text(json.dumps(content | damage))
        with pytest.raises(BadFile, match="damaged"):
            FeatureGraph.load(tmp_path / "bad.json")


def test_nothing_in_a_page_can_run(graph: FeatureGraph) -> None:
    words = "</script><script>alert(1)</script>\u202e"
    pack = LabelPack(Label(graph.ref(node), words) for node in graph.features[:1])
    page = graph_page(replace(graph.labelled(pack), text=words), "site/index.html", [words])
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    assert "alert(1)" not in re.sub(
        r'<script type="application/json".*?</script>', "", page
    ).replace("&lt;script&gt;alert(1)", "")
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    content = json.loads(scripts[0])
    assert len(content["nodes"]) == len(graph.nodes)
    assert words in [node["label"] for node in content["nodes"]]
    with pytest.raises(BadText):
        graph_page(graph, "javascript:alert(1)")


def test_the_export_has_the_shape_that_viewers_read(graph: FeatureGraph) -> None:
    """The fields of circuit-tracer's frontend.graph_models, with the types that it checks."""
    content = circuit_tracer(graph, "a-graph")
    assert set(content) == {"metadata", "qParams", "nodes", "links"}
    assert {"slug", "scan", "transcoder_list", "prompt_tokens", "prompt"} <= set(
        content["metadata"]
    )
    types = {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str}
    types |= {"jsNodeId": str, "clerp": str, "token_prob": float, "is_target_logit": bool}
    for node in content["nodes"]:
        assert all(isinstance(node[name], kind) for name, kind in types.items()), node
    names = [node["node_id"] for node in content["nodes"]]
    assert len(set(names)) == len(names)
    assert {end for link in content["links"] for end in (link["source"], link["target"])} <= {
        *names
    }
    first = graph.features[0]
    node = next(n for n in content["nodes"] if n["node_id"].startswith(f"{first.layer}_"))
    total = int(((8 * node["feature"] + 1) ** 0.5 - 1) // 2)
    feature = node["feature"] - total * (total + 1) // 2
    assert node["node_id"] == f"{total - feature}_{feature}_{node['ctx_idx']}"
    [target] = [n for n in content["nodes"] if n["feature_type"] == "logit"]
    assert float(target["clerp"].split("(p=")[1].split(")")[0]) == round(graph.probability, 3)
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_a_slider_of_the_export_keeps_the_strongest() -> None:
    """Viewers keep nodes whose influence is at most the threshold: it is cumulative there."""
    given = {"7_9_1": 0.75, "7_error_1": 0.25, "E_0_0": 0.1875, "E_1_1": 0.1875}
    whole = circuit_tracer(prune(planted(), nodes=1.0, edges=1.0))
    shares = {node["node_id"]: node["influence"] for node in whole["nodes"]}
    total = sum(given.values())
    assert whole["metadata"]["node_threshold"] == 1.0
    assert shares.pop("9_5_1") is None  # the target, which viewers always show
    assert shares["7_9_1"] == pytest.approx(0.75 / total)
    assert shares["7_error_1"] == pytest.approx(1 / total)
    assert max(shares.values()) == 1.0


def test_the_verb_writes_a_graph_and_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "graph", tmp_path / "plan.json"
    options = ["--layers", "6,7", "--most", "8", "--out", str(out)]
    assert main(["graph", TEXT, *options]) == 0
    assert not out.with_name("graph.levels.json").exists()
    printed = capsys.readouterr().out
    assert "zero ablation" in printed
    assert "mean ablation" in printed
    assert (out / "index.html").is_file()
    assert len(list((out / "circuit-tracer").glob("*.json"))) == 2
    best = FeatureGraph.load(out / "graph.json").features
    nodes = [best[0].name, "--amplify", best[1].name, "--save-plan", str(plan)]
    assert main(["graph", "--from", str(out), "--json", "--ablate", *nodes]) == 0
    assert len(json.loads(capsys.readouterr().out)["features"]) > 1
    assert [edit.op for edit in qsl.Plan.load(plan).edits] == ["ablate", "scale"]


def test_blame_goes_upstream_from_the_first_bad_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "The package manager", "--reply", " is 安装程序", "--class", "han"]
    out = str(tmp_path / "graph")
    assert main(["blame", f"{GROUP}/6", *words, "--top", "2", "--graph", out]) == 0
    assert "the graph of '安装'" in capsys.readouterr().err
    found = FeatureGraph.load(tmp_path / "graph" / "graph.json")
    assert found.text == "The package manager is "
    assert found.layers == tuple(range(8))
    assert "'安装'" in found.target


def test_layers_without_a_file_are_said_before_the_model_is_loaded(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "mine" / "layer1.sae.pt").unlink()
    assert main(["graph", "a", "--sae", "local/mine", "--model", "nowhere"]) == 1
    said = capsys.readouterr().err
    assert "1 layers of local/mine have no file; there are 0, 2: choose layers" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([" "], "no text"),
        ([], "one of the two"),
        (["a", "--from", "there"], "one of the two"),
        (["a", "--ablate", "7.1@0"], "give both"),
        (["a", "--pages", "javascript:x"], "cannot be a link"),
        (["a", "--sae", "nothing"], "nothing"),
        (["a", "--out", "full"], "holds other files"),
        (["--from", "full"], "does not exist"),
    ],
)
def test_what_is_wrong_is_said_first(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    assert main(["graph", *words]) == 1
    assert said in capsys.readouterr().err
