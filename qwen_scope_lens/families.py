"""The families of Qwen models as one table of facts. A new family is a new row.

A row says how the family's HF classes are named and built, and what other programs call the family.
`models/architecture.py` derives from it where the parts of each class are. Which SAEs belong to
which model is listed in `catalog.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILIES", "SUPPORTED", "Family"]


@dataclass(frozen=True)
class Family:
    """Models that share their HF classes."""

    name: str  # HF's model_type (that of the multimodal wrapper if there is one)
    titles: tuple[str, ...]  # what people call the models
    prefix: str  # how the names of the HF classes begin
    llama_name: str  # the name of the architecture in llama.cpp
    is_moe: bool = False
    is_hybrid: bool = False
    """Three of four layers are linear attention, the norms multiply by 1 + weight, and the
    checkpoints on the hub are image-text wrappers around the text model."""


FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family("qwen2", ("Qwen2", "Qwen2.5"), "Qwen2", "qwen2"),
        Family("qwen3", ("Qwen3",), "Qwen3", "qwen3"),
        Family("qwen3_moe", ("Qwen3-MoE",), "Qwen3Moe", "qwen3moe", is_moe=True),
        Family("qwen3_5", ("Qwen3.5", "Qwen3.6"), "Qwen3_5", "qwen35", is_hybrid=True),
        Family(
            "qwen3_5_moe",
            ("Qwen3.5-MoE", "Qwen3.6-MoE"),
            "Qwen3_5Moe",
            "qwen35moe",
            is_moe=True,
            is_hybrid=True,
        ),
    )
}

_TITLES = [title for row in FAMILIES.values() for title in row.titles]
SUPPORTED = f"{', '.join(_TITLES[:-1])} and {_TITLES[-1]}"
"""The supported families, as messages list them."""
