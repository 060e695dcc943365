"""The exact encoder, decode and capture on a real model's residuals, sinks included.

    python benchmarks/real.py --work WORK --model MODEL --release WORK/release/SAE-Res-...

WORK and the release are what `tools/real` made: captured residuals and SAEs trained on them. For
each released layer: what share of positions the bfloat16 pass settles, apart for those that count
in training and for those that do not (first tokens, extreme norms); the selection against a plain
float64 product; encode and decode against SAELens. Then `capture` against a plain HF forward that
stops at the same layer. CPU times of the process on one thread, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import gc
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
from _measure import Printed, cpu_name, interleaved
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from qwen_scope_lens.models import capture, decoder_layers, load_model, unwrap
from qwen_scope_lens.saes import ScopeSAE
from qwen_scope_lens.saes.exact.encoder import Encoder
from qwen_scope_lens.saes.exact.topk import encode_topk
from tools.real import release, texts
from tools.real.shards import Layer, Source

BLOCK = 512


def positions(residuals: Path, layer: int, count: int, dropped: bool) -> torch.Tensor:
    """Held-out ones first, then training ones. `[<= count, d_model]` float32"""
    parts: list[torch.Tensor] = []
    for split in texts.SPLITS[::-1]:
        data = Layer(residuals, split, layer, dropped=dropped)
        wanted = min(len(data), count - sum(map(len, parts)))
        parts.append(data.take(np.arange(wanted)))
    return torch.cat(parts)


def settled(sae: ScopeSAE, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How many positions the bfloat16 pass settles, and the selection `[n, k]`."""
    encoder = Encoder(sae.W_enc.T, sae.b_enc, keep_half=True)
    found = [encode_topk(block, encoder, sae.cfg.k, torch.bfloat16) for block in x.split(BLOCK)]
    chosen = torch.cat([indices for _, indices in found]).long()
    values = torch.cat([values for values, _ in found])
    return encoder.settled["bfloat16"], chosen.masked_fill(values <= 0, -1)


def wrong(sae: ScopeSAE, x: torch.Tensor, chosen: torch.Tensor) -> int:
    """Positions whose selection is not that of a float64 product, equal float32 scores aside."""
    weights, bias, k = sae.W_enc.double(), sae.b_enc.double(), sae.cfg.k
    count = 0
    for block, mine in zip(x.split(BLOCK), chosen.split(BLOCK), strict=True):
        scores = torch.relu(block.double() @ weights + bias)
        best = scores.topk(k, dim=-1)
        for row in range(len(block)):
            theirs = {int(n) for n, v in zip(best.indices[row], best.values[row], strict=True) if v}
            ours = {int(n) for n in mine[row] if n >= 0}
            if theirs != ours:
                last = best.values[row, -1].float()
                others = [scores[row, n].float() for n in theirs ^ ours]
                count += any(score != last for score in others)
    return count


def stock(sae: ScopeSAE) -> TopKSAE:
    """SAELens's class with the same weights, its decoder contiguous as its loader leaves it."""
    plain = TopKSAE(
        TopKSAEConfig(
            d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, k=sae.cfg.k, apply_b_dec_to_input=False
        )
    )
    plain.load_state_dict({name: value.contiguous() for name, value in sae.state_dict().items()})
    return plain.requires_grad_(False)


@torch.no_grad()
def bench_layer(say: Printed, sae: ScopeSAE, residuals: Path, layer: int, count: int) -> None:
    usual = positions(residuals, layer, count, dropped=False)
    odd = positions(residuals, layer, count, dropped=True)
    row = []
    for x in (usual, odd):
        done, chosen = settled(sae, x)
        row.append(f"{done} of {len(x)} ({done / len(x):.2%})")
        row.append(str(wrong(sae, x, chosen)))
    x = usual[:BLOCK]
    theirs = stock(sae)
    kept = Encoder(sae.W_enc.T, sae.b_enc, keep_half=True)
    codes, dense = sae.encode_sparse(x), theirs.encode(x)
    took = interleaved(
        {
            "encode SAELens": lambda: theirs.encode(x),
            "encode": lambda: sae.encode_sparse(x),
            "encode, half copy": lambda: encode_topk(x, kept, sae.cfg.k, torch.bfloat16),
            "decode SAELens": lambda: theirs.decode(dense),
            "decode": lambda: sae.decode_sparse(codes),
        },
        at_least=0.05,
    )
    ratios = [
        took[f"{name.split(',')[0]} SAELens"] / took[name]
        for name in ("encode", "encode, half copy", "decode")
    ]
    say(f"| {layer} | {' | '.join(row)} | {' | '.join(f'{r:.2f}' for r in ratios)} |")
    gc.collect()


class _Stop(Exception):
    """The wanted layer has run."""


@torch.no_grad()
def bench_capture(say: Printed, name: str, work: Path, layer: int) -> None:
    bridge = load_model(name, up_to_layer=layer, dtype=torch.bfloat16)
    model, tokenizer = unwrap(bridge), bridge.tokenizer
    long = [text.text for text in texts.read(work, "heldout") if text.tokens >= 128][:8]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:128] for text in long]
    batch = torch.tensor(ids)
    documents = list(batch)

    def stop(module: object, inputs: object, output: object) -> None:
        raise _Stop

    def plain() -> None:
        handle = decoder_layers(model)[layer].register_forward_hook(stop)
        try:
            model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()

    took = interleaved({"plain": plain, "capture": lambda: capture(bridge, documents, [layer])})
    ratio, speed = took["capture"] / took["plain"], batch.numel() / took["capture"]
    say(
        f"\ncapture / plain HF forward stopped at layer {layer}, bfloat16, {len(batch)} x 128"
        f" tokens: {ratio:.3f} ({speed:.0f} tokens/s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--release", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="also write what is printed into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    residuals = options.work / "residuals"
    source = Source.read(residuals)
    layers = [n for n in source.layers if (options.release / f"layer{n}.sae.pt").is_file()]
    say = Printed()
    say(f"{source.model}; SAEs {options.release.name}; {cpu_name()}, one thread; {date.today()}")
    say("Settled: by the bfloat16 pass. Wrong: selections other than float64's.")
    say(
        "\n| layer | settled, counted positions | wrong | settled, first and extreme | wrong |"
        " encode x SAELens | with half copy | decode x SAELens |\n|---|---|---|---|---|---|---|---|"
    )
    for layer, sae in release.load(options.release, layers).items():
        bench_layer(say, sae, residuals, layer, options.positions)
    bench_capture(say, options.model, options.work, layers[-1])
    if options.out is not None:
        say.save(options.out)


if __name__ == "__main__":
    main()
