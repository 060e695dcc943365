"""What is finished of a graph, level by level, so that one that was interrupted goes on.

A file beside the result holds the levels that are done and what they were made from. It goes on
only with the same text, model, SAE files and settings; else the graph begins anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.graphs.graph import Node
from qwen_scope_lens.saes.locate import local_path, locate

__all__ = ["Kept", "Levels", "sae_files"]

FORMAT, VERSION = "qsl-graph-levels", 1
MADE_BY = "qsl graph TEXT --out FOLDER"
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Sources and targets (places in the nodes) and weights."""


@dataclass
class Levels:
    """A graph from the target down to `above`, the last level that is finished."""

    nodes: list[Node]
    edges: list[Edges]
    upper: list[int]  # places of the level's features in `nodes`
    above: int | None = None  # None: only the target is there
    done: int = 0  # levels


@dataclass(frozen=True)
class Kept:
    """The file, and what the graph in it is made from."""

    path: Path
    made_from: Mapping[str, Any]

    def load(self) -> Levels | None:
        """The levels of the same graph; None where there are none, or those of another graph."""
        try:
            found = read_json(self.path, FORMAT, VERSION, MADE_BY)
            if found["made_from"] != json.loads(json.dumps(self.made_from)):
                return None
            sources, targets, weights = found["edges"]
            return Levels(
                nodes=[Node(**row) for row in found["nodes"]],
                edges=[
                    (
                        np.array(sources, dtype=np.int64),
                        np.array(targets, dtype=np.int64),
                        np.array(weights, dtype=np.float64),
                    )
                ],
                upper=[int(place) for place in found["upper"]],
                above=found["above"],
                done=int(found["done"]),
            )
        except (BadFile, KeyError, TypeError, ValueError):  # from an older version, or damaged
            return None

    def save(self, levels: Levels) -> None:
        parts = zip(*levels.edges, strict=True)
        content = {
            "made_from": self.made_from,
            "nodes": [asdict(node) for node in levels.nodes],
            "edges": [np.concatenate(part).tolist() for part in parts],
            "upper": levels.upper,
            "above": levels.above,
            "done": levels.done,
        }
        write_json(self.path, FORMAT, VERSION, content)


def sae_files(group: str, layers: Sequence[int], folder: str | Path | None) -> list[Any]:
    """Path, size and time of change of each SAE's file on this machine; None for one of the hub."""
    found: list[Any] = []
    for ref in (LayerRef(group, layer) for layer in layers):
        path = local_path(ref) if folder is None else locate(ref, folder).path
        known = None if path is None else path.stat()
        found.append(known and [str(path), known.st_size, known.st_mtime_ns])
    return found
