"""The certified encode against the bare bfloat16 product, and against an older revision of itself.

    python benchmarks/certified.py --against main > benchmarks/results/certified-cpu.txt

One thread, CPU time, interleaved; a ratio is the median over the rounds of a case's time by that of
the bare bfloat16 product of the same round. The ratio of the machine's two bare products is printed
beside it, because everything else depends on it. The older code runs in the same process, on the
same weights, and its codes must be the same, bit for bit. Decoding is compared with `embedding_bag`
alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import commit, cpu_name, shares, today
from encode import build, residuals, weights

from qwen_scope_lens.saes import ScopeSAE
from qwen_scope_lens.saes.exact import certified, topk
from qwen_scope_lens.saes.exact.encoder import Encoder
from qwen_scope_lens.saes.exact.topk import encode_topk

SHAPES = ["2048,32768,50,128", "2048,32768,100,256", "896,14336,50,512"]
FOLDER = "qwen_scope_lens/saes/exact"
FILES = ("dots", "encoder", "matmul", "pairs", "certified", "gather", "topk")

STEPS = (
    (certified, "approximate", "first pass"),
    (certified, "_candidates", "candidates"),
    (certified, "_rescored", "re-scoring"),
    (certified, "_decide", "decision"),
    (topk, "_valued", "values in order"),
)


def older(revision: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`encode_topk` and `Encoder` of a revision, as modules of another name."""
    texts = {}
    for name in FILES:
        command = ["git", "show", f"{revision}:{FOLDER}/{name}.py"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode == 0:
            texts[name] = done.stdout
    # What a file imports from the others comes first.
    order: list[str] = []
    while len(order) < len(texts):
        order += [
            name
            for name, text in texts.items()
            if name not in order
            and not any(
                f"saes.exact.{other} import" in text
                for other in texts
                if other not in order and other != name
            )
        ][:1]
    for name in order:
        text = texts[name]
        for other in texts:
            text = text.replace(f"saes.exact.{other} import", f"saes.older_exact_{other} import")
        module = types.ModuleType(f"qwen_scope_lens.saes.older_exact_{name}")
        sys.modules[module.__name__] = module
        exec(compile(text, f"{revision}/{name}.py", "exec"), module.__dict__)
    return (
        sys.modules["qwen_scope_lens.saes.older_exact_topk"].encode_topk,
        sys.modules["qwen_scope_lens.saes.older_exact_encoder"].Encoder,
    )


def measure(shape: tuple[int, ...], against: str | None, rounds: int) -> None:
    d_in, d_sae, k, tokens = shape
    state, x = weights(d_in, d_sae), residuals(d_in, tokens, "isotropic")
    rows, bias = state["W_enc"].T, state["b_enc"]
    half_rows, half_x = rows.bfloat16(), x.bfloat16()
    sae = build(ScopeSAE, state, k)
    codes, decoder = sae.encode_sparse(x), sae.decoder_rows()
    cases: dict[str, Callable[[], Any]] = {
        "bfloat16 product, bare": lambda: half_x @ half_rows.T,
        "float32 product, bare": lambda: x @ state["W_enc"],
    }
    roads = {"": (encode_topk, Encoder)} | ({f", {against}": older(against)} if against else {})
    for name, (encode, make) in roads.items():
        for half, kept in ((True, "certified, half copy"), (False, "certified")):
            encoder = make(rows, bias, half)
            cases[kept + name] = lambda encode=encode, encoder=encoder: encode(
                x, encoder, k, torch.bfloat16
            )
            found = cases[kept + name]()
            assert torch.equal(found[0], codes.values)
            assert torch.equal(found[1], codes.indices)
    cases["decode"] = lambda: sae.decode_sparse(codes)
    cases["embedding_bag alone"] = lambda: torch.nn.functional.embedding_bag(
        codes.indices, decoder, mode="sum", per_sample_weights=codes.values
    )
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-1, rounds):
        for name, case in cases.items():
            start = time.thread_time()
            case()
            if number >= 0:
                times[name].append(time.thread_time() - start)
    bare = times["bfloat16 product, bare"]
    print(f"\nd_model {d_in}, d_sae {d_sae}, k {k}, {tokens} tokens\n{'':34}{'of bfloat16':>11}")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, bare, strict=True))
        print(f"{name:34}{ratio:11.3f}", flush=True)
    encoder = Encoder(rows, bias, True)
    print(
        "with the half copy: " + shares(lambda: encode_topk(x, encoder, k, torch.bfloat16), STEPS)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="REVISION", help="an older revision")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="d_model,d_sae,k,tokens")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print(f"{today()}, commit {commit()}; {cpu_name()}, one thread; torch {torch.__version__}")
    for shape in given.shapes:
        measure(tuple(map(int, shape.split(","))), given.against, given.rounds)


if __name__ == "__main__":
    main()
