"""A model's fingerprint: one hash over every weight that takes part in its residuals.

Two models that differ in a single number have different fingerprints, so that their codes never
stand in one store. Hashing a model costs less than loading it, so no hash is cached.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.architecture import decoder_layers, describe, part, places_of

__all__ = ["fingerprint", "is_sample", "sampled_fingerprint"]

ALL = "all-weights:"
"""Stands before a hash over all weights. Older stores have a hash of a sample, without it."""

_BLOCK = 1 << 24  # numbers of a weight that are copied to the CPU at a time
_SAMPLE = 64


def fingerprint(model: nn.Module, last: int) -> str:
    """The hash over the embedding and the layers 0..last, in memory, quantised or offloaded.

    It covers parameters and persistent buffers, in their order, with shape and dtype. Names are not
    covered, so that a bridge has the same fingerprint as the model inside it.
    """
    tensors = [t for module in _modules(model, last) for t in _tensors(module, describe(model))]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(_hash, tensors))
    return ALL + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_sample(found: str) -> bool:
    """Whether a fingerprint is of an older version, which looked at 64 numbers per weight."""
    return not found.startswith(ALL)


@torch.no_grad()
def sampled_fingerprint(model: nn.Module, last: int) -> str:
    """The fingerprint that older versions wrote, for going on with one of their stores."""
    digest = hashlib.sha256()
    for module in _modules(model, last):
        for weight in module.parameters():
            digest.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
            if weight.is_meta or not weight.numel():  # offloaded elsewhere
                continue
            flat = weight.detach().reshape(-1)
            at = torch.linspace(0, flat.numel() - 1, _SAMPLE, dtype=torch.float64).long()
            sample = flat[at.to(flat.device)].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _modules(model: nn.Module, last: int) -> list[nn.Module]:
    return [part(model, places_of(model).embed), *list(decoder_layers(model))[: last + 1]]


def _tensors(module: nn.Module, model: str) -> Iterator[torch.Tensor]:
    """Every stored tensor of a module, in the order of its modules; shared tensors once."""
    seen: set[int] = set()
    for inner in module.modules():
        passing = inner._non_persistent_buffers_set
        own: list[tuple[str, torch.Tensor | None]] = [*inner._parameters.items()]
        own += [item for item in inner._buffers.items() if item[0] not in passing]
        for name, tensor in own:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.is_meta:
                tensor = _offloaded(inner, name, model)
            yield from _plain(tensor)


def _offloaded(module: nn.Module, name: str, model: str) -> torch.Tensor:
    """A weight that accelerate keeps in another memory or on disk."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            return torch.as_tensor(weights[name])
    raise WrongModel(
        f"the weight {name} of {model} cannot be read (it is on the meta device), and without all"
        " weights it cannot be told which model this is. Load the model again"
    )


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a quantised tensor consists of; for a plain tensor, the tensor itself."""
    if (mesh := getattr(tensor, "device_mesh", None)) is not None:
        raise WrongModel(
            f"the model's weights are shared out among processes (tensor parallel or FSDP:"
            f" {mesh}), and a store is written by a process that has the whole model. Load it with"
            " device_map='auto', which spreads its layers over the GPUs of one process, or start"
            " one process per GPU, each with its own model and its own part (--worker I/N)"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
        return
    yield tensor.data
    scales: Any = getattr(tensor, "quant_state", None)  # bitsandbytes
    if scales is not None:
        found = scales.as_dict(packed=True)
        yield from (found[name] for name in sorted(found) if isinstance(found[name], torch.Tensor))


@torch.no_grad()
def _hash(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK].cpu().contiguous()
        digest.update(block.view(torch.uint8).numpy().data)
    return digest.hexdigest()
