"""Check by class, depth and name that a model is the one on which the SAEs were trained.

Width and layer alone do not show it. Qwen3-1.7B, Qwen3.5-2B and Qwen3.5-35B-A3B have the same
width, as do Qwen3-8B and Qwen3.5-9B, and Qwen3.6-27B has all the sizes of Qwen3.5-27B. A model that
is known to be another one is refused. If its name says nothing, there is a warning.
"""

from __future__ import annotations

import re
import warnings

from qwen_scope_lens.catalog import GROUPS, Group
from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.architecture import Model, decoder_layers, describe, places_of

__all__ = ["another_model", "check_backbone", "check_name", "is_relative"]

_VARIANTS = re.compile(
    r"base|instruct|chat|it|thinking|hf|unsloth|dynamic|bnb|awq|gptq|int4|int8|fp8|fp16|bf16|nvfp4"
    r"|mxfp4|4bit|8bit|\d{4}"
)
"""Words of a name that say how a model was tuned or stored, and not which model it is."""

_QWEN = re.compile(r"qwen\d+(?:\.\d+)?-\d+(?:\.\d+)?b(?:-a\d+(?:\.\d+)?b)?(?=-|$)")


def check_backbone(model: Model, group: Group, *, allow_other_model: bool = False) -> None:
    """Raise for a model in memory that is known to be another one; warn if nothing is known.

    Base, instruct and quantised versions of a model count as the same model.
    """
    if allow_other_model:
        return
    check_name(describe(model), group, another_model(model, group))


def another_model(model: Model, group: Group) -> str | None:
    """The fact that shows that a model is not the group's, whatever its name. Else None."""
    backbone = group.backbone
    family, depth = places_of(model).family, len(decoder_layers(model))
    if backbone.family not in (None, family):
        return f"it is of the family {family}, not {backbone.family}"
    cut = getattr(model, "up_to_layer", None) is not None or is_relative(describe(model), group)
    if depth > backbone.num_layers or (depth < backbone.num_layers and not cut):
        return f"it has {depth} layers, not {backbone.num_layers}"
    return None


def check_name(name: str, group: Group, known: str | None = None) -> None:
    """As `check_backbone`, by the name alone. `known` is a fact that shows it is another model."""
    trained_on = group.backbone.model_id
    if known is None and is_relative(name, group):
        return
    said = _identity(name)
    if known is None and said is not None and said != _identity(trained_on):
        known = f"its name says {said}"
    if known is not None:
        raise WrongModel(
            f"the SAEs {group.short} were trained on {trained_on}; {name} is another model"
            f" ({known}), where their features mean nothing. Load {trained_on} or a version of it,"
            " or pass allow_other_model=True (--allow-other-model) if this is what you want"
        )
    warnings.warn(
        f"the SAEs {group.short} were trained on {trained_on}, this is {name}: whether it is a"
        " version of it cannot be known from its name. If it is not, the features mean nothing. If"
        " it is, pass allow_other_model=True to silence this warning",
        stacklevel=3,
    )


def is_relative(name: str, group: Group) -> bool:
    """Whether a name is that of the group's own model: base, instruct, or quantised."""
    return _stem(name) == _stem(group.backbone.model_id)


def _stem(name: str) -> str:
    """`Qwen/Qwen3-30B-A3B-Instruct-2507` -> `qwen3-30b-a3b`. Folders of HF's cache work too."""
    parts = name.replace("\\", "/").rstrip("/").split("/")
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    words = (cached or parts)[-1].lower().replace("_", "-").split("-")
    while len(words) > 1 and _VARIANTS.fullmatch(words[-1]):
        words.pop()
    return "-".join(words)


def _identity(name: str) -> str | None:
    """The model that a name says, if it is in the catalog or is named as Qwen names models."""
    stem = _stem(name)
    if stem in {_stem(group.backbone.model_id) for group in GROUPS}:
        return stem
    found = _QWEN.match(stem)
    return found[0] if found else None
