"""The Triton kernels on a GPU, against SAELens in one run; at most five minutes.

    python benchmarks/gpu.py --out benchmarks/results/gpu.txt     # needs a GPU
    python benchmarks/gpu.py --rehearse                           # every part, tiny, on a CPU
    python benchmarks/gpu.py --paper > benchmarks/results/gpu-paper.txt

First the kernels' own tests run on the device, then tile sizes are searched, then encode, decode,
forward and backward, extraction and steering are measured at 4096 x 65536 (k = 50) and 5120 x 81920
(k = 100) with 8,192 tokens, in float32 and bfloat16. Times are medians of interleaved rounds, with
the device's clock stopped at both ends. A part for which `--limit` seconds leave no time is named
and left out. `--rehearse` runs the kernels in Triton's interpreter; its figures mean nothing.

`--paper` prints what can be said without a device: operations, bytes and their ratio for each
kernel, and the least time that the peak, the memory and the second-level cache of a device allow.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

REHEARSAL = "--rehearse" in sys.argv
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_topk_kernels as kernel_tests  # noqa: E402
from _measure import Printed  # noqa: E402
from encode import build, residuals, weights  # noqa: E402
from sae_lens.saes.topk_sae import TopKSAE  # noqa: E402
from tiny_models import make_model, make_tokenizer  # noqa: E402

import qwen_scope_lens as qsl  # noqa: E402
from qwen_scope_lens.models import iter_captures, load_model  # noqa: E402
from qwen_scope_lens.saes import ScopeSAE  # noqa: E402
from qwen_scope_lens.saes.exact import kernels  # noqa: E402
from qwen_scope_lens.saes.exact.kernels import Tiles  # noqa: E402
from qwen_scope_lens.steering import Plan, steer  # noqa: E402
from qwen_scope_lens.stores import pack  # noqa: E402
from qwen_scope_lens.tables import Table  # noqa: E402
from qwen_scope_lens.version import versions  # noqa: E402


@dataclass(frozen=True)
class Shape:
    d_in: int
    d_sae: int
    k: int
    tokens: int = 8192


SHAPES = (Shape(4096, 65536, 50), Shape(5120, 81920, 100))
TINY = (Shape(64, 512, 4, 8),)
SEARCHED = (
    Tiles(),
    Tiles(128, 128, 32, 4),
    Tiles(128, 128, 64, 8),
    Tiles(64, 256, 32, 4),
    Tiles(128, 256, 32, 8),
    Tiles(128, 256, 64, 8),
)
LAYERS, CONTEXT = 4, 1024  # of the model in the parts for extraction and steering


@dataclass(frozen=True)
class Device:
    """A device on paper, as its maker describes it; the speed of the cache is an estimate."""

    name: str
    half: float  # bfloat16 operations per second
    full: float  # float32
    memory: float  # bytes per second
    cache: float


PAPER = (
    Device("H100 SXM", 989e12, 67e12, 3.35e12, 5.5e12),
    Device("A100 80GB", 312e12, 19.5e12, 2.04e12, 4.0e12),
    Device("RTX 4090", 165e12, 82.6e12, 1.01e12, 4.0e12),
)


def main() -> None:
    options = _options()
    say = Printed()
    if options.paper:
        paper(say)
    else:
        measured(options, say)
    if options.out:
        say.save(options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--paper", action="store_true", help="what can be said without a device")
    parser.add_argument("--limit", type=float, default=280, help="seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.rehearse:
        options.rounds = 1  # the interpreter takes seconds for what a GPU does in microseconds
    return options


# --- on paper ------------------------------------------------------------------------------------


def paper(say: Printed) -> None:
    for shape in SHAPES:
        say(f"{shape.tokens:,} tokens, {shape.d_in} x {shape.d_sae:,}, k = {shape.k}\n")
        for device in PAPER:
            say(f"{device.name}: least times on paper (nothing here was measured)")
            say(str(_expected(shape, device)))
            say()


def _expected(shape: Shape, device: Device) -> Table:
    n, d, s, k = shape.tokens, shape.d_in, shape.d_sae, shape.k
    gemm, dense = 2.0 * n * d * s, 4.0 * n * s
    matrix, x = 4.0 * d * s, 4.0 * n * d
    block = 512  # tokens per first pass: see `tokens_per_block`

    def tiled(tiles: Tiles, row_bytes: int) -> float:
        """Bytes that the tiles of a product fetch from the cache, each operand once per tile."""
        across, down = -(-s // tiles.features), -(-n // tiles.positions)
        return float(n * d * 2 * across + s * d * row_bytes * down)

    rows = [
        (
            "SAELens encode (float32 product, dense top-k)",
            gemm,
            matrix + x + 3 * dense,
            0.0,
            "full",
        ),
        ("SAELens decode (dense product)", gemm, matrix + x + dense, 0.0, "full"),
        ("our sample (1/16 of the features, float32)", gemm / 16, matrix / 16 + x, 0.0, "full"),
    ]
    rows += [
        (
            f"our first pass, tiles {t.positions} x {t.features}, {name} rows",
            gemm,
            matrix / 4 * size * n / block + x,
            tiled(t, size),
            "half",
        )
        for t in (Tiles(), Tiles(128, 256, 64, 8))
        for name, size in (("float32", 4), ("bfloat16", 2))
    ]
    rows += [
        (
            "our re-scoring (about 3 k pairs per token)",
            6.0 * n * k * d,
            x,
            12.0 * n * k * d,
            "full",
        ),
        ("our decode (k rows per token)", 2.0 * n * k * d, 2 * x, 4.0 * n * k * d, "full"),
        ("our decode, gradient of the values", 2.0 * n * k * d, x, 4.0 * n * k * d, "full"),
    ]
    cells = []
    for name, flop, moved, cached, peak in rows:
        bounds = {
            "peak": flop / (device.half if peak == "half" else device.full),
            "memory": moved / device.memory,
            "cache": cached / device.cache,
        }
        worst = max(bounds, key=bounds.__getitem__)
        most = max(moved, cached)
        cells.append((name, flop / 1e9, most / 1e9, flop / most, 1e3 * bounds[worst], worst))
    least = [cell[4] for cell in cells]
    theirs, sample, rescoring = least[0], least[2], least[-3]
    sums = [sample + pass_ + rescoring for pass_ in least[3:-3]]
    said = [
        f"encode, at best, with {name.removeprefix('our first pass, ')}: {total:.1f} ms,"
        f" {theirs / total:.1f} times SAELens; encode and decode"
        f" {(theirs + least[1]) / (total + least[-2]):.1f} times"
        for (name, *_), total in zip(cells[3:-3], sums, strict=True)
    ]
    return Table.of(
        ("part", "Gflop", "GB", "flop/byte", "ms", "bound by"),
        cells,
        below=said,
        formats={"Gflop": ",.0f", "GB": ",.1f", "flop/byte": ",.1f", "ms": ",.2f"},
    )


# --- on a device ---------------------------------------------------------------------------------


def measured(options: argparse.Namespace, say: Printed) -> None:
    began = time.monotonic()
    if not REHEARSAL and not torch.cuda.is_available():
        sys.exit("no GPU was found: --rehearse runs every part on a CPU, --paper needs none")
    warnings.simplefilter("ignore")
    device = "cpu" if REHEARSAL else "cuda"
    if REHEARSAL:
        kernels.available = lambda device: True
        torch.set_num_threads(1)
    name = "a rehearsal on a CPU: no figure here means anything"
    found = versions("triton", "sae-lens")
    say(
        f"{name if REHEARSAL else torch.cuda.get_device_name()}; {date.today().isoformat()}; commit"
        f" {_commit()}; torch {found['torch']}, triton {found['triton']}, sae-lens"
        f" {found['sae-lens']}\n"
    )
    parts: list[tuple[str, Callable[[], object]]] = [("kernel tests", lambda: _tests(device, say))]
    tiles: dict[Shape, Tiles] = {}
    for shape in TINY if REHEARSAL else SHAPES:
        label = f"{shape.d_in} x {shape.d_sae}, k = {shape.k}, {shape.tokens} tokens"
        parts += [
            (f"tiles, {label}", lambda s=shape: tiles.update({s: _search(s, device, say)})),
            *(
                (
                    f"{dtype}, {label}",
                    lambda s=shape, d=dtype: _codes(s, d, device, tiles, options.rounds, say),
                )
                for dtype in ("float32", "bfloat16")
            ),
            (f"in a model, {label}", lambda s=shape: _in_a_model(s, device, options.rounds, say)),
        ]
    for title, part in parts:
        left = options.limit - (time.monotonic() - began)
        if left < 15 and not REHEARSAL:
            say(f"## {title}: left out, {left:.0f} s are left\n")
            continue
        say(f"## {title}")
        part()
        say(f"({time.monotonic() - began:.0f} s)\n")


def _tests(device: str, say: Printed) -> None:
    """The scripts of tests/test_topk_kernels.py, with every tensor on the device."""
    before = kernels.available
    torch.set_default_device(device)
    try:
        for name in ("CANDIDATES", "ENCODE", "DECODE"):
            exec(kernel_tests.COMMON + getattr(kernel_tests, name), {})
            say(f"{name.lower()}: passed")
    finally:
        torch.set_default_device("cpu")
        kernels.available = before


def _search(shape: Shape, device: str, say: Printed) -> Tiles:
    """The fastest tiles of the bfloat16 first pass, on a line that 1% of the scores reach."""
    torch.manual_seed(0)
    x = torch.randn(min(shape.tokens, 2048), shape.d_in, device=device)
    rows = torch.randn(shape.d_sae, shape.d_in, device=device) / shape.d_in**0.5
    bias = torch.zeros(shape.d_sae, device=device)
    line = torch.full((len(x),), 2.33, device=device)
    cap = max(32 * shape.k, shape.d_sae // 32)
    took, counts = {}, []
    for tiles in SEARCHED:

        def run(tiles: Tiles = tiles) -> Any:
            return kernels.candidates(x, rows, bias, x[:, :0], rows[:, :0], line, cap, True, tiles)

        try:
            counts.append(run()[0].sum().item())
        except Exception as error:  # too large for this device
            say(f"{tiles}: {type(error).__name__}")
            continue
        took[tiles] = _times({"": run}, 1 if REHEARSAL else 5)[""]
        rate = 2 * x.numel() * shape.d_sae / took[tiles] / 1e12
        say(f"{tiles}: {1e3 * took[tiles]:.2f} ms, {rate:.1f} Tflop/s")
    spread = (max(counts) - min(counts)) / max(1, max(counts))
    assert spread < 1e-3, f"tiles find different candidates: {counts}"
    return min(took, key=took.__getitem__)


def _codes(
    shape: Shape,
    dtype: str,
    device: str,
    tiles: dict[Shape, Tiles],
    rounds: int,
    say: Printed,
) -> None:
    """Encode, decode, and decode forward and backward, against SAELens in float32."""
    state = weights(shape.d_in, shape.d_sae)
    kind = getattr(torch, dtype)
    theirs = build(TopKSAE, state, shape.k).to(device)
    theirs.W_dec = torch.nn.Parameter(theirs.W_dec.contiguous(), requires_grad=False)
    ours = build(ScopeSAE, state, shape.k).to(device, kind)
    x = residuals(shape.d_in, shape.tokens, "realistic").to(device, kind)
    kernels.TILES = tiles.get(shape, Tiles())
    codes, dense = ours.encode_sparse(x), theirs.encode(x.float())

    def backward() -> None:
        values = codes.values.clone().requires_grad_()
        ours.decode_sparse(
            type(codes)(values, codes.indices, shape.d_sae)
        ).square().sum().backward()

    def their_backward() -> None:
        theirs.decode(dense.clone().requires_grad_()).square().sum().backward()

    with torch.no_grad():
        took = _times(
            {
                "encode SAELens": lambda: theirs.encode(x.float()),
                "encode": lambda: ours.encode_sparse(x),
                "decode SAELens": lambda: theirs.decode(dense),
                "decode": lambda: ours.decode_sparse(codes),
            },
            rounds,
        )
        memory = _peak(lambda: ours.encode_sparse(x), device)
    took |= _times({"fwd+bwd SAELens": their_backward, "fwd+bwd": backward}, rounds)
    for name in ("encode", "decode"):
        took["encode + decode"] = took.get("encode + decode", 0) + took[name]
        both = took.get("encode + decode SAELens", 0) + took[f"{name} SAELens"]
        took["encode + decode SAELens"] = both
    for name in ("encode", "decode", "encode + decode", "fwd+bwd"):
        ours_ms, theirs_ms = 1e3 * took[name], 1e3 * took[f"{name} SAELens"]
        say(
            f"{name:16} {ours_ms:9.2f} ms, SAELens {theirs_ms:9.2f} ms: {theirs_ms / ours_ms:6.2f}x"
        )
    whole = shape.tokens * shape.d_sae * 2
    say(
        f"encode needs {memory / 1e6:,.0f} MB, [tokens, d_sae] in bfloat16 would be"
        f" {whole / 1e6:,.0f} MB"
    )
    if dtype == "float32":
        same = (codes.to_dense() - dense).abs().amax(1) <= 1e-3 * dense.amax(1)
        say(f"codes as SAELens's: {same.float().mean().item():.4%} of tokens")


def _in_a_model(shape: Shape, device: str, rounds: int, say: Printed) -> None:
    """Extraction and steering in a random model of this width, with an SAE in its last layer."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["QWEN_SCOPE_HOME"] = home
        _extract_and_steer(Path(home) / "random", shape, device, rounds, say)


def _extract_and_steer(folder: Path, shape: Shape, device: str, rounds: int, say: Printed) -> None:
    heads = max(1, shape.d_in // 128)
    model = make_model(
        hidden_size=shape.d_in,
        intermediate_size=3 * shape.d_in,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=min(128, shape.d_in),
        max_position_embeddings=CONTEXT,
        initializer_range=0.02,
        dtype=torch.bfloat16,
    ).to(device)
    bridge = load_model(model, tokenizer=make_tokenizer())
    state, layer = weights(shape.d_in, shape.d_sae), LAYERS - 1
    length = min(CONTEXT, shape.tokens)
    ids = [[(7 * i + j) % 256 for j in range(length)] for i in range(shape.tokens // length)]
    group = _local_group(folder, state, shape)
    ours = qsl.load_sae(f"{group}/{layer}", device=device)
    theirs = build(TopKSAE, state, shape.k).to(device)
    block = dict(model.named_modules())[f"model.layers.{layer}"]

    def extraction() -> None:
        for capture in iter_captures(bridge, ids, [layer], token_budget=4096):
            pack(ours.encode_sparse(capture.residuals[layer]))

    def usual_loop() -> None:
        rows = max(1, 4096 // length)
        for start in range(0, len(ids), rows):
            kept: list[torch.Tensor] = []
            handle = block.register_forward_hook(partial(_keep, kept))
            model.model(torch.tensor(ids[start : start + rows], device=device))
            handle.remove()
            acts = theirs.encode(kept[0].flatten(0, 1).float())
            acts.nonzero().cpu(), acts[acts > 0].cpu()

    batch = torch.tensor(ids, device=device)
    plan = Plan([f"{group}/{layer}/7:set:3"])

    def forward() -> None:
        model.model(batch)

    def steered() -> None:
        with steer(bridge, plan, {f"{group}/{layer}": ours}):
            model.model(batch)

    def saelens_way() -> None:
        with _replaced(block, theirs):
            model.model(batch)

    with torch.no_grad():
        took = _times({"ours": extraction, "usual loop": usual_loop}, max(2, rounds // 2))
        say(
            f"extraction: {1e3 * took['ours']:.0f} ms, usual loop without a head"
            f" {1e3 * took['usual loop']:.0f} ms: {took['usual loop'] / took['ours']:.2f}x"
        )
        took = _times({"plain": forward, "ours": steered, "SAELens": saelens_way}, rounds)
    plain = took["plain"]
    say(
        f"steering (set, one feature): {took['ours'] / plain:.2f} of a plain forward, SAELens's"
        f" encode and decode {took['SAELens'] / plain:.2f}"
    )


def _local_group(folder: Path, state: dict[str, torch.Tensor], shape: Shape) -> str:
    import json

    folder.mkdir()
    settings = {"model_type": "topk_sae", "base_model": "random/model", "num_layers": LAYERS}
    sizes = {"d_model": shape.d_in, "d_sae": shape.d_sae, "k": shape.k}
    (folder / "config.json").write_text(json.dumps(settings | sizes))
    saved = {
        "W_enc": state["W_enc"].T.contiguous(),
        "W_dec": state["W_dec"].T.contiguous(),
        "b_enc": state["b_enc"],
        "b_dec": state["b_dec"],
    }
    torch.save(saved, folder / f"layer{LAYERS - 1}.sae.pt")
    return f"local/{folder.name}"


@contextmanager
def _replaced(block: Any, sae: TopKSAE) -> Iterator[None]:
    """SAELens's way: encode, set the feature, decode, and add what the SAE does not explain."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        x = _plain(out).float()
        acts = sae.encode(x)
        error = x - sae.decode(acts)
        acts[..., 7] = 3.0
        new = (sae.decode(acts) + error).to(_plain(out).dtype)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _keep(kept: list[torch.Tensor], module: Any, args: Any, out: Any) -> None:
    kept.append(_plain(out))


def _plain(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _times(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each case over interleaved rounds, after one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            _wait()
            start = time.perf_counter()
            case()
            _wait()
            if number:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(case: Callable[[], object], device: str) -> int:
    """Bytes of device memory that a call takes at its peak."""
    if device == "cpu":
        case()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case()
    return torch.cuda.max_memory_allocated() - before


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
