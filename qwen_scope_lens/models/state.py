"""The state dict of a bridge: whole, or refused.

Upstream names only the modules that its adapter wraps, and counts nothing else as missing. Here
every tensor of the HF model has a name: upstream's where it has one and the adapter is the full
one, else HF's own, which an HF model loads, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.component_setup import refresh_container_state_owners

from qwen_scope_lens.errors import WrongModel, WrongState
from qwen_scope_lens.models.architecture import describe

__all__ = ["check_nested", "load_whole", "whole_state"]


def whole_state(bridge: Any, *, upstream_names: bool) -> dict[str, Tensor]:
    """Every tensor of the HF model under one name, shared ones under each of HF's names."""
    model = bridge.original_model
    if any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values()):
        raise WrongModel(
            f"weights of {describe(bridge)} are offloaded, so a state dict would be without them:"
            " load the model without offloading, or save it with HF's own save_pretrained() after"
            " release()"
        )
    state: dict[str, Tensor] = {}
    if upstream_names:
        state |= TransformerBridge.state_dict(bridge, keep_vars=True)
    covered = {id(tensor) for tensor in state.values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in covered:
            state.setdefault(_plain(name), tensor)
    return state


def load_whole(
    bridge: Any, given: Mapping[str, Any], *, strict: bool, assign: bool, upstream_names: bool
) -> tuple[list[str], list[str]]:
    """Write a state dict into the HF model; returns the missing and the unexpected names.

    A tensor is known by the bridge's name, by HF's, and by upstream's. With `strict` the two lists
    are empty, or nothing is written and `WrongState` is raised.
    """
    model = bridge.original_model
    paths: dict[int, list[str]] = {}  # a tensor -> where it stands in the HF model
    known: dict[str, int] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        paths.setdefault(id(tensor), []).append(path)
        known[path] = known[_plain(path)] = id(tensor)
    for name, found in bridge._tl_key_to_actual_keys().items():
        known.setdefault(name, known[found[0]])
    own = whole_state(bridge, upstream_names=upstream_names)

    unexpected = [name for name in given if name not in known]
    arrived = {known[name] for name in given if name in known}
    missing = [name for name, tensor in own.items() if id(tensor) not in arrived]
    if strict and (missing or unexpected):
        raise WrongState(
            f"the state dict does not fit {describe(bridge)}: {len(missing)} of {len(own)} tensors"
            f" are missing{_first(missing)}, {len(unexpected)} are not known here"
            f"{_first(unexpected)}. Nothing was loaded; strict=False loads what fits"
        )
    wanted = {p: given[name] for name in given if name in known for p in paths[known[name]]}
    model.load_state_dict(wanted, strict=False, assign=assign)
    if assign:  # upstream's components hold some parameters themselves
        refresh_container_state_owners(bridge)
    return missing, unexpected


def check_nested(bridge: Any, nested: Mapping[str, Any]) -> None:
    """Refuse what a module around the bridge would save, where it is not the whole model."""
    have = {id(tensor) for tensor in nested.values()}
    model = bridge.original_model.state_dict(keep_vars=True)
    if lacking := [_plain(name) for name, tensor in model.items() if id(tensor) not in have]:
        raise WrongModel(
            f"the state dict of a module that holds this bridge would lack {len(lacking)} of its"
            f" tensors{_first(lacking)}: call state_dict() on the bridge itself"
        )


def _plain(path: str) -> str:
    """HF's own name of a tensor, without the bridge's components that stand in between."""
    return path.replace("_original_component.", "")


def _first(names: list[str]) -> str:
    return f" (the first is {names[0]})" if names else ""
