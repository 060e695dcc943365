"""Which features, through all layers, made the model go on with this token.

    qsl graph "The package manager is a tool" --sae mini-qwen3/w1k-l0-16 --out graph/
    qsl graph --from graph/ --ablate 7.385@6 --amplify 7.929@6 --save-plan plan.json
    qsl steer "The package manager is a tool" --plan plan.json --compare
    # needs the hub:
    qsl graph "The capital of France is" --sae qwen3-8b-base/w64k-l0-50 --target " Paris" \\
        --target-minus " London" --labels labels.jsonl --out graph/

Nodes are features at tokens, what the SAEs leave out (errors), and embeddings. Edges are linear
effects on the next SAE layer, by gradients with the scales of norms held (--hold). The graph is
pruned to --nodes of the influence on the target and --edges of what is left. The next tables say
how far to trust it: what the model still says when only the graph's features are left
(faithfulness) and how much it loses without them (completeness), beside random features.

--out gets index.html (the graph to click through), graph.json (everything, for --from) and a folder
circuit-tracer/ that the viewers of circuit-tracer and Neuronpedia read. With it, a graph that was
interrupted goes on behind its last finished layer when the command is given again. A plan that is
made from nodes acts at every token: `qsl steer` shows what it does, `qsl sweep` measures it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.options import (
    add_json,
    add_labels,
    add_layers,
    add_sae_files,
    count,
    memory,
    output,
    positive,
    read_labels,
    remark,
    share,
)
from qwen_scope_lens.errors import BadFile, BadPlan, BadText
from qwen_scope_lens.files import refuse_other_folder

if TYPE_CHECKING:
    from qwen_scope_lens.graphs import Faithfulness, FeatureGraph

GRAPH = "graph.json"
HELD = {"nothing": (), "norms": ("norms",), "attention": ("norms", "attention")}
FACTOR = 2.0
ABLATIONS: tuple[Literal["zero", "mean"], ...] = ("zero", "mean")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what the model goes on from")
    parser.add_argument(
        "--sae", default="mini-qwen3/w1k-l0-16", help="a group of SAEs (%(default)s)"
    )
    plans.add_model(parser)
    add_layers(parser, "such as 0-35 or 4,12,20; default: all of the group", check=inputs.unchecked)
    add_sae_files(parser)
    parser.add_argument("--target", help="the next token that is explained; default: the likeliest")
    parser.add_argument(
        "--target-minus", help="a token that it might have been: the difference is explained"
    )
    parser.add_argument(
        "--hold",
        choices=tuple(HELD),
        default="norms",
        help="what keeps its value under gradients; attention: norms and attention (%(default)s)",
    )
    parser.add_argument(
        "--steps", type=count, default=1, help="of integrated gradients; default: 1, plain ones"
    )
    parser.add_argument(
        "--most", type=count, default=64, help="features followed per layer (%(default)s)"
    )
    parser.add_argument(
        "--memory", type=memory, default=2**30, help="for a block of gradients; default: 1 GiB"
    )
    parser.add_argument("--nodes", type=share, default=0.8, help="share kept (%(default)s)")
    parser.add_argument("--edges", type=share, default=0.98, help="share kept (%(default)s)")
    parser.add_argument("--no-test", action="store_true", help="do not run the ablations")
    add_labels(parser, "JSON lines: address, text, score, provenance")
    parser.add_argument("--pages", help="address of the features' site, for links in the page")
    parser.add_argument("--top", type=count, default=10, help="features shown (%(default)s)")
    parser.add_argument("--from", dest="made", type=Path, help="a folder that --out wrote")
    for name, what in (("ablate", "removed"), ("amplify", "multiplied by --by")):
        parser.add_argument(
            f"--{name}", nargs="+", default=[], metavar="NODE", help=f"features to be {what}"
        )
    parser.add_argument("--by", type=positive, default=FACTOR, help="factor (%(default)s)")
    parser.add_argument("--save-plan", type=output, metavar="PLAN.json", help="where they go")
    parser.add_argument("--out", type=Path, help="a folder for page, graph and export")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    # What is wrong is said before torch is imported, which takes seconds.
    edits = [*arguments.ablate, *arguments.amplify]
    if bool(edits) != bool(arguments.save_plan):
        raise BadPlan("--ablate and --amplify name nodes, --save-plan the file: give both")
    if (arguments.text is None) == (arguments.made is None):
        raise BadText("give a TEXT, or --from with a folder that --out wrote: one of the two")
    if arguments.made is not None and not (arguments.made / GRAPH).is_file():
        raise BadFile(
            f"{arguments.made / GRAPH} does not exist: `qsl graph TEXT --out FOLDER` makes such a"
            " file"
        )
    if arguments.text is not None and not arguments.text.strip():
        raise BadText("there is no text to go on from: give some words")
    if arguments.out:
        refuse_other_folder(arguments.out, "a graph", GRAPH)
    labels = read_labels(arguments.labels)
    if arguments.pages is not None:
        from qwen_scope_lens.pages import Link

        Link("", arguments.pages)
    whole, model = _made(arguments)

    from qwen_scope_lens.graphs import faithfulness, prune
    from qwen_scope_lens.graphs.folder import save_folder

    if labels is not None:
        whole = whole.labelled(labels)
    graph = prune(whole, arguments.nodes, arguments.edges)
    tests = []
    for ablation in () if model is None or arguments.no_test else ABLATIONS:
        settings = {"sae_folder": arguments.sae_folder, "device": arguments.device}
        test = faithfulness(model, graph, ablation=ablation, progress=True, **settings)
        tests.append(test)
    _print(arguments, graph, tests)
    if arguments.out:
        page = save_folder(arguments.out, whole, graph, tests, arguments.pages)
        if arguments.made is None and (levels := _levels(arguments.out)):
            levels.unlink(missing_ok=True)
        remark(f"\nwritten: {page}")
    if edits:
        _plan(arguments, whole)
    return 0


def _made(arguments: argparse.Namespace) -> tuple[FeatureGraph, Any]:
    """The graph, and the model that it was made with; None for a graph from a folder."""
    if arguments.made is not None:
        from qwen_scope_lens.graphs import FeatureGraph

        return FeatureGraph.load(arguments.made / GRAPH), None
    row = find_group(arguments.sae)
    for layer in arguments.layers or ():
        row.check_layer(layer)
    remark(f"Note: {row.notice}\n")

    from qwen_scope_lens.address import LayerRef
    from qwen_scope_lens.graphs import attribute
    from qwen_scope_lens.graphs.attribution import check_files

    check_files(row, arguments.layers, arguments.sae_folder)
    model = plans.load(
        arguments, [LayerRef(row.short, layer) for layer in arguments.layers or row.layers]
    )
    graph = attribute(
        model,
        arguments.text,
        row.short,
        layers=arguments.layers,
        target=arguments.target,
        target_minus=arguments.target_minus,
        hold=HELD[arguments.hold],
        most=arguments.most,
        steps=arguments.steps,
        memory=arguments.memory,
        sae_folder=arguments.sae_folder,
        device=arguments.device,
        allow_other_model=True,  # `plans.load` has looked
        progress=True,
        keep=_levels(arguments.out),
    )
    return graph, model


def _levels(out: Path | None) -> Path | None:
    """Beside the folder, the finished levels of a graph that is not done."""
    return None if out is None else out.with_name(f"{out.name}.levels.json")


def _print(arguments: argparse.Namespace, graph: FeatureGraph, tests: list[Faithfulness]) -> None:
    if arguments.json:
        from qwen_scope_lens.files import json_text

        nodes = graph.table().records()
        curves = {test.ablation: test.table().records() for test in tests}
        content = {"said": list(graph.said()), "features": nodes, "tests": curves}
        print(json_text("qsl-graph-table", 1, content), end="")
        return
    print(graph.table(arguments.top))
    for test in tests:
        print(f"\n{test.table()}")


def _plan(arguments: argparse.Namespace, graph: FeatureGraph) -> None:
    from qwen_scope_lens.steering.plan import Edit, Plan

    edits: list[Edit] = []
    if arguments.ablate:
        edits += graph.plan(arguments.ablate, "ablate").edits
    if arguments.amplify:
        edits += graph.plan(arguments.amplify, "scale", arguments.by).edits
    Plan(edits).save(arguments.save_plan)
    remark(f"written: {arguments.save_plan}: {Plan(edits)}")
