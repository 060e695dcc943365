"""The last norm and the unembedding of a model, without the rest of it (for the logit lens).

`read_unembedding` takes them from a model in memory, or reads only these tensors of a checkpoint:
one gigabyte of an 8B model instead of sixteen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.errors import CheckpointMissing, ScopeError, WrongKeys, WrongModel
from qwen_scope_lens.models.architecture import (
    Model,
    describe,
    part,
    places_of,
    places_of_config,
    text_config,
    unwrap,
)
from qwen_scope_lens.models.checkpoint import cache_only, missing, open_config
from qwen_scope_lens.models.open import fetch_file, files_of

__all__ = ["Unembedding", "read_unembedding"]

_ROOT = r"^(?:model\.)?(?:language_model\.)?"
_NORM = re.compile(_ROOT + r"norm\.weight$")
_HEAD = re.compile(r"^(?:language_model\.)?lm_head\.weight$")
_EMBED = re.compile(_ROOT + r"embed_tokens\.weight$")


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The end of a model: `logits = RMSNorm(x) * scale @ weight.T`."""

    weight: Tensor  # [vocabulary, d_model], in the checkpoint's dtype
    scale: Tensor  # [d_model], float32; Qwen3.5's norms store it minus one
    eps: float

    def normed(self, x: Tensor) -> Tensor:
        """Apply the last norm, in float32. `[.., d_model] -> [.., d_model]`"""
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale

    def logits(self, x: Tensor) -> Tensor:
        """The logits of residuals, in float32. `[.., d_model] -> [.., vocabulary]`"""
        return self.normed(x) @ self.weight.float().T


def read_unembedding(
    model: str | Path | Model, *, revision: str | None = None, local_files_only: bool = False
) -> Unembedding:
    """Take it from a model or bridge in memory, or from a checkpoint by name or folder."""
    if isinstance(model, nn.Module):
        return _of_model(model)
    from safetensors import SafetensorError, safe_open

    name = str(bundled_model(str(model)) or model)
    source: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    source |= cache_only(name, source)
    try:
        config = open_config(name, **source)
        places = places_of_config(config)
        found: dict[str, Tensor] = {}
        for file, keys in files_of(name, source).items():
            if keys is not None and not any(_kind(key) for key in keys):
                continue
            with safe_open(fetch_file(name, file, source), framework="pt", device="cpu") as opened:
                named = {_kind(key): key for key in list(opened.keys())}
                found |= {kind: opened.get_tensor(key) for kind, key in named.items() if kind}
    except (OSError, SafetensorError) as error:
        if isinstance(error, ScopeError):
            raise
        said = (
            missing(name, error) if isinstance(error, OSError) else f"cannot read {name}: {error}"
        )
        raise CheckpointMissing(said) from error
    text = text_config(config)
    tied = bool(getattr(config, "tie_word_embeddings", False) or text.tie_word_embeddings)
    weight = found.get("embed" if tied and "head" not in found else "head")
    if weight is None or "norm" not in found:
        raise WrongKeys(
            f"{name} has no {'last norm' if weight is not None else 'unembedding'}: its checkpoint"
            " has no head, or uses names that are not Qwen's"
        )
    return _unembedding(weight, found["norm"], places.is_hybrid, text)


def _of_model(model: Model) -> Unembedding:
    places = places_of(model)
    if places.head is None:
        raise WrongModel(
            f"{describe(model)} ends with the last norm, but tokens need the unembedding: load the"
            " class for causal language models"
        )
    weight = getattr(_plain(part(model, places.head)), "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type == "meta":
        raise WrongModel(f"the unembedding of {describe(model)} is not in memory as a plain matrix")
    norm = _plain(part(model, places.norm)).weight
    assert isinstance(norm, Tensor)
    return _unembedding(weight, norm, places.is_hybrid, text_config(unwrap(model)))


def _unembedding(weight: Tensor, norm: Tensor, is_hybrid: bool, text: Any) -> Unembedding:
    scale = norm.detach().float().cpu()
    return Unembedding(
        weight.detach().cpu(), 1 + scale if is_hybrid else scale, float(text.rms_norm_eps)
    )


def _plain(module: nn.Module) -> nn.Module:
    while isinstance(inner := vars(module)["_modules"].get("_original_component"), nn.Module):
        module = inner
    return module


def _kind(key: str) -> str | None:
    kinds = {"norm": _NORM, "head": _HEAD, "embed": _EMBED}
    return next((kind for kind, pattern in kinds.items() if pattern.match(key)), None)
