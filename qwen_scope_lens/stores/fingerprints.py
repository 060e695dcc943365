"""A model's fingerprint, a hash over all weights that take part in its residuals; a tokenizer's.

Two models that differ in a single number have different fingerprints, so that their codes never
stand in one store. Hashing a model costs less than loading it, so no hash is cached. A tokenizer's
hash is over all that decides which ids a text gets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.architecture import decoder_layers, describe, part, places_of

__all__ = ["fingerprint", "is_sample", "sampled_fingerprint", "sorted_json", "tokenizer_hash"]

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


_BACKENDS: dict[str, str] = {}
"""Hashes of fast tokenizers seen in this process: sorting one of 150,000 tokens takes 0.8 s."""

_VOLATILE = ("truncation", "padding")
"""What calls set in a fast tokenizer."""

_decode = json.JSONDecoder().raw_decode


def tokenizer_hash(tokenizer: Any) -> str:
    """The hash of a fast tokenizer's JSON, without what calls set in it; of a slow one's words."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _sha(json.dumps(sorted(tokenizer.get_vocab().items())))
    text = backend.to_str()
    begun = text.find('"added_tokens":')
    head = text[:begun]
    with contextlib.suppress(ValueError):  # where the order is another one, nothing is left out
        head = json.dumps(_without_volatile(json.loads(head + '"end": 0}')))
    key = _sha(head, text[begun:])
    if key not in _BACKENDS:
        _BACKENDS[key] = _sha(sorted_json(text))
    return _BACKENDS[key]


def sorted_json(text: str) -> str:
    """A tokenizer's JSON with sorted keys. Objects and lists are decoded one after the other.

    All of a tokenizer of 150,000 tokens at once takes 75 MB in Python objects, half of which Python
    does not give back.
    """
    try:
        return _canonical(text, 0, _VOLATILE)[0]
    except ValueError:  # JSON with spaces, which no version of tokenizers has written so far
        return json.dumps(_without_volatile(json.loads(text)), sort_keys=True)


def _canonical(text: str, at: int, without: Sequence[str] = ()) -> tuple[str, int]:
    """The list or object at `at` as `json.dumps` writes it with sorted keys, and where it ends."""
    is_list, at = text[at] == "[", at + 1
    if text[at] in "]}":
        return text[at - 1 : at + 1], at + 1
    if is_list:
        parts, some = [], []
        while text[at - 1] != "]":
            value, at = _decode(text, at)
            some.append(value)
            at += 1
            if len(some) == 1024 or text[at - 1] == "]":
                parts.append(json.dumps(some, sort_keys=True)[1:-1])
                some = []
        return f"[{', '.join(parts)}]", at
    plain: dict[str, Any] = {}
    nested: dict[str, str] = {}
    while text[at - 1] != "}":
        key, at = _decode(text, at)
        if text[at + 1] in "[{":
            nested[key], at = _canonical(text, at + 1)
        else:
            plain[key], at = _decode(text, at + 1)
        at += 1
    for key in without:
        plain.pop(key, None)
        nested.pop(key, None)
    if not nested:
        return json.dumps(plain, sort_keys=True), at
    nested |= {key: json.dumps(value) for key, value in plain.items()}
    return "{" + ", ".join(f"{json.dumps(key)}: {nested[key]}" for key in sorted(nested)) + "}", at


def _without_volatile(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in _VOLATILE}


def _sha(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8"))
    return digest.hexdigest()
