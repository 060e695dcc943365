"""Feature graphs: time, memory, edges per second against a naive version, agreement, faithfulness.

    python benchmarks/graphs.py --out benchmarks/results/graphs.txt
    python benchmarks/graphs.py --real FOLDER --group local/mine     # a real model, as well

The naive version computes the same edges as one would at first: for every node a forward pass of
the whole model and a backward pass, with the dense encode and the dense decoder of SAELens. Both
get the same nodes of one layer pair; what they compute is compared. The last part is one layer
pair in the shapes of Qwen3-8B with synthetic weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
import transformers
from _measure import Printed, cpu_name, peak_extra

import qwen_scope_lens as qsl
from qwen_scope_lens.graphs import agreement, attribute, faithfulness, prune
from qwen_scope_lens.graphs.edges import Target, decompose, edges_from
from qwen_scope_lens.graphs.frozen import frozen
from qwen_scope_lens.models import decoder_layers, unwrap

MINIS = {name: f"{name}/w1k-l0-16" for name in ("mini-qwen3", "mini-qwen3.5")}
PROMPTS = (
    "The package manager is a tool",
    "To install the package, run the",
    "The kernel reads the",
    "软件包管理器是一个",
    "Le gestionnaire de paquets est un",
)
CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Japan": "Tokyo"}
KNOWN = (  # prompts with a known answer, for a real model
    *((f"The capital of {country} is", f" {city}") for country, city in CAPITALS.items()),
    *((f"{a} + {b} = ", str(a + b)) for a, b in ((2, 3), (4, 5), (1, 6))),
    *(("The keys to the cabinet", " are"), ("The key to the cabinets", " is")),
    *(("Les enfants", " sont"), ("Die Kinder", " sind")),
)
NODES, LAYER = 64, 5


@contextmanager
def in_float64(model: Any) -> Any:
    """The test's: transformers computes some parts in float32, whatever the model's dtype."""
    from test_graphs import in_float64 as really

    with really(model):
        yield


def speed(say: Printed, name: str, group: str) -> None:
    """The edges into the same nodes of one layer, both ways."""
    model = qsl.load_model(name)
    ids = model.tokenizer.encode("The package manager is a tool that installs software. " * 4)
    below, above = (qsl.load_sae(f"{group}/{layer}") for layer in (LAYER - 1, LAYER))
    target = Target(0, None, "")
    with frozen(model, ids, [LAYER - 1, LAYER], ()) as one:
        upper = decompose(one, LAYER, above)
        flat = upper.values.flatten().argsort(descending=True)[:NODES].tolist()
        places = [divmod(i, upper.values.shape[1]) for i in flat]
        nodes = [(at, int(upper.indices[at, entry])) for at, entry in places]

        def ours() -> Any:
            level = decompose(one, LAYER - 1, below)
            seeds = [(at, above.encoder_row(feature)) for at, feature in nodes]
            return edges_from(one, level, LAYER, seeds, target).features

        ours()
        indices = decompose(one, LAYER - 1, below).indices[None]
        start = time.process_time()
        found = ours()
        quick = time.process_time() - start
    start = time.process_time()
    dense = naive(model, ids, below, above, nodes)
    slow = time.process_time() - start
    kept = dense.gather(2, indices.expand(len(nodes), -1, -1))
    difference = float((kept - found).abs().max() / found.abs().max())
    edges = int((found != 0).sum())
    say(
        f"{name}: {len(ids)} tokens, {len(nodes)} nodes, {edges:,} edges from layer {LAYER - 1} to"
        f" {LAYER}\n  {edges / quick:,.0f} edges/s; naive {edges / slow:,.0f}; {slow / quick:.1f}"
        f" times as fast; largest difference {difference:.1e} of the largest edge"
    )


def naive(model: Any, ids: list[int], below: Any, above: Any, nodes: Any) -> torch.Tensor:
    """`[nodes, T, d_sae]`, one forward and backward of the whole model per node, all dense."""
    inner, rows = unwrap(model), []
    for at, feature in nodes:
        kept: dict[int, torch.Tensor] = {}

        def leaf(module: Any, args: Any, output: Any, kept: Any = kept) -> Any:
            kept[0] = output.detach().requires_grad_()
            return kept[0]

        def read(module: Any, args: Any, output: Any, kept: Any = kept) -> None:
            kept[1] = output

        layers = decoder_layers(model)
        handles = [layers[LAYER - 1].register_forward_hook(leaf)]
        handles.append(layers[LAYER].register_forward_hook(read))
        inner(input_ids=torch.tensor([ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        pre = kept[1][0] @ above.W_enc + above.b_enc  # dense, as a hook on an SAE gives it
        [gradient] = torch.autograd.grad(pre[at, feature], kept[0])
        acts = torch.relu(kept[0][0].detach() @ below.W_enc + below.b_enc)
        top = acts.topk(below.cfg.k, dim=-1)
        acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        rows.append(acts * (gradient[0] @ below.W_dec.T))
    return torch.stack(rows).detach()


def right(say: Printed, name: str, group: str) -> None:
    """Agreement with finite differences in float64, all layers."""
    model = qsl.load_model(name)
    for hold in ((), ("norms",), ("norms", "attention")):
        with in_float64(model):
            graph = attribute(model, PROMPTS[0], group, hold=hold, most=16)
            table = agreement(model, graph, each=1)
        worst = max(row[3] for row in table.rows)
        say(
            f"{name}, held {', '.join(hold) or 'nothing'}: {sum(row[2] for row in table.rows)}"
            f" edges of {len(table.rows)} kinds, largest relative difference {worst:.1e};"
            f" sums within {graph.completeness:.1e}"
        )


def whole(say: Printed, model: Any, group: str, prompts: Any, **settings: Any) -> None:
    """Time and memory of graphs, and their curves, as means over prompts."""
    seconds, memory, curves, misfits, errors = [], [], {"zero": [], "mean": []}, [], []
    for text, target in prompts:
        found: list[Any] = []

        def run(text: str = text, target: Any = target, found: list[Any] = found) -> None:
            found.append(attribute(model, text, group, target=target, **settings))

        start = time.perf_counter()
        memory.append(peak_extra(run))
        seconds.append(time.perf_counter() - start)
        graph = prune(found[0])
        misfits.append(found[0].misfit)
        errors.append(found[0].error_share)
        for ablation, list_ in curves.items():
            list_.append(faithfulness(model, graph, ablation=ablation, draws=3))
    say(
        f"{len(prompts)} prompts, median {np.median(seconds):.1f} s and"
        f" {max(memory) / 2**20:.0f} MiB at most for a graph; {np.mean(errors):.0%} of influence"
        f" from SAE errors; edges differ from removing all features by {np.median(misfits):.0%}"
    )
    for ablation, tests in curves.items():
        say(f"  {ablation} ablation, means over prompts; random sets in brackets")
        for share in (0.125, 0.25, 0.5, 1.0):
            rows = []
            for test in tests:
                at = int(np.argmin([abs(size - share * test.sizes[-1]) for size in test.sizes]))
                rows.append(
                    (
                        *(test.sizes[at], test.faithful[at], test.random_faithful[at]),
                        *(test.complete[at], test.random_complete[at]),
                    )
                )
            n, faithful, random, complete, other = np.mean(rows, axis=0)
            say(
                f"    {n:5.0f} features: faithfulness {faithful:5.2f} ({random:5.2f}),"
                f" completeness {complete:5.2f} ({other:5.2f})"
            )


def shapes(say: Printed, rows: int) -> None:
    """One layer pair in the shapes of Qwen3-8B and its SAEs, with synthetic weights, float32."""
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    sae = synthetic_sae(4096, 65_536, 50)
    ids = torch.randint(0, 512, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    with frozen(model, ids, [0, 1]) as one:
        start = time.perf_counter()
        level, upper = (decompose(one, layer, sae) for layer in (0, 1))
        encoded = time.perf_counter() - start
        places = [divmod(i, 50) for i in upper.values.flatten().topk(rows).indices.tolist()]
        seeds = [(at, sae.encoder_row(int(upper.indices[at, e]))) for at, e in places]
        per_row = one.bytes_per_row(0, 1)
        start = time.perf_counter()
        memory = peak_extra(
            lambda: edges_from(one, level, 1, seeds, Target(0, None, ""), memory=2**30)
        )
        took = time.perf_counter() - start
    say(
        f"one layer pair in the shapes of Qwen3-8B (d_model 4,096, 65,536 features, k 50, 64"
        f" tokens): encode of two layers {encoded:.1f} s; {rows} nodes {took:.1f} s,"
        f" {took / rows:.2f} s per node; autograd keeps {per_row / 2**20:.0f} MiB per row, peak"
        f" {memory / 2**30:.2f} GiB with a budget of 1 GiB"
    )
    say(
        f"  so 36 layers of 64 nodes: {36 * (64 * took / rows + encoded / 2) / 60:.0f} minutes on"
        " this machine"
    )


def synthetic_sae(d_in: int, d_sae: int, k: int) -> Any:
    from qwen_scope_lens.saes import ScopeSAE, ScopeSAEConfig

    torch.manual_seed(0)
    sae = ScopeSAE(ScopeSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device="cpu"))
    with torch.no_grad():
        sae.W_enc.normal_(std=d_in**-0.5)
        sae.W_dec.normal_(std=d_in**-0.5)
    return sae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="nodes of the large layer pair")
    parser.add_argument("--real", help="folder of a real model")
    parser.add_argument("--group", help="its SAEs")
    parser.add_argument("--known", type=Path, help="JSON lines: text, target; for --real")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    say = Printed()
    say(f"{cpu_name()}, {platform.system()}, one thread, beside other work; CPU time for edges")
    say("per second, wall time for the rest;")
    say(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    if arguments.real:
        known = KNOWN
        if arguments.known:
            lines = arguments.known.read_text("utf-8").splitlines()
            known = tuple((row["text"], row["target"]) for row in map(json.loads, lines))
        model = qsl.load_model(arguments.real)
        say(f"{Path(arguments.real).name}, {arguments.group}")
        settings = {"allow_other_model": True, "hold": ("norms", "attention"), "most": 32}
        whole(say, model, arguments.group, known, **settings)
    else:
        say("edges per second, one layer pair, against one pass per node with dense encodes")
        for name, group in MINIS.items():
            speed(say, name, group)
        say("\nedges against central differences, float64, all layers")
        for name, group in MINIS.items():
            right(say, name, group)
        for name, group in MINIS.items():
            say(f"\n{name}, all 8 layers, 64 features followed per layer, held norms")
            whole(say, qsl.load_model(name), group, [(text, None) for text in PROMPTS])
        say()
        shapes(say, arguments.rows)
    if arguments.out:
        say.save(arguments.out)


if __name__ == "__main__":
    main()
