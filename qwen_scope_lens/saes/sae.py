"""ScopeSAE: a SAELens TopKSAE whose weights may be views of the checkpoint file.

The arithmetic is SAELens's own. This class adds codes that are sparse from the first moment, access
to single features without touching the rest of a two-gigabyte layer, and saving as plain `topk`, so
that what it saves can be loaded anywhere without this package. `topk.py` computes the codes,
`checkpoint.py` opens files, and `load.py` loads an SAE by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAEConfig, SAEMetadata, _disable_hooks
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKSAEConfig
from sae_lens.util import filter_valid_dataclass_fields

from qwen_scope_lens.errors import LayerOutOfRange, NotFinite, WrongShape
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.saes.exact.encoder import Encoder
from qwen_scope_lens.saes.exact.gather import gather_decode
from qwen_scope_lens.saes.exact.topk import encode_topk, require_finite
from qwen_scope_lens.saes.exact.transforms import hidden, shown, transformed, untracked
from qwen_scope_lens.saes.exact.weight_cache import Derived
from qwen_scope_lens.saes.locate import ARCHITECTURE

__all__ = ["ARCHITECTURE", "ScopeSAE", "ScopeSAEConfig"]

_GATHER_WORTH = 8
"""`decode` gathers decoder rows if at most one in this many dense activations is not zero."""

_INPUT_BYTES = 16 * 2**20
"""How many bytes of x, as float32, are cast at a time."""

_MADE_FROM = {"encoder": ("W_enc", "b_enc"), "decoder rows": ("W_dec",)}


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


class ScopeSAE(TopKSAE):
    """The SAE of one layer, with `W_enc [d_in, d_sae]` and `W_dec [d_sae, d_in]` as in SAELens.

    This class is for inference, so the weights are frozen when the SAE is made or loaded. While
    they are, `encode`, `decode` and `forward` take the sparse path. After
    `sae.requires_grad_(True)` these three are SAELens's own again, gradients of the weights
    included. Gradients reach the input in both cases.
    """

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
        super().__init__(cfg, use_error_term)
        self.derived = Derived()
        self._half_copy = False
        self.requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> ScopeSAE:
        """As in torch. Tensors derived from the weights are made anew afterwards, because a fused
        optimizer changes weights without leaving a trace."""
        self.derived.clear()
        super().requires_grad_(requires_grad)
        return self

    @torch.compiler.disable
    def encode_sparse(self, x: torch.Tensor) -> SparseCodes:
        """The k largest values of `ReLU(pre)`. `[.., d_in] -> SparseCodes [.., k]` in float32

        The selection is exact: it compares the exact dot products of `x` (cast to the SAE's dtype,
        as in SAELens) with the stored weights, rounded once to float32, and of equal values the
        lower feature wins. The values are differentiable in `x` through the selected entries; the
        encoder counts as frozen. Of SAELens's hooks only `hook_sae_input` fires, except when
        `hook_sae_acts_pre` is hooked: then the dense pre-activations are computed for it. Threads
        may share an SAE. `torch.compile` breaks its graph here.
        """
        weights_hidden = hidden(self.W_enc, self.b_enc, self.b_dec)
        if _hooked(self.hook_sae_acts_pre) or not self._plain_topk or weights_hidden:
            sae_in = self._sae_in(x)
            pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
            if self.cfg.rescale_acts_by_decoder_norm:
                pre = pre * self.W_dec.norm(dim=-1)
            return SparseCodes.from_dense(pre, self._k)
        if not untracked(x) or _hooked(self.hook_sae_input) or not self._rowwise_input:
            sae_in = self._sae_in(x)
            shape, flat, size = sae_in.shape[:-1], sae_in.reshape(-1, self.cfg.d_in), 2**62
        else:
            # x is cast and shifted block by block, so that there is never a second copy of it.
            self._check_width(x)
            shape, flat = x.shape[:-1], x.reshape(-1, self.cfg.d_in)
            size = max(1, _INPUT_BYTES // (4 * self.cfg.d_in))
        if not transformed():  # under a transform, `encode_topk` checks
            require_finite(flat, shape)
        encoder = self.exact_encoder()
        parts = []
        for start in range(0, max(1, len(flat)), size):
            block = flat[start : start + size]
            block = block if size == 2**62 else self.process_sae_in(block)
            parts.append(encode_topk(block, encoder, self._k))
        values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        full = (*shape, self._k)
        return SparseCodes(values.reshape(full), indices.reshape(full), self.cfg.d_sae)

    def prepare(self, half_copy: bool = False) -> ScopeSAE:
        """Do what the first encode would do: read the encoder once, to compute error bounds.

        With `half_copy`, a bfloat16 copy of the encoder is kept as well (half the size of W_enc in
        float32). Then no call has to convert the encoder, which pays off for many calls of a few
        hundred tokens. The codes are the same, bit for bit. `prepare()` drops the copy again.
        """
        self._half_copy = half_copy
        self.derived.clear()
        self.exact_encoder()
        return self

    @torch.compiler.disable
    def decode_sparse(self, codes: SparseCodes) -> torch.Tensor:
        """Reconstruct residuals, reading only the decoder rows of the codes' features.

        `SparseCodes [.., k] -> [.., d_in]`. `hook_sae_recons` fires. The result is differentiable
        in the values, and in `W_dec` and `b_dec` if they require a gradient. If the decoder is a
        transposed view of an official file, the first call makes a row-major copy of `W_dec`,
        which is kept.
        """
        if codes.d_sae != self.cfg.d_sae:
            raise ValueError(f"codes of {codes.d_sae} features; this SAE has {self.cfg.d_sae}")
        values = codes.values
        if self.cfg.rescale_acts_by_decoder_norm:
            values = values / self.W_dec[codes.indices].norm(dim=-1)
        flat = codes.flatten()
        out = gather_decode(values.reshape(-1, codes.k), flat.indices, self.decoder_rows())
        return self._finish(out.reshape(*codes.shape, self.cfg.d_in))

    def pre_activations(
        self, x: torch.Tensor, features: int | Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """Pre-activations of chosen features, before ReLU and top-k. Only their rows are read.

        `[.., d_in]`, `[m] -> [.., m]`, or `[..]` for a single int. Differentiable in `x`.
        """
        index = self._checked(features)
        sae_in = self._sae_in(x)
        pre = sae_in @ self.W_enc.T[index.reshape(-1)].T + self.b_enc[index.reshape(-1)]
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * self.W_dec[index.reshape(-1)].norm(dim=-1)
        return pre.reshape(*sae_in.shape[:-1], *index.shape)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """SAELens's dense `[.., d_sae]`, made from the codes of `encode_sparse`."""
        if not self._plain_topk or self._trains("W_enc", "b_enc", "b_dec"):
            return super().encode(x)
        if _hooked(self.hook_sae_acts_pre):
            return super().encode(x)
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
            return super().decode(feature_acts)
        flat = feature_acts.reshape(-1, self.cfg.d_sae)
        counts = flat.count_nonzero(dim=-1)
        if int(counts.sum()) * _GATHER_WORTH > flat.numel() or not flat.numel():
            return super().decode(feature_acts)
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
            return super().forward(x)
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

    def direction(self, features: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The direction that a feature writes: its decoder row. `[..] -> [.., d_in]`"""
        return self.W_dec[self._checked(features)].clone()

    def encoder_row(self, features: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The direction along which a feature reads the residual. `[..] -> [.., d_in]`"""
        return self.W_enc.T[self._checked(features)].clone()

    @torch.no_grad()
    def decoder_norms(self, chunk: int = 4096) -> torch.Tensor:
        """The length of each feature's decoder row, in float32. `[d_sae]`"""
        return torch.cat([rows.float().norm(dim=-1) for rows in self.W_dec.split(chunk)])

    @property
    def _k(self) -> int:
        return int(self.activation_fn.k)

    @property
    def _plain_topk(self) -> bool:
        """Whether this SAE has the arithmetic of `topk.py`. Anything else is left to SAELens."""
        return (
            isinstance(self.activation_fn, TopK)
            and not self.activation_fn.use_sparse_activations
            and not self.cfg.rescale_acts_by_decoder_norm
            and self.dtype in (torch.float32, torch.bfloat16, torch.float16)
        )

    @property
    def _encode_watched(self) -> bool:
        """Whether a hook sees or changes the input or the pre-activations of an encode."""
        return _hooked(self.hook_sae_input) or _hooked(self.hook_sae_acts_pre)

    def _trains(self, *names: str) -> bool:
        """Whether autograd or functorch needs gradients of these parameters."""
        for kept, sources in _MADE_FROM.items():
            if any(getattr(self, name).requires_grad for name in sources):
                self.derived.drop(kept)
        wanted = [getattr(self, name) for name in names]
        return (torch.is_grad_enabled() and any(w.requires_grad for w in wanted)) or hidden(*wanted)

    def _sae_in(self, x: torch.Tensor) -> torch.Tensor:
        if self.cfg.reshape_activations == "none":
            self._check_width(x)
        return self.process_sae_in(x)

    def _check_width(self, x: torch.Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.cfg.d_in:
            raise WrongShape(
                f"x has shape {tuple(x.shape)}: this SAE reads residuals [.., {self.cfg.d_in}]"
            )

    def _finish(self, decoded: torch.Tensor) -> torch.Tensor:
        """The steps that SAELens does after the product with W_dec, which nobody else holds."""
        in_place = untracked(decoded, self.b_dec) and decoded.dtype == self.b_dec.dtype
        shifted = decoded.add_(self.b_dec) if in_place else decoded + self.b_dec
        out = self.hook_sae_recons(shifted)
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

    @property
    def _rowwise_input(self) -> bool:
        return self.cfg.normalize_activations == "none" and self.cfg.reshape_activations == "none"

    def exact_encoder(self) -> Encoder:
        """The encoder with its error bounds, made once and kept.

        Its rows `[d_sae, d_in]` are a view of an official file's W_enc, else a row-major copy.
        """
        return self.derived.get(
            "encoder",
            (self.W_enc, self.b_enc),
            self._new_encoder,
            every_feature=True,
        )

    @torch.no_grad()
    def _new_encoder(self) -> Encoder:
        rows = self.W_enc.detach().T.contiguous()
        with torch.autocast(rows.device.type, enabled=False):
            encoder = Encoder(rows, self.b_enc.detach(), self._half_copy)
        for name, sums in (("W_enc", encoder.snapshot.norms), ("b_enc", self.b_enc)):
            # The length of a row may overflow although all its numbers are finite.
            doubtful = (~sums.isfinite()).nonzero().squeeze(1)
            weights = rows[doubtful] if name == "W_enc" else sums.detach()[doubtful][:, None]
            bad = doubtful[~weights.isfinite().all(1)].tolist()
            if bad:
                listed = ", ".join(map(str, bad[:5])) + (", .." if len(bad) > 5 else "")
                raise NotFinite(
                    f"{name} has NaN or infinity in {len(bad)} of {self.cfg.d_sae} features:"
                    f" {listed}; expected finite weights. The file is damaged or the training"
                    " diverged: fetch it again, or go back to an earlier checkpoint"
                )
        return encoder

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ScopeSAE:
        """The work of `.to()`. In inference mode, too, the weights stay ordinary tensors, whose
        changes torch counts."""
        inside = any(parameter.is_inference() for parameter in self.parameters())
        with torch.inference_mode(inside):
            super()._apply(fn, recurse)
        return self

    def decoder_rows(self) -> torch.Tensor:
        if self.W_dec.is_contiguous():
            return self.W_dec
        if self._trains("W_dec"):
            return self.W_dec.contiguous()
        return self.derived.get("decoder rows", (self.W_dec,), self.W_dec.detach().contiguous)

    def _checked(self, features: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        given = torch.as_tensor(features, device=self.W_dec.device)
        index = shown(given)
        if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
            raise LayerOutOfRange(
                f"features are whole numbers, found {index.dtype}: turn a mask into numbers with"
                " mask.nonzero()"
            )
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.cfg.d_sae):
            raise LayerOutOfRange(
                f"feature {index.tolist()} is out of range: this SAE has 0..{self.cfg.d_sae - 1}"
            )
        return given.long()

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
