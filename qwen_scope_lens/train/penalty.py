"""The SASFT loss, which penalises chosen features on text in other languages (Eq. 26).

This module has the arithmetic on residuals and the hooks that record them, without a trainer or
dataset. Only the encoder rows of the chosen features are kept, so the cost does not depend on the
width of the SAE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.architecture import check_layer, decoder_layers
from qwen_scope_lens.models.eager import eagerly
from qwen_scope_lens.saes.layer_sae import LayerSAE

__all__ = ["FeatureRows", "Penalty", "record_residuals", "require_graph"]


@dataclass(frozen=True)
class FeatureRows:
    """The encoder rows of m features of one layer: `pre = x @ weight.T + bias`, in float32."""

    weight: Tensor  # [m, d_model]
    bias: Tensor  # [m]

    @classmethod
    def of(cls, sae: LayerSAE, features: Sequence[int]) -> FeatureRows:
        weight = sae.encoder_row(list(features)).detach().float()
        bias = sae.b_enc[list(features)].detach().float()
        if sae.cfg.apply_b_dec_to_input:
            bias = bias - weight @ sae.b_dec.detach().float()
        return cls(weight, bias)

    def to(self, device: torch.device) -> FeatureRows:
        return FeatureRows(self.weight.to(device), self.bias.to(device))

    def pre_activations(self, x: Tensor) -> Tensor:
        """Pre-activations in float32, differentiable in x. `[.., d_model] -> [.., m]`"""
        return x.float() @ self.weight.T + self.bias


@dataclass(frozen=True)
class Penalty:
    """The encoder rows and thresholds of every penalised layer."""

    rows: Mapping[int, FeatureRows]  # layer -> m features
    # layer -> [n_languages, m]: the threshold of each feature on text of each language. It is +inf
    # for a feature of the same language, which costs nothing there.
    thresholds: Mapping[int, Tensor]

    def loss(self, residuals: Mapping[int, Tensor], languages: Tensor, counted: Tensor) -> Tensor:
        """Sum over layers of the mean of `ReLU(pre - threshold)` over counted tokens and features.

        `residuals[layer] [batch, position, d_model]`; `languages [batch, position]` indexes the
        thresholds; `counted` is a bool tensor of that shape. As in the published code the sum is
        divided by the number of terms plus one, so that an empty batch costs nothing.
        """
        total = torch.zeros((), device=languages.device)
        for layer, rows in self.rows.items():
            x = residuals[layer][counted]
            rows = rows.to(x.device)
            limit = self.thresholds[layer].to(x.device)[languages[counted].to(x.device)]
            excess = torch.relu(rows.pre_activations(x) - limit)
            terms = limit.isfinite().sum()
            total = total + (excess.sum() / (terms + 1)).to(total.device)
        return total


@contextmanager
def record_residuals(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Record the outputs of some decoder layers during one forward pass, with their graph.

    Recording ends with the `with` block, so a layer that gradient checkpointing runs again in the
    backward pass is not recorded twice.
    """
    found: dict[int, Tensor] = {}
    modules = decoder_layers(model)

    def hook(layer: int) -> Any:
        def read(module: Any, args: Any, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output

        return read

    handles = [
        modules[check_layer(model, layer)].register_forward_hook(hook(layer)) for layer in layers
    ]
    try:
        with eagerly():
            yield found
    finally:
        for handle in handles:
            handle.remove()


def require_graph(residuals: Mapping[int, Tensor]) -> None:
    """Refuse residuals without a gradient, with which the loss would train nothing."""
    cut = [layer for layer, x in residuals.items() if not x.requires_grad]
    if cut:
        raise WrongModel(
            f"the residuals of layers {cut} carry no gradient, so the loss would change nothing."
            " With gradient checkpointing pass gradient_checkpointing_kwargs="
            "{'use_reentrant': False}. With LoRA, adapt at least one layer at or before them"
        )
