"""Screen candidate items: which features would they add to a benchmark?

Candidates are read as the benchmark's own items were: a folder that was extracted before is opened,
and a file is run through the benchmark's model and SAE without keeping a store.

A candidate is judged by the features that the benchmark does not have yet. The benchmark itself
gives the comparison: for each of its items, the number of features that only this item activates.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.bench.footprint import Footprint, check_comparable
from qwen_scope_lens.bench.prompts import PromptFormat, read_prompts
from qwen_scope_lens.bench.suite import Benchmark, extract_suite, read_footprint
from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.stores.manifest import Manifest
from qwen_scope_lens.stores.reread import StoreReader
from qwen_scope_lens.stores.store import FeatureStore

if TYPE_CHECKING:
    from qwen_scope_lens.models.architecture import Model

__all__ = ["Screened", "footprint_like", "own_novelty", "screen"]


def footprint_like(
    benchmark: Benchmark,
    path: str | os.PathLike[str],
    layer: int | None = None,
    position: str = "last",
    how: PromptFormat | None = None,
    model: Model | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Footprint:
    """The footprint of a store's folder or of a file of items, comparable to the benchmark's.

    `how` is the prompt format of the file; the default is the benchmark's own. The default `model`
    is the one that read the benchmark.
    """
    place = Path(path).expanduser()
    chosen = benchmark.store.layers[-1] if layer is None else layer
    if place.is_dir() and Manifest.exists(place):
        return read_footprint(FeatureStore.open(place), chosen, position, place.name)
    if place.is_dir():
        raise BadFile(
            f"{place} is a folder but not a feature store: expected a store or a file of items"
        )
    reading = StoreReader.of(benchmark.store, [chosen])
    sae = LayerRef.parse(benchmark.store.sae(chosen).ref)
    prompts = list(read_prompts(path, _own_format(benchmark) if how is None else how))
    say(f"{place.name}: {len(prompts):,} items through {reading.model}")
    with tempfile.TemporaryDirectory() as folder:
        suite = extract_suite(
            {place.stem: prompts},
            model=reading.open_model() if model is None else model,
            group=sae.group,
            layers=[chosen],
            out=folder,
            **asdict(reading.settings),
        )
        return suite[place.stem].footprint(chosen, position)


def _own_format(benchmark: Benchmark) -> PromptFormat:
    """The prompt format with which the benchmark's own file was read."""
    if "task" in benchmark.facts:
        raise BadFile(
            f"{benchmark.name} was rendered by lm-eval, so the template for a file of items is not"
            " known: pass --template or --column, or extract the items first"
        )
    known = {field.name for field in fields(PromptFormat)} - {"split"}
    return PromptFormat(**{key: value for key, value in benchmark.facts.items() if key in known})


@dataclass(frozen=True)
class Screened:
    """One candidate item."""

    key: str
    n_features: int
    new: int  # features that no item of the benchmark activates
    adds: int  # new features that no earlier candidate activates either
    percentile: float  # share of the benchmark's own items that add less; ties count half

    @property
    def useful(self) -> bool:
        return self.adds > 0


def own_novelty(footprint: Footprint) -> np.ndarray:
    """For each item, how many features only this item activates. `-> int64 [items]`

    The mean is the Good-Turing estimate of what one more item like these would add.
    """
    unique = (footprint.counts[footprint.features] == 1).astype(np.float32)
    return np.rint(footprint.compact @ unique).astype(np.int64)


def screen(benchmark: Footprint, candidates: Footprint) -> list[Screened]:
    """Screen the candidates in the given order; `adds` treats earlier candidates as accepted."""
    check_comparable(benchmark, candidates)
    usual = np.sort(own_novelty(benchmark))
    known = benchmark.counts > 0
    taken = known.copy()
    found = []
    for key, features in zip(candidates.keys, _rows(candidates), strict=True):
        new = int(np.count_nonzero(~known[features]))
        below, upto = np.searchsorted(usual, new, "left"), np.searchsorted(usual, new, "right")
        found.append(
            Screened(
                key=key,
                n_features=len(features),
                new=new,
                adds=int(np.count_nonzero(~taken[features])),
                percentile=float(below + upto) / (2 * len(usual)),
            )
        )
        taken[features] = True
    return found


def _rows(footprint: Footprint) -> Sequence[np.ndarray]:
    return np.split(footprint.items.indices, footprint.items.indptr[1:-1])
