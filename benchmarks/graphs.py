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
import itertools
import json
import platform
import sys
import time
import warnings
from collections.abc import Sequence
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
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Spain": "Madrid",
    "Russia": "Moscow",
    "England": "London",
    "Egypt": "Cairo",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Cuba": "Havana",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "China": "Beijing",
    "South Korea": "Seoul",
    "Poland": "Warsaw",
}
SUMS = ((2, 3), (4, 5), (1, 6), (3, 3), (7, 1), (4, 2), (5, 3), (8, 1), (2, 2), (3, 6))
SUMS += ((6, 2), (1, 3), (4, 4), (5, 2))
AGREEMENT = {  # the beginning of a sentence, the verb that agrees, one that does not
    "The keys to the cabinet": (" are", " is"),
    "The key to the cabinets": (" is", " are"),
    "The books on the table": (" are", " is"),
    "The book on the tables": (" is", " are"),
    "The children of the teacher": (" were", " was"),
    "The teacher of the children": (" was", " were"),
    "Les enfants": (" sont", " est"),
    "Les clés de la maison": (" sont", " est"),
    "La clé des maisons": (" est", " sont"),
    "Le livre de mes parents": (" est", " sont"),
    "Die Kinder": (" sind", " ist"),
    "Das Kind": (" ist", " sind"),
    "Die Bücher auf dem Tisch": (" sind", " ist"),
    "Das Buch auf den Tischen": (" ist", " sind"),
    "Los niños": (" son", " es"),
    "El libro de mis padres": (" es", " son"),
    "Las llaves de la casa": (" son", " es"),
    "La llave de las casas": (" es", " son"),
    "I bambini": (" sono", " è"),
    "Il bambino": (" è", " sono"),
}
KINDS: dict[str, list[tuple[str, str, str | None]]] = {
    # prompts with a known answer, for a real model; where there is one, the answer it competes with
    "capitals": [(f"The capital of {a} is", f" {city}", None) for a, city in CAPITALS.items()],
    "arithmetic": [(f"{a} + {b} = ", str(a + b), None) for a, b in SUMS],
    "agreement": [(text, right, wrong) for text, (right, wrong) in AGREEMENT.items()],
}
KNOWN = [one for turn in itertools.zip_longest(*KINDS.values()) for one in turn if one is not None]
"""One of each kind in turn, so that the first ones are a sample of all."""
NODES, LAYER = 64, 5
Prompt = tuple[str, str | None, str | None]
"""Text, target, and the token that the target counts against."""


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


def right(
    say: Printed,
    name: str,
    group: str,
    model: Any = None,
    text: str = PROMPTS[0],
    layers: Any = None,
) -> None:
    """Agreement with finite differences in float64, by default of all layers."""
    model = model or qsl.load_model(name)
    more = {"layers": layers, "most": 16, "allow_other_model": True}
    for hold in ((), ("norms",), ("norms", "attention")):
        with in_float64(model):
            graph = attribute(model, text, group, hold=hold, **more)
            table = agreement(model, graph, each=1)
        worst = max(row[3] for row in table.rows)
        say(
            f"{name}, held {', '.join(hold) or 'nothing'}: {sum(row[2] for row in table.rows)}"
            f" edges of {len(table.rows)} kinds, largest relative difference {worst:.1e};"
            f" sums within {graph.completeness:.1e}"
        )


SHARES = (0.125, 0.25, 0.5, 1.0)
"""Of a pruned graph's features, at which its curves are read."""


def measured(model: Any, group: str, prompt: Prompt, **settings: Any) -> dict[str, Any]:
    """One prompt: time and memory of its graph, and its curves at `SHARES`."""
    text, target, minus = prompt
    found: list[Any] = []

    def run() -> None:
        options = {"target": target, "target_minus": minus, **settings}
        found.append(attribute(model, text, group, **options))

    start = time.perf_counter()
    memory = peak_extra(run)
    seconds = time.perf_counter() - start
    graph, curves = prune(found[0]), {}
    for ablation in ("zero", "mean"):
        test = faithfulness(model, graph, ablation=ablation, draws=3)
        at = [
            int(np.argmin([abs(size - share * test.sizes[-1]) for size in test.sizes]))
            for share in SHARES
        ]
        columns = (test.sizes, test.faithful, test.random_faithful)
        columns += (test.complete, test.random_complete)
        curves[ablation] = [[float(column[i]) for column in columns] for i in at]
    return {
        "text": text,
        "target": target,
        "minus": minus,
        "tokens": len(graph.tokens),
        "seconds": seconds,
        "memory": memory,
        "misfit": found[0].misfit,
        "gap": found[0].completeness,
        "errors": found[0].error_share,
        "curves": curves,
        "nodes": len(graph.nodes),
        "edges": len(graph.weights),
        "chance": graph.probability,
        "first": graph.likely[0][0] == target,
        "value": graph.nodes[0].value,
    }


def whole(
    say: Printed, model: Any, group: str, prompts: Sequence[Prompt], keep: Path | None, **more: Any
) -> list[dict[str, Any]]:
    """Time and memory of graphs, and their curves, as means over prompts. `keep` holds what is
    done, so that a run that was stopped goes on."""
    done = []
    if keep is not None and keep.is_file():
        done = [json.loads(line) for line in keep.read_text("utf-8").splitlines()]
    known = {(row["text"], row["target"]): row for row in done}
    rows = []
    for prompt in prompts:
        row = known.get(prompt[:2])
        if row is None:
            row = measured(model, group, prompt, **more)
            if keep is not None:
                with keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        rows.append(row)
    say(
        f"{len(rows)} prompts, median {np.median([r['seconds'] for r in rows]):.1f} s and"
        f" {max(r['memory'] for r in rows) / 2**20:.0f} MiB at most for a graph;"
        f" {np.mean([r['errors'] for r in rows]):.0%} of influence"
        f" from SAE errors; edges differ from removing all features by"
        f" {np.median([r['misfit'] for r in rows]):.0%}"
    )
    show_curves(say, rows, medians=keep is not None)
    return rows


def show_curves(say: Printed, rows: Sequence[dict[str, Any]], medians: bool) -> None:
    """Medians where a share may have a small denominator, as a difference of logits has."""
    for ablation in ("zero", "mean"):
        word, of = ("medians", np.median) if medians else ("means", np.mean)
        say(f"  {ablation} ablation, {word} over prompts; random sets in brackets")
        for middle in of([row["curves"][ablation] for row in rows], axis=0):
            n, faithful, random, complete, other = middle
            say(
                f"    {n:5.0f} features: faithfulness {faithful:5.2f} ({random:5.2f}),"
                f" completeness {complete:5.2f} ({other:5.2f})"
            )


def known_answers(say: Printed, rows: Sequence[dict[str, Any]]) -> None:
    """Of each kind of prompt: how often the model is right, and how the whole graph does."""
    for kind, prompts in KINDS.items():
        texts = {text for text, _, _ in prompts}
        some = [row for row in rows if row["text"] in texts]
        if not some:
            continue
        full = np.array([row["curves"]["zero"][-1] for row in some])
        better = (full[:, 1] > full[:, 2]).mean()
        lost = (full[:, 3] > full[:, 4]).mean()
        right = np.mean([row["value"] > 0 if row["minus"] else row["first"] for row in some])
        say(
            f"  {kind}: {len(some)} prompts, the model is right on {right:.0%}; graphs of"
            f" {np.mean([row['nodes'] for row in some]):.0f} nodes and"
            f" {np.mean([row['edges'] for row in some]):.0f} edges; median faithfulness"
            f" {np.median(full[:, 1]):.2f} ({np.median(full[:, 2]):.2f} random), completeness"
            f" {np.median(full[:, 3]):.2f} ({np.median(full[:, 4]):.2f}); more faithful than random"
            f" on {better:.0%}, more is lost without on {lost:.0%}"
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
    parser.add_argument("--layers", help="of the group, if it lacks some, such as 4,10,14,20")
    parser.add_argument("--name", help="what the real model is, for the results")
    parser.add_argument("--known", type=Path, help="JSON lines: text, target; for --real")
    parser.add_argument("--no-edges", action="store_true", help="do not check those of --real")
    parser.add_argument("--prompts", type=int, default=len(KNOWN), help="of the known ones")
    parser.add_argument("--keep", type=Path, help="file that holds finished prompts, for --real")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    say = Printed()
    say(f"{cpu_name()}, {platform.system()}, one thread, beside other work; CPU time for edges")
    say("per second, wall time for the rest;")
    say(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    if arguments.real:
        known: Sequence[Prompt] = KNOWN[: arguments.prompts]
        if arguments.known:
            lines = map(json.loads, arguments.known.read_text("utf-8").splitlines())
            known = [(row["text"], row["target"], row.get("minus")) for row in lines]
        model = qsl.load_model(arguments.real, dtype=torch.float32)
        say(f"{arguments.name or Path(arguments.real).name}, float32; {arguments.group}")
        layers = arguments.layers and [int(n) for n in arguments.layers.split(",")]
        settings = {"allow_other_model": True, "hold": ("norms", "attention"), "most": 32}
        settings["layers"] = layers
        say("32 features followed per layer, held norms and attention")
        rows = whole(say, model, arguments.group, known, arguments.keep, **settings)
        if not arguments.known:
            known_answers(say, rows)
        if arguments.out:
            say.save(arguments.out)
        if arguments.no_edges:
            return
        say("\nedges against central differences, float64")
        right(say, "the model", arguments.group, model, KNOWN[0][0], layers)
    else:
        say("edges per second, one layer pair, against one pass per node with dense encodes")
        for name, group in MINIS.items():
            speed(say, name, group)
        say("\nedges against central differences, float64, all layers")
        for name, group in MINIS.items():
            right(say, name, group)
        for name, group in MINIS.items():
            say(f"\n{name}, all 8 layers, 64 features followed per layer, held norms")
            prompts = [(text, None, None) for text in PROMPTS]
            whole(say, qsl.load_model(name), group, prompts, None)
        say()
        shapes(say, arguments.rows)
    if arguments.out:
        say.save(arguments.out)


if __name__ == "__main__":
    main()
