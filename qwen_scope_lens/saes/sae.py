"""ScopeSAE: a SAELens TopKSAE whose weights may be views of the checkpoint file.

The arithmetic is SAELens's own; what this class adds is access to single features without touching
the rest of a two-gigabyte layer, and saving as plain `topk`, so that whatever it writes loads
anywhere without this package. Opening files is `checkpoint.py`, loading by name is `load.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from qwen_scope_lens.errors import LayerOutOfRange

__all__ = ["ARCHITECTURE", "ScopeSAE", "ScopeSAEConfig"]

ARCHITECTURE = "qwen_scope_topk"
"""The name under which `install()` registers ScopeSAE with SAELens. Never written to a file."""


@dataclass
class ScopeSAEConfig(TopKSAEConfig):
    """TopKSAEConfig that SAELens resolves to ScopeSAE, and that is written as plain `topk`."""

    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "architecture": TopKSAEConfig.architecture()}


class ScopeSAE(TopKSAE):
    """A Qwen-Scope layer. `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, as SAELens shapes them."""

    def direction(self, features: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """What a feature writes into the residual: its decoder row. `[..] -> [.., d_in]`"""
        return self.W_dec[self._checked(features)].contiguous()

    def encoder_row(self, features: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """What a feature reads from the residual. `[..] -> [.., d_in]`"""
        return self.W_enc.T[self._checked(features)].contiguous()

    @torch.no_grad()
    def decoder_norms(self, chunk: int = 4096) -> torch.Tensor:
        """The length of every feature's direction, in float32. `[d_sae]`"""
        return torch.cat([rows.float().norm(dim=-1) for rows in self.W_dec.split(chunk)])

    def _checked(self, features: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        index = torch.as_tensor(features, device=self.W_dec.device, dtype=torch.long)
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.cfg.d_sae):
            raise LayerOutOfRange(
                f"feature {features} is out of range: this SAE has 0..{self.cfg.d_sae - 1}"
            )
        return index

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Safetensors stores contiguous tensors only; mapped weights are transposed views."""
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()
