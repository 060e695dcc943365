"""Encode and decode against SAELens, in one run: time, ratio, GEMM floor, peak extra memory.

`python benchmarks/encode.py [--quick]`. One thread, medians of interleaved CPU times (what takes
less than 50 ms is looped), synthetic weights in the official layout. SAELens is `TopKSAE` in
float32 with the same weights.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _measure import cpu_name, interleaved, peak_extra, peak_in_fresh_process
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from qwen_scope_lens.saes import ScopeSAE, ScopeSAEConfig
from qwen_scope_lens.saes.exact.topk import encode_topk, first_pass

SHAPES = [
    (2048, 32768, 50, 128),
    (2048, 32768, 100, 256),
    (4096, 65536, 50, 256),
    (2048, 131072, 100, 128),
]
QUICK = [(512, 8192, 50, 128)]


def weights(d_in: int, d_sae: int) -> dict[str, torch.Tensor]:
    """Unit encoder rows with some spread, as views of the official layout."""
    torch.manual_seed(0)
    rows = torch.randn(d_sae, d_in) / d_in**0.5
    rows *= 0.75 + 0.5 * torch.rand(d_sae, 1)
    columns = torch.randn(d_in, d_sae) / d_in**0.5
    bias = 0.1 * torch.randn(d_sae)
    return {"W_enc": rows.T, "W_dec": columns.T, "b_enc": bias, "b_dec": torch.zeros(d_in)}


def residuals(d_in: int, tokens: int, kind: str) -> torch.Tensor:
    """`isotropic`, or `realistic`: a large mean and eight outlier dimensions, a few sinks."""
    torch.manual_seed(1)
    x = torch.randn(tokens, d_in)
    if kind == "realistic":
        outliers = torch.randperm(d_in)[:8]
        x = x + 3 * torch.randn(d_in)
        x[:, outliers] += 30 * torch.randn(8) + 15 * torch.randn(tokens, 8)
        x[:: max(1, tokens // 3)] *= 50
    return x


def build(kind: type[TopKSAE], state: dict[str, torch.Tensor], k: int) -> TopKSAE:
    d_in, d_sae = state["W_enc"].shape
    config = (ScopeSAEConfig if kind is ScopeSAE else TopKSAEConfig)(
        d_in=d_in, d_sae=d_sae, k=k, apply_b_dec_to_input=False, device="meta"
    )
    sae = kind(config)
    sae.load_state_dict(state, assign=True)
    sae.cfg.device, sae.device = "cpu", torch.device("cpu")
    return sae.requires_grad_(False)


def no_grad(function: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(function)


def measure(shape: tuple[int, int, int, int], script: str) -> None:
    d_in, d_sae, k, tokens = shape
    state = weights(d_in, d_sae)
    theirs, ours = build(TopKSAE, state, k), build(ScopeSAE, state, k)
    kept = build(ScopeSAE, state, k).prepare(half_copy=True)
    # SAELens decodes with a contiguous decoder, as its own loader leaves it.
    theirs.W_dec = torch.nn.Parameter(state["W_dec"].contiguous(), requires_grad=False)
    x, one = residuals(d_in, tokens, "isotropic"), residuals(d_in, 1, "isotropic")
    encoder = ours.exact_encoder()
    codes, dense = ours.encode_sparse(x), theirs.encode(x)
    one_codes, one_dense = ours.encode_sparse(one), theirs.encode(one)
    chosen = torch.arange(10) * (d_sae // 10)
    wants = x.clone().requires_grad_()

    def ours_backward() -> None:
        values = codes.values.clone().requires_grad_()
        ours.decode_sparse(type(codes)(values, codes.indices, d_sae)).square().sum().backward()

    rows = ours.decoder_rows()

    def plain_backward() -> None:
        values = codes.values.clone().requires_grad_()
        bag = torch.nn.functional.embedding_bag(
            codes.indices, rows, mode="sum", per_sample_weights=values
        )
        bag.square().sum().backward()

    def theirs_backward() -> None:
        theirs.decode(dense.clone().requires_grad_()).square().sum().backward()

    def preacts_backward() -> None:
        wants.grad = None
        ours.pre_activations(wants, chosen).sum().backward()

    half_rows = state["W_enc"].T.bfloat16()
    half_x = x.bfloat16()
    cases: dict[str, Callable[[], object]] = {
        "GEMM float32, bare": lambda: x @ state["W_enc"],
        "GEMM bfloat16, bare": lambda: half_x @ half_rows.T,
        "encode SAELens": no_grad(lambda: theirs.encode(x)),
        "encode certified": lambda: encode_topk(x, encoder, k, torch.bfloat16),
        "encode certified, half copy": lambda: encode_topk(
            x, kept.exact_encoder(), k, torch.bfloat16
        ),
        "encode float32 only": lambda: encode_topk(x, encoder, k, torch.float32),
        "decode SAELens": no_grad(lambda: theirs.decode(dense)),
        "decode": no_grad(lambda: ours.decode_sparse(codes)),
        "decode fwd+bwd SAELens": theirs_backward,
        "decode fwd+bwd": ours_backward,
        "decode fwd+bwd, embedding_bag alone": plain_backward,
        "10 pre-activations fwd+bwd": preacts_backward,
        "one token: encode SAELens": no_grad(lambda: theirs.encode(one)),
        "one token: encode": lambda: ours.encode_sparse(one),
        "one token: encode, half copy": lambda: kept.encode_sparse(one),
        "one token: decode SAELens": no_grad(lambda: theirs.decode(one_dense)),
        "one token: decode": no_grad(lambda: ours.decode_sparse(one_codes)),
    }
    took = interleaved(cases, at_least=0.05)
    took["encode+decode SAELens"] = took["encode SAELens"] + took["decode SAELens"]
    took["encode+decode certified, half copy"] = (
        took["encode certified, half copy"] + took["decode"]
    )
    took["encode+decode certified"] = took["encode certified"] + took["decode"]
    against = {
        "decode": "decode SAELens",
        "decode fwd+bwd": "decode fwd+bwd SAELens",
        "decode fwd+bwd, embedding_bag alone": "decode fwd+bwd SAELens",
        "encode+decode certified": "encode+decode SAELens",
        "encode+decode certified, half copy": "encode+decode SAELens",
        "one token: encode": "one token: encode SAELens",
        "one token: encode, half copy": "one token: encode SAELens",
        "one token: decode": "one token: decode SAELens",
    }
    peaks = {
        name: peak_in_fresh_process(script, name, *map(str, shape))
        for name in ("encode SAELens", "encode certified", "encode float32 only", "decode")
    }
    print(f"\nd_model {d_in}, d_sae {d_sae}, k {k}, {tokens} tokens")
    print(f"{'':36}{'ms':>10}{'x SAELens':>11}{'of GEMM':>9}{'peak MiB':>10}")
    for name, seconds in took.items():
        base = against.get(name, "encode SAELens")
        one_token = name.startswith("one token")
        ratio = "" if "SAELens" in name or "GEMM" in name else f"{took[base] / seconds:.2f}"
        floor = "" if one_token else f"{seconds / took['GEMM float32, bare']:.2f}"
        peak = f"{peaks[name] / 2**20:.0f}" if name in peaks else ""
        print(f"{name:36}{seconds * 1e3:10.2f}{ratio:>11}{floor:>9}{peak:>10}")
    certificates(kept, state, shape)
    halved(ours, state, x, k)


def certificates(kept: ScopeSAE, state: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
    """What share of tokens the first pass settles, and what realistic residuals cost."""
    d_in, _, _, tokens = shape
    for kind in ("isotropic", "realistic"):
        x = residuals(d_in, tokens, kind)
        bias = state["b_enc"]
        if kind == "realistic":  # a trained bias takes the mean away again
            bias = bias - x.median(0).values @ state["W_enc"]
        kept.b_enc = torch.nn.Parameter(bias, requires_grad=False)
        encoder = kept.prepare(half_copy=True).exact_encoder()
        case = partial(encode_topk, x, encoder, kept.cfg.k, torch.bfloat16)
        case()
        encoder.settled.clear()
        took = interleaved({kind: case}, 3)[kind]
        share = encoder.settled["bfloat16"] / max(1, encoder.settled.total())
        print(
            f"{kind} residuals: {share:.1%} settled by the bfloat16 pass with "
            f"{encoder.crowding:.1f} k candidates, {took * 1e3:.2f} ms"
        )


def minis() -> None:
    """The same on trained SAEs and the residuals of their own models: the embedded minis."""
    import qwen_scope_lens as qsl
    from qwen_scope_lens.mini import MODELS, SAES, heldout

    texts = [record["text"] for record in heldout("prose")][:80]
    for name in MODELS:
        model, group = qsl.load_model(name), qsl.find_group(SAES[name])
        read = qsl.capture(model, texts, group.layers, truncate=True)
        for layer in group.layers:
            sae, x = qsl.load_sae(f"{group.short}/{layer}"), read.residuals[layer]
            encoder = sae.prepare().exact_encoder()
            encode_topk(x, encoder, group.k, torch.bfloat16)  # finds its centre
            encoder.settled.clear()
            encode_topk(x, encoder, group.k, torch.bfloat16)
            share = encoder.settled["bfloat16"] / max(1, encoder.settled.total())
            rounded = sae.to(torch.bfloat16).encode_sparse(x)
            full = qsl.load_sae(f"{group.short}/{layer}").encode_sparse(x)
            everything = torch.arange(group.d_sae)
            same = (full.to_dense() > 0) & (rounded.to_dense() > 0)
            print(
                f"{group.short}/{layer}: {len(x)} tokens, {share:.1%} settled by the bfloat16 pass"
                f" with {encoder.crowding:.1f} k candidates; bfloat16 weights keep"
                f" {same.sum() / full.active.sum():.1%} of the selected features;"
                f" {(sae.pre_activations(x, everything) > 0).float().mean():.1%} of all scores are"
                " positive"
            )


def halved(ours: ScopeSAE, state: dict[str, torch.Tensor], x: torch.Tensor, k: int) -> None:
    """What bfloat16 weights cost: overlap of the selected features, FVU between reconstructions."""
    half = build(ScopeSAE, {n: w.bfloat16() for n, w in state.items()}, k)
    half.cfg.dtype, half.dtype = "bfloat16", torch.bfloat16
    full, rounded = ours.encode_sparse(x), half.encode_sparse(x)
    same = [
        len(set(a) & set(b)) / k
        for a, b in zip(full.indices.tolist(), rounded.indices.tolist(), strict=True)
    ]
    a, b = ours.decode_sparse(full), half.decode_sparse(rounded).float()
    fvu = float((a - b).square().sum() / (a - a.mean(0)).square().sum())
    share = sum(same) / len(same)
    print(f"bfloat16 weights: {share:.1%} of the selected features are the same, FVU {fvu:.1e}")


def large() -> None:
    """16k tokens at 81,920 features, in a fresh process: what the memory budget promises."""
    script = str(Path(__file__))
    for name in ("encode certified", "encode float32 only"):
        peak = peak_in_fresh_process(script, name, "512", "81920", "100", "16384")
        print(f"{name}, 16384 tokens at 81920 features: {peak / 2**20:.0f} MiB extra")


def peak(name: str, d_in: int, d_sae: int, k: int, tokens: int) -> int:
    """The median of three: one in some is off by the size of a weight."""
    state = weights(d_in, d_sae)
    sae = build(TopKSAE if "SAELens" in name else ScopeSAE, state, k)
    x = residuals(d_in, tokens, "isotropic")
    with torch.no_grad():
        case: Callable[[], object] = partial(sae.encode, x)
        if name == "decode":
            codes = sae.encode_sparse(x)
            sae.decode_sparse(codes[:1])  # makes the row-major decoder, the size of W_dec
            case = partial(sae.decode_sparse, codes)
        elif name != "encode SAELens":
            precision = torch.bfloat16 if name == "encode certified" else torch.float32
            case = partial(encode_topk, x, sae.exact_encoder(), k, precision)
        gc.collect()
        return sorted(peak_extra(case) for _ in range(3))[1]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak"]:
        print(peak(sys.argv[2], *map(int, sys.argv[3:7])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--minis", action="store_true", help="only the minis' own residuals")
    arguments = parser.parse_args()
    quick = arguments.quick
    if arguments.minis:
        minis()
        return
    print(f"{cpu_name()}, one thread, torch {torch.__version__}")
    for keeps_half in (False, True):
        counts = [n for n in range(1, 257) if first_pass(n, "cpu", keeps_half) == torch.bfloat16]
        print(
            f"bfloat16 first pass chosen from {min(counts, default='no number of')} tokens"
            f"{', half copy' if keeps_half else ''}"
        )
    for shape in QUICK if quick else SHAPES:
        measure(shape, str(Path(__file__)))
        gc.collect()
    if not quick:
        large()
        minis()


if __name__ == "__main__":
    main()
