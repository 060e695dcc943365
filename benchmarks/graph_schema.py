"""An exported graph against the definitions in the repositories of the viewers that read it.

    python benchmarks/graph_schema.py --schema graph-schema.json --models graph_models.py \\
        [GRAPH.json] > benchmarks/results/graph-schema.txt

Neuronpedia validates uploads with `apps/webapp/app/api/graph/graph-schema.json` (JSON Schema,
draft 7); circuit-tracer writes its files with the pydantic classes of
`circuit_tracer/frontend/graph_models.py`. Both files are the reader's to fetch. Without a graph,
one of mini-qwen3 is made. Printed: whether both accept it, and how many nodes a viewer's pruning
slider keeps at a half.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema

from qwen_scope_lens.graphs import attribute, circuit_tracer, prune


def made() -> dict[str, Any]:
    graph = attribute("mini-qwen3", "The package manager is a tool", "mini-qwen3/w1k-l0-16")
    return circuit_tracer(prune(graph), "a-graph")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graph", type=Path, nargs="?")
    parser.add_argument("--schema", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    given = parser.parse_args()
    content = json.loads(given.graph.read_text("utf-8")) if given.graph else made()
    print(f"{len(content['nodes'])} nodes, {len(content['links'])} links")
    schema = jsonschema.Draft7Validator(json.loads(given.schema.read_text("utf-8")))
    errors = [f"{list(e.absolute_path)}: {e.message:.80}" for e in schema.iter_errors(content)]
    print(f"{given.schema.name}: {len(errors)} errors", *errors[:5], sep="\n  ")
    spec = importlib.util.spec_from_file_location("graph_models", given.models)
    assert spec is not None
    assert spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    read = models.Model(**content)
    print(f"{given.models.name}: accepted, {len(read.nodes)} nodes")
    counted = [n for n in content["nodes"] if n["influence"] is not None]
    kept = [n for n in counted if n["influence"] <= 0.5]
    print(f"a slider at 0.5 keeps {len(kept)} of {len(counted)} nodes")


if __name__ == "__main__":
    main()
