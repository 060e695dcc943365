"""Residual streams of a finished mini model, of all layers at once.

`batch_residuals` is what training and the quality figures read; `collect` keeps a million tokens of
every layer on disk for the SAEs, without first tokens and without tokens of extreme norm.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tools.mini.data import batches, padded

__all__ = ["OUTLIER", "batch_residuals", "collect", "load_model", "residual_hooks"]

OUTLIER = 4.0
"""A token whose norm is more than this many times its layer's median is left out."""


def load_model(folder: Path) -> Any:
    """The finished model, in float32, on the GPU when there is one."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def residual_hooks(model: Any, found: list[torch.Tensor | None]) -> list[Any]:
    """Hooks that write the output of every decoder layer into `found[layer]`."""

    def keep(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    return [block.register_forward_hook(keep(n)) for n, block in enumerate(model.model.layers)]


@torch.no_grad()
def batch_residuals(
    model: Any, rows: Sequence[Sequence[int]], order: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], torch.Tensor, list[torch.Tensor]]]:
    """For every batch: row numbers, mask `[b, t]`, and one `[b, t, d_model]` per layer."""
    found: list[torch.Tensor | None] = [None] * len(model.model.layers)
    handles = residual_hooks(model, found)
    try:
        for numbers in order:
            ids, mask = padded(rows, numbers)
            model.model(input_ids=ids.to(model.device), use_cache=False)
            yield numbers, mask, [x.float().cpu() for x in found if x is not None]
    finally:
        for handle in handles:
            handle.remove()


def collect(
    model: Any, rows: Sequence[Sequence[int]], folder: Path, tokens: int, seed: int
) -> list[np.ndarray]:
    """One float16 array `[tokens, d_model]` per layer, made once and then mapped from disk."""
    layers, width = len(model.model.layers), model.config.hidden_size
    done = folder / "done.json"
    paths = [folder / f"layer{layer}.f16" for layer in range(layers)]
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        order = batches(rows, 8192, seed)
        random.Random(seed).shuffle(order)
        files = [path.open("wb") for path in paths]
        kept, read = 0, 0
        median: torch.Tensor | None = None
        for _, mask, residuals in batch_residuals(model, rows, order):
            mask[:, 0] = False
            stacked = torch.stack([residual[mask] for residual in residuals])  # [layers, n, d]
            norms = stacked.norm(dim=-1)
            if median is None:
                median = norms.median(dim=1).values[:, None]
            usual = (norms < OUTLIER * median).all(dim=0)
            for file, values in zip(files, stacked[:, usual].half().numpy(), strict=True):
                file.write(values.tobytes())
            kept, read = kept + int(usual.sum()), read + int(mask.sum())
            if kept >= tokens:
                break
        for file in files:
            file.close()
        facts = {"kept": kept, "read": read, "dropped_share": 1 - kept / read}
        partial = done.with_suffix(".partial")
        partial.write_text(json.dumps(facts))
        os.replace(partial, done)
        print("activations:", facts, flush=True)
    kept = json.loads(done.read_text())["kept"]
    return [np.memmap(path, np.float16, "r", shape=(kept, width)) for path in paths]
