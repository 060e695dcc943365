"""ScopeSAE: a SAELens TopKSAE whose weights may be views of the checkpoint file.

The arithmetic is SAELens's own. The sparse codes and the access to single features are those of
`layer_sae.py`. This class adds SAELens's hook points, dense activations, unusual configurations,
and saving as plain `topk`, so that what it saves can be loaded anywhere without this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.saes.sae import SAEConfig, SAEMetadata, _disable_hooks
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKSAEConfig
from sae_lens.util import filter_valid_dataclass_fields

from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.saes.exact.transforms import untracked
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.saes.locate import ARCHITECTURE

__all__ = ["ARCHITECTURE", "ScopeSAE", "ScopeSAEConfig"]

_GATHER_WORTH = 8
"""`decode` gathers decoder rows if at most one in this many dense activations is not zero."""


@dataclass
class ScopeSAEConfig(TopKSAEConfig):
    """A TopKSAEConfig for which SAELens makes a ScopeSAE. It is written as plain `topk`."""

    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "architecture": TopKSAEConfig.architecture()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> ScopeSAEConfig:
        """Read what `to_dict` wrote. There the architecture is `topk`."""
        fields = filter_valid_dataclass_fields(config_dict, cls)
        metadata = SAEMetadata.from_dict(config_dict.get("metadata", {}))
        return cls(**{**fields, "metadata": metadata})


class ScopeSAE(LayerSAE, TopKSAE):
    """The SAE of one layer, with `W_enc [d_in, d_sae]` and `W_dec [d_sae, d_in]` as in SAELens.

    This class is for inference, so the weights are frozen when the SAE is made or loaded. While
    they are, `encode`, `decode` and `forward` take the sparse path. After
    `sae.requires_grad_(True)` these three are SAELens's own again, gradients of the weights
    included. Gradients reach the input in both cases.
    """

    cfg: TopKSAEConfig

    if TYPE_CHECKING:  # SAELens has no types that a checker could read
        _use_error_term: bool

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> type[ScopeSAE]:
        """This class, also for `topk`: `ScopeSAE.load_from_disk` reads what `save_model` wrote."""
        if architecture in (ARCHITECTURE, TopKSAEConfig.architecture()):
            return cls
        return super().get_sae_class_for_architecture(architecture)

    @classmethod
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[SAEConfig]:
        return ScopeSAEConfig

    def __init__(self, cfg: TopKSAEConfig, use_error_term: bool = False) -> None:
        TopKSAE.__init__(self, cfg, use_error_term)
        self._freeze()

    @classmethod
    @torch.inference_mode(False)  # torch does not count the changes of inference tensors
    def of(cls, cfg: TopKSAEConfig, weights: Mapping[str, torch.Tensor]) -> ScopeSAE:
        """An SAE around existing tensors. No weight is initialised, and none is copied."""
        sae = cls(replace(cfg, device="meta"))
        sae.load_state_dict(weights, assign=True)
        return sae.to(device=torch.device(cfg.device))

    def _moved(self) -> None:
        """SAELens's `to` notes a dtype itself, but not `half()` and the like."""
        if self.dtype != self.W_enc.dtype:
            self.dtype = self.W_enc.dtype
            self.cfg.dtype = str(self.dtype)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """SAELens's dense `[.., d_sae]`, made from the codes of `encode_sparse`."""
        if not self._plain_topk or self._trains("W_enc", "b_enc", "b_dec"):
            return TopKSAE.encode(self, x)
        if _hooked(self.hook_sae_acts_pre):
            return TopKSAE.encode(self, x)
        return self.hook_sae_acts_post(self.encode_sparse(x).to_dense(self.dtype))

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """SAELens's decode of dense activations. `[.., d_sae] -> [.., d_in]`

        If few activations are not zero, their decoder rows are gathered instead of multiplying.
        If `feature_acts` or the decoder requires a gradient, this is SAELens's dense product, whose
        gradient is dense as well; `decode_sparse` is fast and differentiable. Activations of
        another dtype or width also go to SAELens's own method.
        """
        if (
            torch.compiler.is_compiling()
            or not untracked(feature_acts)
            or feature_acts.is_sparse
            or feature_acts.dtype != self.dtype
            or feature_acts.shape[-1:] != (self.cfg.d_sae,)
            or self.cfg.rescale_acts_by_decoder_norm
            or self._trains("W_dec", "b_dec")
        ):
            return TopKSAE.decode(self, feature_acts)
        flat = feature_acts.reshape(-1, self.cfg.d_sae)
        counts = flat.count_nonzero(dim=-1)
        if int(counts.sum()) * _GATHER_WORTH > flat.numel() or not flat.numel():
            return TopKSAE.decode(self, feature_acts)
        position, feature = flat.nonzero(as_tuple=True)
        out = torch.nn.functional.embedding_bag(
            feature,
            self.decoder_rows(),
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=flat[position, feature],
        )
        return self._finish(out.reshape(*feature_acts.shape[:-1], self.cfg.d_in))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """SAELens's forward, with a single encode in all cases. `[.., d_in] -> [.., d_in]`"""
        if (
            not self._plain_topk
            or _hooked(self.hook_sae_acts_pre)
            or self._trains("W_enc", "b_enc", "W_dec", "b_dec")
        ):
            return TopKSAE.forward(self, x)
        codes = self.encode_sparse(x)
        if _hooked(self.hook_sae_acts_post):
            out = self.decode(self.hook_sae_acts_post(codes.to_dense(self.dtype)))
        else:
            out = self.decode_sparse(codes)
        if self.use_error_term:
            with torch.no_grad():
                error = self.hook_sae_error(x - self._without_hooks(x, codes, out))
            out = out + error
        return self.hook_sae_output(out)

    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """SAELens's own, with its hook and its normalisation."""
        return TopKSAE.process_sae_in(self, sae_in)

    @property
    def _k(self) -> int:
        return int(self.activation_fn.k)

    @property
    def _plain_topk(self) -> bool:
        """As in LayerSAE. Anything else is left to SAELens."""
        return (
            isinstance(self.activation_fn, TopK)
            and not self.activation_fn.use_sparse_activations
            and not self.cfg.rescale_acts_by_decoder_norm
            and super()._plain_topk
        )

    @property
    def _input_watched(self) -> bool:
        return _hooked(self.hook_sae_input)

    @property
    def _pre_watched(self) -> bool:
        return _hooked(self.hook_sae_acts_pre)

    def _dense_pre(self, x: torch.Tensor) -> torch.Tensor:
        pre = self.hook_sae_acts_pre(super()._dense_pre(x))
        return pre * self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else pre

    def _finish(self, decoded: torch.Tensor) -> torch.Tensor:
        """The steps that SAELens does after the product with W_dec, which nobody else holds."""
        out = self.hook_sae_recons(super()._finish(decoded))
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    def _without_hooks(
        self, x: torch.Tensor, codes: SparseCodes, out: torch.Tensor
    ) -> torch.Tensor:
        """The reconstruction as it is without hooks, with as little recomputed as possible."""
        if not any(
            _hooked(hook)
            for hook in (self.hook_sae_input, self.hook_sae_acts_post, self.hook_sae_recons)
        ):
            return out.detach()
        # The scale that a normalising SAE stores on an encode serves for one decode only.
        again = _hooked(self.hook_sae_input) or self.cfg.normalize_activations != "none"
        with _disable_hooks(self):
            if again:
                codes = self.encode_sparse(x)
            return self.decode_sparse(codes.detach())

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Make the weights contiguous, as safetensors needs them; mapped ones are transposed."""
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()


def _hooked(hook: torch.nn.Module) -> bool:
    """Whether any hook is registered at this hook point, forward or backward."""
    return bool(
        hook._forward_hooks
        or hook._forward_pre_hooks
        or hook._backward_hooks
        or hook._backward_pre_hooks
    )
