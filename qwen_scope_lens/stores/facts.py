"""Finds out the facts of a manifest: which model, tokenizer, SAEs and versions are used.

It also refuses a model to which the SAEs cannot belong, before any work is done.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import Group, bundled_model, name_of_model
from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.files import file_sha256
from qwen_scope_lens.models.architecture import (
    d_model,
    describe,
    is_quantised,
    text_config,
    unwrap,
)
from qwen_scope_lens.models.checkpoint import open_config
from qwen_scope_lens.saes.checkpoint import subtracts_b_dec
from qwen_scope_lens.saes.locate import HubOptions, locate
from qwen_scope_lens.stores.fingerprints import fingerprint, tokenizer_hash
from qwen_scope_lens.stores.manifest import ModelFacts, SAEFacts, TokenizerFacts

__all__ = [
    "check_config",
    "check_model",
    "model_facts",
    "model_note",
    "other_model",
    "sae_facts",
    "tokenizer_facts",
]

_BLOB = re.compile(r"[0-9a-f]{64}")


def check_config(model: str, group: Group) -> None:
    """Raise for a checkpoint of another width or depth than the SAEs', before reading weights."""
    try:
        config = open_config(str(bundled_model(model) or model))
    except (OSError, ValueError):
        return  # `load_model` says what is wrong
    _check_sizes(model, text_config(config), group, cut=False)


def check_model(model: nn.Module, group: Group) -> None:
    """Raise for a model in memory that has another width or depth than the SAEs'."""
    cut = getattr(model, "up_to_layer", None) is not None
    _check_sizes(describe(model), text_config(model), group, cut)


def _check_sizes(name: str, config: Any, group: Group, cut: bool) -> None:
    width, depth = int(config.hidden_size), int(config.num_hidden_layers)
    if width != group.d_model:
        raise WrongModel(
            f"{name} has d_model {width}, the SAEs {group.short} read {group.d_model}: they were"
            f" trained on {group.backbone.model_id}"
        )
    if depth != group.backbone.num_layers and not cut:
        raise WrongModel(
            f"{name} has {depth} layers, {group.backbone.model_id}, on which {group.short} was"
            f" trained, has {group.backbone.num_layers}: it is another model"
        )


def other_model(name: str, group: Group) -> str | None:
    """A remark if the SAEs were trained on a model of another name, else None."""
    parts = name.rstrip("/").split("/")
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]  # of the hub
    if (cached or parts)[-1].lower() == group.backbone.key:
        return None
    return f"the SAEs {group.short} were trained on {group.backbone.model_id}, this is {name}"


def model_note(facts: ModelFacts, group: Group) -> str | None:
    """A remark if the SAEs were trained on another model or on unquantised weights, else None."""
    said = [note] if (note := other_model(facts.id, group)) else []
    if facts.quantised:
        said.append("the model's weights are quantised, the SAEs were trained on unquantised ones")
    return "; ".join(said) or None


def model_facts(model: nn.Module, layers: Iterable[int]) -> ModelFacts:
    config = unwrap(model).config
    return ModelFacts(
        id=name_of_model(describe(model)),
        revision=getattr(config, "_commit_hash", None),
        dtype=str(next(unwrap(model).parameters()).dtype).removeprefix("torch."),
        d_model=d_model(model),
        fingerprint=fingerprint(model, max(layers)),
        quantised=is_quantised(model),
    )


def tokenizer_facts(tokenizer: Any) -> TokenizerFacts:
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    template = getattr(tokenizer, "chat_template", None)
    return TokenizerFacts(
        name=name_of_model(name),
        size=len(tokenizer),
        sha256=tokenizer_hash(tokenizer),
        chat_template_sha256=_sha(template) if isinstance(template, str) else None,
    )


def sae_facts(
    ref: LayerRef, folder: str | os.PathLike[str] | None = None, revision: str | None = None
) -> SAEFacts:
    file = locate(ref, folder, HubOptions(revision))
    # The hub's cache names a large file by its sha256, so that it need not be read again.
    name = file.path.resolve().name
    return SAEFacts(
        ref=str(ref),
        d_sae=ref.row.d_sae,
        k=ref.row.k,
        sha256=name if _BLOB.fullmatch(name) else file_sha256(file.path),
        revision=file.revision,
        subtracts_b_dec=subtracts_b_dec(file),
    )


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
