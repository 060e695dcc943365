"""Which two SAEs are to be matched, and by what they can be: decided before anything heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import StoreMismatch, UnknownName
from qwen_scope_lens.stores.manifest import Manifest

__all__ = ["By", "sides_of"]

By = Literal["decoder", "activation"]


def sides_of(
    a: str, b: str, layers: Sequence[int] | None = None, by: By | None = None
) -> tuple[tuple[LayerRef, LayerRef], By]:
    """The SAEs of two stores or at two addresses, and how they are compared.

    By default that is by decoder if both SAEs belong to the same model, else by activation.
    """
    numbers = list(layers) if layers is not None else []
    if len(numbers) > 2:
        raise UnknownName(f"layers {numbers}: expected one for both, or one of A and one of B")
    stored, refs = [], []
    for side, name in enumerate((a, b)):
        stored.append(Path(name).is_dir())
        if stored[-1]:
            manifest = Manifest.open(Path(name))
            layer = numbers[min(side, len(numbers) - 1)] if numbers else max(manifest.saes)
            refs.append(LayerRef.parse(manifest.sae(layer, Path(name)).ref))
        else:
            refs.append(LayerRef.parse(name))
    rows = [ref.row.backbone for ref in refs]
    if by is None:
        by = "decoder" if rows[0] == rows[1] else "activation"
    if by == "decoder" and rows[0] != rows[1]:
        raise StoreMismatch(
            f"{refs[0]} and {refs[1]} belong to different residual spaces ({rows[0].model_id},"
            f" {rows[1].model_id}), so their directions cannot be compared. Match stores of both by"
            " activation"
        )
    if by == "activation" and not all(stored):
        raise UnknownName(
            f"matching {refs[0]} and {refs[1]} by activation needs a store of each on the same"
            " texts (`qsl extract`), not addresses"
        )
    return (refs[0], refs[1]), by
