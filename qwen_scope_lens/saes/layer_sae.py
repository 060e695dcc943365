"""LayerSAE: the SAE of one layer by torch alone, with codes that are sparse from the first moment.

The verbs of this package make their SAEs of this class, because importing SAELens takes four times
as long as importing torch. `ScopeSAE` of `sae.py` inherits these methods and puts everything of a
SAELens SAE around them: the codes of both are the same, bit for bit. `exact/` computes the codes,
`checkpoint.py` opens files, and `load.py` loads an SAE by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import torch
from torch import nn

from qwen_scope_lens.errors import LayerOutOfRange, NotFinite, WrongShape
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.saes.exact.encoder import Encoder
from qwen_scope_lens.saes.exact.gather import gather_decode
from qwen_scope_lens.saes.exact.topk import encode_topk, require_finite
from qwen_scope_lens.saes.exact.transforms import hidden, shown, transformed, untracked
from qwen_scope_lens.saes.exact.weight_cache import Derived

if TYPE_CHECKING:
    from sae_lens.saes.topk_sae import TopKSAEConfig

__all__ = ["LayerConfig", "LayerSAE", "Metadata"]

_INPUT_BYTES = 16 * 2**20
"""How many bytes of x, as float32, are cast at a time."""

_MADE_FROM = {"encoder": ("W_enc", "b_enc"), "decoder rows": ("W_dec",)}


F = TypeVar("F", bound=Callable[..., Any])


def _uncompiled(method: F) -> F:
    """`torch.compiler.disable`, put off until torch's compiler is there: its import takes a whole
    second of a CPU. Before that, nothing can be compiled."""
    disabled: list[Callable[..., Any]] = []

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled and "torch._dynamo" in sys.modules:
            disabled.append(torch.compiler.disable(method))
        return (disabled[0] if disabled else method)(*args, **kwargs)

    # The compiler looks at this mark before it follows a call.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(F, call)


class Metadata(SimpleNamespace):
    """What is known about an SAE. As in SAELens, a fact that is not known is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@dataclass(frozen=True)
class LayerConfig:
    """The configuration of a LayerSAE, with SAELens's names."""

    d_in: int
    d_sae: int
    k: int
    dtype: str = "float32"
    device: str = "cpu"
    apply_b_dec_to_input: bool = False
    metadata: Metadata = field(default_factory=Metadata)

    normalize_activations: ClassVar[str] = "none"
    reshape_activations: ClassVar[str] = "none"
    rescale_acts_by_decoder_norm: ClassVar[bool] = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LayerConfig:
        """The configuration of a layer as `saes/load.py` builds it for SAELens."""
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        return cls(**{**known, "metadata": Metadata(**config["metadata"])})


class LayerSAE(nn.Module):
    """The SAE of one layer, with `W_enc [d_in, d_sae]` and `W_dec [d_sae, d_in]` as in SAELens.

    It encodes, decodes and gives access to single features. Hook points, dense activations, saving
    and everything else of SAELens are those of `ScopeSAE`, which `load_sae` makes. The weights are
    frozen when an SAE is made. Gradients reach the input.
    """

    cfg: LayerConfig | TopKSAEConfig
    dtype: torch.dtype
    device: torch.device
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, cfg: LayerConfig, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.cfg = cfg
        with torch.inference_mode(False):  # torch does not count the changes of inference tensors
            for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                setattr(self, name, nn.Parameter(weights[name], requires_grad=False))
        self._moved()
        self._freeze()

    @classmethod
    def of(cls, cfg: Any, weights: Mapping[str, torch.Tensor]) -> LayerSAE:
        """An SAE around existing tensors. No weight is initialised, and none is copied."""
        return cls(cfg, weights)

    def _freeze(self) -> None:
        """The last step of making an SAE."""
        self.derived = Derived()
        self._half_copy = False
        self.requires_grad_(False)

    def _moved(self) -> None:
        """Note where the weights are and their dtype, after `.to()`."""
        self.dtype, self.device = self.W_enc.dtype, self.W_enc.device
        dtype = str(self.dtype).removeprefix("torch.")
        self.cfg = replace(self.cfg, dtype=dtype, device=str(self.device))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in torch. Tensors derived from the weights are made anew afterwards, because a fused
        optimizer changes weights without leaving a trace."""
        self.derived.clear()
        super().requires_grad_(requires_grad)
        return self

    @_uncompiled
    def encode_sparse(self, x: torch.Tensor) -> SparseCodes:
        """The k largest values of `ReLU(pre)`. `[.., d_in] -> SparseCodes [.., k]` in float32

        The selection is exact: it compares the exact dot products of `x` (cast to the SAE's dtype,
        as in SAELens) with the stored weights, rounded once to float32, and of equal values the
        lower feature wins. The values are differentiable in `x` through the selected entries; the
        encoder counts as frozen. Of SAELens's hooks, where an SAE has them, only `hook_sae_input`
        fires, except when `hook_sae_acts_pre` is hooked: then the dense pre-activations are
        computed for it. Threads may share an SAE. `torch.compile` breaks its graph here.
        """
        weights_hidden = hidden(self.W_enc, self.b_enc, self.b_dec)
        if self._pre_watched or not self._plain_topk or weights_hidden:
            return SparseCodes.from_dense(self._dense_pre(x), self._k)
        if not untracked(x) or self._input_watched or not self._rowwise_input:
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
        values, indices = (
            part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)
        )
        full = (*shape, self._k)
        return SparseCodes(values.reshape(full), indices.reshape(full), self.cfg.d_sae)

    def prepare(self, half_copy: bool = False) -> Self:
        """Do what the first encode would do: read the encoder once, to compute error bounds.

        With `half_copy`, a bfloat16 copy of the encoder is kept as well (half the size of W_enc in
        float32). Then no call has to convert the encoder, which pays off for many calls of a few
        hundred tokens. The codes are the same, bit for bit. `prepare()` drops the copy again.
        """
        self._half_copy = half_copy
        self.derived.clear()
        self.exact_encoder()
        return self

    @_uncompiled
    def decode_sparse(self, codes: SparseCodes) -> torch.Tensor:
        """Reconstruct residuals, reading only the decoder rows of the codes' features.

        `SparseCodes [.., k] -> [.., d_in]`. `hook_sae_recons` fires, where an SAE has it. The
        result is differentiable in the values, and in `W_dec` and `b_dec` if they require a
        gradient. If the decoder is a transposed view of an official file, the first call makes a
        row-major copy of `W_dec`, which is kept.
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode and decode. `[.., d_in] -> [.., d_in]`

        Gradients reach the input, and the weights after `requires_grad_(True)`.
        """
        if self._trains("W_enc", "b_enc", "b_dec"):
            return self.decode_sparse(SparseCodes.from_dense(self._dense_pre(x), self._k))
        return self.decode_sparse(self.encode_sparse(x))

    def extra_repr(self) -> str:
        cfg = self.cfg
        return f"{cfg.metadata.qwen_scope_ref}: d_in={cfg.d_in}, d_sae={cfg.d_sae}, k={self._k}"

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
        return self.cfg.k

    @property
    def _plain_topk(self) -> bool:
        """Whether this SAE has the arithmetic of `exact/topk.py`."""
        return self.dtype in (torch.float32, torch.bfloat16, torch.float16)

    @property
    def _input_watched(self) -> bool:
        """Whether a hook sees or changes the input of an encode."""
        return False

    @property
    def _pre_watched(self) -> bool:
        """Whether a hook sees or changes the pre-activations of an encode."""
        return False

    @property
    def _encode_watched(self) -> bool:
        return self._input_watched or self._pre_watched

    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """The input as it is multiplied with the encoder, in the SAE's dtype."""
        sae_in = sae_in.to(self.dtype)
        return sae_in - self.b_dec if self.cfg.apply_b_dec_to_input else sae_in

    def _dense_pre(self, x: torch.Tensor) -> torch.Tensor:
        """All pre-activations. `[.., d_in] -> [.., d_sae]`"""
        return self._sae_in(x) @ self.W_enc + self.b_enc

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
        """Add `b_dec` to the product with W_dec, which nobody else holds."""
        in_place = untracked(decoded, self.b_dec) and decoded.dtype == self.b_dec.dtype
        return decoded.add_(self.b_dec) if in_place else decoded + self.b_dec

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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """The work of `.to()`. In inference mode, too, the weights stay ordinary tensors, whose
        changes torch counts."""
        inside = any(parameter.is_inference() for parameter in self.parameters())
        with torch.inference_mode(inside):
            super()._apply(fn, recurse)
        self._moved()
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
