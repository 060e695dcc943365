"""An SAE beside a hook point: what runs when a bridge has one attached.

The hook point itself stays where it is, so nothing has to be put back afterwards. Which SAE is
attached where, and under which names, is `bridge.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

__all__ = ["AttachedSAE"]


class AttachedSAE(_SAEWrapper):  # type: ignore[misc]
    """SAELens's wrapper (error term, inner hooks), computing in the SAE's dtype and device.

    Whatever the residual's dtype is, it gets it back: a float32 SAE serves a bfloat16 model.
    """

    def __init__(self, sae: Any, use_error_term: bool, special: Tensor | None) -> None:
        super().__init__(sae, use_error_term=use_error_term)
        self.special = special  # token ids that bypass the SAE, or None
        self.handles: list[RemovableHandle] = []

    def forward(self, original_output: Tensor) -> Tensor:
        """The residual `[..., d_in]` -> its reconstruction `[..., d_in]`."""
        weight = self.sae.W_dec
        replaced = super().forward(original_output.to(weight.device, weight.dtype))
        return replaced.to(original_output.device, original_output.dtype)

    def attach(self, at: HookPoint, embed: torch.nn.Module, input_at: HookPoint | None) -> None:
        """Run at a hook point, before the hooks there: they see what flows on.

        `input_at` is where a transcoder reads; None when it reads where it writes.
        """
        self.handles.append(at.register_forward_hook(self._replace, prepend=True))
        if input_at is not None:
            self.handles.append(input_at.register_forward_hook(self._keep_input))
        if self.special is not None:
            self.handles.append(embed.register_forward_pre_hook(self._find_special))

    def detach(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def inner_hooks(self) -> dict[str, HookPoint]:
        """`hook_sae_input`, `hook_sae_acts_post`, ... of this SAE."""
        return {name: hook for name, hook in self.named_modules() if isinstance(hook, HookPoint)}

    def _replace(self, module: Any, args: Any, output: Tensor) -> Tensor:
        replaced: Tensor = self(output)
        return replaced

    def _keep_input(self, module: Any, args: Any, output: Tensor) -> None:
        weight = self.sae.W_dec
        self.capture_input(output.to(weight.device, weight.dtype))

    def _find_special(self, module: Any, args: Any) -> None:
        ids = args[0]
        assert self.special is not None
        mask = torch.isin(ids, self.special.to(ids.device))
        self.set_token_mask(mask.to(self.sae.W_dec.device))
