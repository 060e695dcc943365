"""Measure whether an SAE belongs to given activations, and refuse it when it does not.

The usual mistakes (a wrong layer, a wrong model, `b_dec` subtracted before encoding, a decode
without `b_dec`) give plausible numbers, not errors. So the SAE is run under its own convention and
under the wrong ones, on the same tokens, and the reconstruction errors decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias, TypedDict, Unpack

import torch

from qwen_scope_lens.errors import NotFinite, UnsupportedSAE, VerificationFailed, WrongShape
from qwen_scope_lens.saes.layer_sae import LayerSAE

if TYPE_CHECKING:
    from sae_lens.saes.topk_sae import TopKSAE

    TopK: TypeAlias = LayerSAE | TopKSAE

__all__ = ["CONVENTIONS", "Convention", "Verification", "measure", "unexplained", "verify"]

MAX_FVU = 0.8
"""The largest accepted FVU. The threshold is ours, not the paper's. Official layers were measured
between 0.20 and 0.69 (see docs/verify.md); an SAE of another layer or model is usually above 1."""

MARGIN = 0.01
"""A wrong convention counts as better when its FVU is lower by this share of the SAE's own FVU."""

MAX_NORM_RATIO = 10.0
"""Tokens whose norm is more than this many times the median norm are left out. A handful of such
tokens holds nearly all the variance, and the published SAEs were trained without them (the
threshold of that training is not published)."""

MIN_TOKENS = 16
"""The variance around the mean of fewer tokens is too uncertain to judge by."""

DENSE_RATE = 0.1
"""A feature that fires on more than this share of the tokens counts as dense."""


@dataclass(frozen=True)
class Convention:
    """One way to run the weights of an SAE."""

    name: str
    subtract_b_dec: bool = False  # before encoding
    add_b_dec: bool = True  # after decoding
    relu: bool = True
    topk: bool = True


CONVENTIONS = (
    Convention("as documented"),
    Convention("b_dec subtracted before encoding", subtract_b_dec=True),
    Convention("b_dec left out of the decode", add_b_dec=False),
    Convention("top-k without ReLU", relu=False),
    Convention("ReLU without top-k", topk=False),
)


@dataclass(frozen=True)
class Verification:
    """The result of a measurement. `str()` of it is the report."""

    name: str
    tokens: int
    excluded: int  # extreme-norm tokens and first positions that were left out
    convention: str  # the convention under which the SAE is in use
    fvu: dict[str, float]  # fraction of variance unexplained, by convention
    l0: float  # mean number of active features per token
    dead: int  # features that never fired on these tokens
    dense: int  # features that fired on more than a tenth of them
    d_sae: int
    negative_share: float  # the share of the k largest pre-activations that is below zero
    max_fvu: float
    problems: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.tokens:,} tokens"
            + f" ({self.excluded:,} more, extreme or first, left out)" * bool(self.excluded),
            *(
                f"  FVU {value:9.4f}  {name}" + "   <- in use" * (name == self.convention)
                for name, value in self.fvu.items()
            ),
            f"  L0 {self.l0:.1f}   never fired {self.dead:,} of {self.d_sae:,}"
            f"   dense (> {DENSE_RATE:.0%} of tokens) {self.dense:,}"
            f"   negative among the top k {self.negative_share:.2%}",
            f"  threshold: FVU at most {self.max_fvu:g}",
        ]
        lines += [f"  PROBLEM: {problem}" for problem in self.problems] or ["  OK"]
        return "\n".join(lines)


class Options(TypedDict, total=False):
    """The options of `verify` and `measure`."""

    mask: torch.Tensor | None
    include_first: bool
    max_fvu: float
    max_norm_ratio: float


def verify(sae: TopK, activations: torch.Tensor, **options: Unpack[Options]) -> Verification:
    """Measure, and raise `VerificationFailed` with the whole report when there is a problem.

    Args:
        sae: a SAELens TopK SAE without normalisation or decoder-norm rescaling.
        activations: residuals at the SAE's hook, `[tokens, d_model]` or
            `[batch, position, d_model]`.
        mask: which tokens count, in the shape of the activations without their last axis.
        include_first: keep position 0 of each row of a batch (an attention sink in Qwen models).
        max_fvu: the largest accepted fraction of variance unexplained.
        max_norm_ratio: leave out tokens with more than this many times the median norm.
    """
    report = measure(sae, activations, **options)
    if not report.ok:
        raise VerificationFailed(str(report))
    return report


@torch.no_grad()
def measure(
    sae: TopK,
    activations: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    include_first: bool = False,
    max_fvu: float = MAX_FVU,
    max_norm_ratio: float = MAX_NORM_RATIO,
) -> Verification:
    """As `verify`, without raising. The problems found are in the result's `problems`."""
    _check_arithmetic(sae)
    if not max_fvu > 0 or not max_norm_ratio > 0:
        raise ValueError(f"max_fvu {max_fvu} and max_norm_ratio {max_norm_ratio} must be positive")
    kept, excluded = _select_tokens(sae, activations, mask, include_first, max_norm_ratio)
    own = _own_convention(sae)
    others = [c for c in CONVENTIONS if not _same(c, own)]
    sums, variance = _sums_of(sae, kept, (own, *others))
    fvu = {name: s.squared_error / variance for name, s in sums.items()}
    s = sums[own.name]
    tokens = len(kept)
    problems = _problems(own, fvu, max_fvu)
    return Verification(
        name=str(sae.cfg.metadata.qwen_scope_ref or sae.cfg.metadata.hook_name or "SAE"),
        tokens=tokens,
        excluded=excluded,
        convention=own.name,
        fvu=fvu,
        l0=float(s.fired.sum()) / tokens,
        dead=int((s.fired == 0).sum()),
        dense=int((s.fired > DENSE_RATE * tokens).sum()),
        d_sae=sae.cfg.d_sae,
        negative_share=s.negative / (tokens * sae.cfg.k),
        max_fvu=max_fvu,
        problems=tuple(problems),
    )


@torch.no_grad()
def unexplained(
    sae: TopK,
    activations: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    max_norm_ratio: float = MAX_NORM_RATIO,
) -> float:
    """The FVU under the SAE's own convention alone; arguments as in `verify`."""
    _check_arithmetic(sae)
    kept, _ = _select_tokens(sae, activations, mask, False, max_norm_ratio)
    own = _own_convention(sae)
    sums, variance = _sums_of(sae, kept, (own,))
    return sums[own.name].squared_error / variance


def _sums_of(
    sae: TopK, kept: torch.Tensor, conventions: Sequence[Convention]
) -> tuple[dict[str, _Sums], float]:
    """The sums of each convention; the squared distances of `kept [n, d_model]` from its mean."""
    sums = {convention.name: _Sums(sae.cfg.d_sae) for convention in conventions}
    mean = kept.double().mean(dim=0)
    variance = 0.0
    weights = _Weights(sae)
    for chunk in kept.split(max(1, 2**24 // sae.cfg.d_sae)):  # 64 MB of dense pre-activations
        x = chunk.to(device=sae.W_enc.device, dtype=torch.float32)
        variance += float(((x.double() - mean.to(x.device)) ** 2).sum())
        trial = _Trial(weights, x)
        for convention in conventions:
            trial.add_to(sums[convention.name], convention)
    if variance == 0.0:
        raise NotFinite("all activations are equal: the FVU needs tokens that differ")
    return sums, variance


class _Sums:
    """Sums over tokens for one convention."""

    def __init__(self, d_sae: int) -> None:
        self.squared_error = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.long)
        self.negative = 0


class _Weights:
    """The weights of the SAE in float32, converted once for all chunks."""

    def __init__(self, sae: TopK) -> None:
        self.k = sae.cfg.k
        self.W_enc, self.rows = sae.W_enc.float(), sae.W_dec.float().contiguous()
        self.b_enc, self.b_dec = sae.b_enc.float(), sae.b_dec.float()
        self.shift = self.b_dec @ self.W_enc  # the effect of subtracting b_dec on pre-activations


class _Trial:
    """All conventions on one chunk `x [tokens, d_model]`. Shared steps are done once."""

    def __init__(self, weights: _Weights, x: torch.Tensor) -> None:
        self.w, self.x = weights, x
        self._pre = x @ weights.W_enc + weights.b_enc
        self._runs: dict[tuple[bool, bool, bool], _Run] = {}

    def add_to(self, sums: _Sums, how: Convention) -> None:
        key = (how.subtract_b_dec, how.relu, how.topk)
        if key not in self._runs:
            self._runs[key] = self._run(*key)
        run = self._runs[key]
        error = run.decoded + self.w.b_dec - self.x if how.add_b_dec else run.decoded - self.x
        sums.squared_error += float((error.double() ** 2).sum())
        sums.fired += run.fired
        sums.negative += run.negative

    def _run(self, subtract: bool, relu: bool, topk: bool) -> _Run:
        pre = self._pre - self.w.shift if subtract else self._pre
        if not topk:
            z = pre.relu()
            return _Run(z @ self.w.rows, (z > 0).sum(dim=0).cpu(), 0)
        values, index = pre.topk(self.w.k, dim=-1)
        fired = torch.bincount(index[values > 0].cpu(), minlength=pre.shape[-1])
        chosen = values.relu() if relu else values
        decoded = torch.nn.functional.embedding_bag(
            index, self.w.rows, mode="sum", per_sample_weights=chosen
        )
        return _Run(decoded, fired, int((values < 0).sum()))


@dataclass(frozen=True)
class _Run:
    """One encode and decode of a chunk."""

    decoded: torch.Tensor  # without b_dec
    fired: torch.Tensor  # [d_sae], how often each feature fired
    negative: int  # how many values below zero are among the k largest


def _check_arithmetic(sae: TopK) -> None:
    """Refuse an SAE that is not a plain TopK SAE: the conventions would misjudge it."""
    if not _is_topk(sae):
        raise UnsupportedSAE(f"a {type(sae).__name__} cannot be verified: expected a TopK SAE")
    for name, plain in (
        ("normalize_activations", "none"),
        ("reshape_activations", "none"),
        ("rescale_acts_by_decoder_norm", False),
    ):
        if getattr(sae.cfg, name) != plain:
            raise UnsupportedSAE(
                f"the SAE has {name} = {getattr(sae.cfg, name)!r}: fold it into the weights first"
            )


def _is_topk(sae: object) -> bool:
    """Whether this is a TopK SAE, of this package or of SAELens, which is imported only for the
    second question."""
    if isinstance(sae, LayerSAE):
        return True
    from sae_lens.saes.topk_sae import TopKSAE

    return isinstance(sae, TopKSAE)


def _own_convention(sae: TopK) -> Convention:
    documented = CONVENTIONS[0]
    if sae.cfg.apply_b_dec_to_input:
        return Convention("b_dec subtracted, as this SAE's cfg says", subtract_b_dec=True)
    return documented


def _same(a: Convention, b: Convention) -> bool:
    return replace(a, name=b.name) == b


def _problems(own: Convention, fvu: dict[str, float], max_fvu: float) -> list[str]:
    problems = []
    mine = fvu[own.name]
    if not math.isfinite(mine) or mine > max_fvu:
        problems.append(
            f"FVU {mine:.4f} is above {max_fvu:g}: is this the right model, the right layer"
            " (counted from 0) and the output of the decoder layer?"
        )
    best = min(fvu, key=lambda name: fvu[name])
    if best != own.name and fvu[best] < mine * (1 - MARGIN):
        problems.append(
            f"'{best}' fits better ({fvu[best]:.4f}) than '{own.name}' ({mine:.4f}): the SAE is run"
            " under the wrong convention (see apply_b_dec_to_input), or these are the residuals of"
            " another layer or model"
        )
    return problems


def _select_tokens(
    sae: TopK,
    activations: torch.Tensor,
    mask: torch.Tensor | None,
    include_first: bool,
    max_norm_ratio: float,
) -> tuple[torch.Tensor, int]:
    """The tokens that count, `[tokens, d_model]`, and how many others the mask would allow."""
    if not isinstance(activations, torch.Tensor) or activations.is_complex():
        raise WrongShape(f"activations are {type(activations).__name__}: expected a real tensor")
    if activations.ndim not in (2, 3) or activations.shape[-1] != sae.cfg.d_in:
        raise WrongShape(
            f"activations have shape {tuple(activations.shape)}: expected [tokens, {sae.cfg.d_in}]"
            f" or [batch, position, {sae.cfg.d_in}]"
        )
    keep = torch.ones(activations.shape[:-1], dtype=torch.bool, device=activations.device)
    if mask is not None:
        if mask.shape != keep.shape:
            raise WrongShape(f"mask has shape {tuple(mask.shape)}: expected {tuple(keep.shape)}")
        keep &= mask.to(keep.device, torch.bool)
    offered = int(keep.sum())
    if activations.ndim == 3 and not include_first:
        keep[:, 0] = False
    flat = activations[keep]
    if not torch.isfinite(flat).all():
        bad = (~torch.isfinite(flat)).any(dim=-1)
        raise NotFinite(f"{int(bad.sum())} of {len(flat)} activation vectors hold NaN or infinity")
    norms = flat.float().norm(dim=-1)
    flat = flat[norms <= max_norm_ratio * norms.median()] if len(flat) else flat
    if len(flat) < MIN_TOKENS:
        raise WrongShape(f"only {len(flat)} usable tokens: verification needs {MIN_TOKENS}")
    return flat, offered - len(flat)
