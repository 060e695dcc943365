"""What a run will take: disk, GPU memory and hours, said before anything is downloaded.

The sizes of SAEs come from the catalog. The size of a model is that of its folder, or computed
from its depth and width as for a dense model. Hours are floating-point operations over the speed
that the recipe assumes (`estimate.tflops`, effective), so they are an order of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_scope_lens.catalog import bundled_model, find_group
from qwen_scope_lens.recipes.recipe import Recipe

__all__ = ["Estimate", "estimate"]

VOCABULARY = 152_000
"""About the size of Qwen's vocabularies."""
ENTRY = 9
"""Bytes of a (token, feature) pair in a store: by token and by feature."""


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, hours at the assumed speed."""

    model: float
    saes: float
    files: float  # stores and other results
    memory: float  # of the GPU
    hours: float
    tflops: float

    def __str__(self) -> str:
        return (
            f"estimate: {_gb(self.model + self.saes)} of weights to have (model"
            f" {_gb(self.model)}, SAEs {_gb(self.saes)}), {_gb(self.files)} of results,"
            f" {_gb(self.memory)} of GPU memory (or main memory), {self.hours:,.2g} hours at"
            f" {self.tflops:g} effective TFLOP/s (an assumption: no GPU was measured)"
        )


def estimate(recipe: Recipe, sae_memory: int | None = None) -> Estimate:
    """The estimate of a recipe with its present settings."""
    group = find_group(str(recipe.settings["sae"]))
    layers = recipe.layers
    sizes = recipe.estimate
    depth, width = group.backbone.num_layers, group.d_model
    dense = 12.0 * depth * width**2 + 2.0 * VOCABULARY * width
    name = str(recipe.settings["model"])
    folder = bundled_model(name) or Path(name)
    files = [*folder.glob("*.safetensors")] if folder.is_dir() else []
    model = float(sum(file.stat().st_size for file in files)) or 2 * dense
    read, written, trained = (
        float(sizes.get(key, 0)) for key in ("tokens", "generated", "trained")
    )
    operations = 2 * dense * (read + written) + 6 * dense * trained
    operations += 2 * group.d_sae * width * len(layers) * read
    saes = float(group.bytes_per_layer * len(layers))
    room = min(saes, float(sae_memory)) if sae_memory else saes
    tflops = float(sizes.get("tflops", 100))
    return Estimate(
        model=model,
        saes=saes,
        files=float(sizes.get("stored", read)) * len(layers) * group.k * ENTRY,
        memory=model + room + (8 * model if trained else 0.0) * float(sizes.get("full", 0)),
        hours=operations / (tflops * 1e12) / 3600,
        tflops=tflops,
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
