"""Whether a model is the one that SAEs were trained on: refused where that is known not to be so.

Width and depth do not tell models apart (four published backbones share one width), and features
of another model are random directions in this one. What is compared is the configuration and the
name, never a weight.
"""

from __future__ import annotations

import warnings
from typing import Any

from qwen_scope_lens.catalog import GROUPS, Group
from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.layers import d_model, describe, places_of, text_config

__all__ = ["check_backbone", "name_key"]


def check_backbone(model: Any, row: Group, *, allow_other_model: bool = False) -> None:
    """Raise where a model in memory is known not to be the backbone of a group of SAEs.

    Known is another width, family or depth, or the name of another backbone of the catalogue. A
    name that says nothing (a folder, a fine-tuned model) gets a warning. `allow_other_model` takes
    all of them without a word except another width, which no arithmetic allows.
    """
    name, backbone = describe(model), row.backbone
    head = f"the SAEs {row.short} were trained on {backbone.model_id}"
    if d_model(model) != row.d_model:
        raise WrongModel(
            f"{head} and read residuals of width {row.d_model}; {name} has {d_model(model)}"
        )
    if allow_other_model:
        return
    way_out = (
        "their features mean nothing in another model. Use the SAEs of this model, or, if it is"
        f" that one fine-tuned, say allow_other_model=True ({name})"
    )
    family, depth = places_of(model).family, int(text_config(model).num_hidden_layers)
    if backbone.family is not None and family != backbone.family:
        raise WrongModel(f"{head}, a {backbone.family}; this is a {family}: {way_out}")
    cut = getattr(model, "up_to_layer", None) is not None
    if depth != backbone.num_layers and not cut:
        raise WrongModel(
            f"{head}, which has {backbone.num_layers} layers; this has {depth}: {way_out}"
        )
    key = name_key(name)
    if key == backbone.key:
        return
    if key in {group.backbone.key for group in GROUPS}:
        raise WrongModel(f"{head}, this is another of the catalogue: {way_out}")
    warnings.warn(
        f"{head}; whether {name} comes from it cannot be seen. Where it does, allow_other_model"
        "=True says so",
        stacklevel=3,
    )


def name_key(name: str) -> str:
    """The last part of a model's name, in lower case, also in a folder of the hub's cache."""
    parts = name.rstrip("/").split("/")
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return (cached or parts)[-1].lower()
