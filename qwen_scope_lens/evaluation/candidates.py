"""Other items, read as a benchmark's own were: candidates to add, or a training set.

A folder that was extracted before is opened; a file is run through the benchmark's model now, with
its layers, and nothing is kept.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.evaluation.footprint import Footprint
from qwen_scope_lens.evaluation.prompts import PromptFormat, read_prompts
from qwen_scope_lens.evaluation.suite import Benchmark, extract_suite, read_footprint
from qwen_scope_lens.features.manifest import Manifest
from qwen_scope_lens.features.store import FeatureStore

__all__ = ["footprint_like"]


def footprint_like(
    benchmark: Benchmark,
    path: str | os.PathLike[str],
    layer: int | None = None,
    position: str = "last",
    how: PromptFormat | None = None,
    model: Any = None,
    say: Callable[[str], None] = lambda line: None,
) -> Footprint:
    """The footprint of a store's folder or of a file's items, comparable to the benchmark's.

    `how` is the prompt format of the file, the benchmark's own unless given; `model` the one that
    the benchmark was read by, unless given.
    """
    place = Path(path).expanduser()
    chosen = benchmark.store.layers[-1] if layer is None else layer
    if place.is_dir() and Manifest.exists(place):
        return read_footprint(FeatureStore.open(place), chosen, position, place.name)
    if place.is_dir():
        raise BadFile(
            f"{place} is a folder, but no feature store: expected one, or a file of items"
        )
    manifest = benchmark.store.manifest
    sae = LayerRef.parse(benchmark.store.sae(chosen).ref)
    prompts = list(read_prompts(path, _own_format(benchmark) if how is None else how))
    say(f"{place.name}: {len(prompts):,} items through {manifest.model.id}")
    with tempfile.TemporaryDirectory() as folder:
        suite = extract_suite(
            {place.stem: prompts},
            model=manifest.model.id if model is None else model,
            group=sae.group,
            layers=[chosen],
            out=folder,
            max_tokens=manifest.settings.max_tokens,
            truncate=manifest.settings.truncate,
            enable_thinking=manifest.settings.enable_thinking,
            add_generation_prompt=manifest.settings.add_generation_prompt,
        )
        return suite[place.stem].footprint(chosen, position)


def _own_format(benchmark: Benchmark) -> PromptFormat:
    """How the benchmark's prompts were made from their file."""
    if "task" in benchmark.facts:
        raise BadFile(
            f"{benchmark.name} was rendered by lm-eval, so a file of items has no known template:"
            " pass --template or --column, or extract the items first"
        )
    known = {field.name for field in fields(PromptFormat)} - {"split"}
    return PromptFormat(**{key: value for key, value in benchmark.facts.items() if key in known})
