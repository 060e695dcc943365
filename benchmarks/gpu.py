"""The Triton kernels on a GPU, against SAELens in one run; at most five minutes.

    python benchmarks/gpu.py --out benchmarks/results/gpu.txt     # needs a GPU
    python benchmarks/gpu.py --rehearse                           # every part, tiny, on a CPU
    python benchmarks/gpu.py --paper > benchmarks/results/gpu-paper.txt

First the kernels' own tests run on the device, then sizes of blocks and tiles are searched, then
encode, decode, forward and backward, extraction and steering are measured at 4096 x 65536 (k = 50)
and 5120 x 81920 (k = 100) with 8,192 tokens, in float32 and bfloat16. Times are medians of
interleaved rounds, with the device's clock stopped at both ends. A part for which `--limit` seconds
leave no time is named and left out. `--rehearse` runs the kernels in Triton's interpreter; its
figures mean nothing.

`--paper` prints what can be said without a device: operations, bytes and their ratio for each
step, and the least time that the peak, the memory and the second-level cache of a device allow. The
steps of an encode run one after the other, so their times are summed; the launches of its small
operations hide behind the device's work, or add to it.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

REHEARSAL = "--rehearse" in sys.argv
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_topk_kernels as kernel_tests  # noqa: E402
from _measure import Printed  # noqa: E402
from encode import build, residuals, weights  # noqa: E402
from sae_lens.saes.topk_sae import TopKSAE  # noqa: E402
from tiny_models import make_model, make_tokenizer  # noqa: E402

import qwen_scope_lens as qsl  # noqa: E402
from qwen_scope_lens.models import iter_captures, load_model  # noqa: E402
from qwen_scope_lens.saes import ScopeSAE  # noqa: E402
from qwen_scope_lens.saes.exact import certified, dots, kernels, pairs, topk  # noqa: E402
from qwen_scope_lens.saes.exact import encoder as encoder_module  # noqa: E402
from qwen_scope_lens.saes.exact.encoder import Encoder  # noqa: E402
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


@dataclass(frozen=True)
class Chosen:
    """What the search found to be fastest."""

    block: int = certified.BLOCK_BYTES_ON_GPU
    tiles: Tiles = kernels.TILES


TINY = (Shape(64, 512, 4, 8),)
BLOCKS = tuple(2**power for power in (26, 27, 28, 29, 30))
SEARCHED = (
    Tiles(),
    Tiles(1),
    Tiles(4),
    Tiles(16),
    Tiles(8, 512),
    Tiles(8, 2048),
    Tiles(8, 1024, 8),
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


LAUNCH = 5e-6
"""Seconds between two operations that each wait for the one before, as is usual on such devices."""


def _expected(shape: Shape, device: Device) -> Table:
    n, d, s, k = shape.tokens, shape.d_in, shape.d_sae, shape.k
    gemm, dense, matrix, x = 2.0 * n * d * s, 4.0 * n * s, 4.0 * d * s, 4.0 * n * d
    blocks = -(-n // (certified.BLOCK_BYTES_ON_GPU // (2 * s)))
    rows = 4.0 * n * k * d  # the bytes of k float32 rows per token
    operations, again = _counted()
    scores = dense / 2  # in bfloat16: written by the product, and then read twice
    steps = {
        "SAELens: product in float32": (gemm, matrix + x + dense, 0.0, device.full),
        "SAELens: dense top-k": (0.0, 2 * dense, 0.0, device.full),
        "SAELens: decode, a product in float32": (gemm, matrix + x + dense, 0.0, device.full),
        "ours: the rows in bfloat16": (0.0, blocks * matrix * 1.5, 0.0, device.full),
        "ours: product in bfloat16": (gemm, blocks * matrix / 2 + scores, 0.0, device.half),
        "ours: candidates": (0.0, 3 * scores, 0.0, device.full),
        f"ours: re-scoring, {again:.1f} k rows per token": (
            2.0 * again * n * k * d,
            x,
            again * rows,
            device.full,
        ),
        "ours: decode, k rows per token": (2.0 * n * k * d, 2 * x, rows, device.full),
        "ours: gradient of the values": (2.0 * n * k * d, x, rows, device.full),
    }
    cells, least = [], {}
    for name, (flop, moved, cached, peak) in steps.items():
        bounds = {"peak": flop / peak, "memory": moved / device.memory}
        bounds["cache"] = cached / device.cache
        worst = max(bounds, key=bounds.__getitem__)
        least[name] = bounds[worst]
        most = max(moved, cached)
        cells.append((name, flop / 1e9, most / 1e9, flop / most, 1e3 * bounds[worst], worst))
    launches = LAUNCH * blocks * operations
    said = f"ours: {blocks} blocks of {operations} operations"
    cells.append((said, 0.0, 0.0, 0.0, 1e3 * launches, "launches"))

    def total(*names: str) -> float:
        return sum(least[name] for name in least if name.startswith(names))

    theirs = total("SAELens: product", "SAELens: dense")
    both = total("SAELens")
    kept = total("ours: product", "ours: candidates", "ours: re-scoring")
    decode = total("ours: decode")
    below = []
    for name, encode in (
        ("with a half copy", kept),
        ("without", kept + total("ours: the rows")),
    ):
        slow, fast = encode + launches, encode
        below.append(
            f"encode {name}: {1e3 * fast:.1f} to {1e3 * slow:.1f} ms, {theirs / slow:.1f} to"
            f" {theirs / fast:.1f} times SAELens; encode and decode {both / (slow + decode):.1f} to"
            f" {both / (fast + decode):.1f} times"
        )
    return Table.of(
        ("step", "Gflop", "GB", "flop/byte", "ms", "bound by"),
        cells,
        below=below,
        formats={"Gflop": ",.0f", "GB": ",.1f", "flop/byte": ",.1f", "ms": ",.2f"},
    )


@cache
def _counted() -> tuple[int, float]:
    """How many operations an encode of one block starts on a device, views left out, and how many
    rows it scores again, divided by k. Both are counted on a CPU, on the road of a GPU."""
    names: list[str] = []
    scored: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func).removeprefix("aten."))
            return func(*args, **(kwargs or {}))

    def counted(
        rows: torch.Tensor, x: torch.Tensor, token: torch.Tensor, feature: torch.Tensor
    ) -> torch.Tensor:
        scored.append(len(token))
        return (rows[feature] * x[token]).sum(-1)

    state, x, k = weights(1024, 16384), residuals(1024, 128, "isotropic"), 50
    encoder = Encoder(state["W_enc"].T.contiguous(), state["b_enc"], keep_half=True)
    modules = (certified, dots, encoder_module, pairs)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "on_cpu", return_value=False))
        stack.enter_context(mock.patch.object(certified, "pair_dots", counted))
        with Counting():
            topk.encode_topk(x, encoder, k, torch.bfloat16)
    views = ("view", "slice", "select", "transpose", "t.", "expand", "alias", "squeeze", "split")
    operations = sum(not name.startswith((*views, "unsqueeze")) for name in names)
    return operations, sum(scored) / (len(x) * k)


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
    chosen: dict[Shape, Chosen] = {}
    for shape in TINY if REHEARSAL else SHAPES:
        label = f"{shape.d_in} x {shape.d_sae}, k = {shape.k}, {shape.tokens} tokens"
        parts += [
            (f"sizes, {label}", lambda s=shape: chosen.update({s: _search(s, device, say)})),
            *(
                (
                    f"{dtype}, {label}",
                    lambda s=shape, d=dtype: _codes(s, d, device, chosen, options.rounds, say),
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
        for name in ("PAIRS", "ENCODE", "DECODE"):
            exec(kernel_tests.COMMON + getattr(kernel_tests, name), {})
            say(f"{name.lower()}: passed")
    finally:
        torch.set_default_device("cpu")
        kernels.available = before


def _search(shape: Shape, device: str, say: Printed) -> Chosen:
    """The fastest size of a block for an encode, and the fastest tiles for the dots of pairs."""
    torch.manual_seed(0)
    x = torch.randn(shape.tokens, shape.d_in, device=device)
    rows = torch.randn(shape.d_sae, shape.d_in, device=device) / shape.d_in**0.5
    encoder = Encoder(rows, torch.zeros(shape.d_sae, device=device), keep_half=True)
    took: dict[Any, float] = {}
    for size in BLOCKS:
        certified.BLOCK_BYTES_ON_GPU = size
        case = partial(topk.encode_topk, x, encoder, shape.k, torch.bfloat16)
        took[size] = _times({"": case}, 1 if REHEARSAL else 3)[""]
        say(f"blocks of {size / 2**20:.0f} MiB: an encode takes {1e3 * took[size]:.2f} ms")
    block = min(BLOCKS, key=took.__getitem__)
    token = torch.arange(len(x), device=device).repeat_interleave(3 * shape.k)
    feature = torch.randint(0, shape.d_sae, (len(token),), device=device)
    found = []
    for tiles in SEARCHED:

        def run(tiles: Tiles = tiles) -> torch.Tensor:
            return kernels.pair_dots(rows, x, token, feature, tiles)

        found.append(run())
        took[tiles] = _times({"": run}, 1 if REHEARSAL else 5)[""]
        rate = 4 * len(token) * shape.d_in / took[tiles] / 1e12
        say(f"{tiles}: {1e3 * took[tiles]:.2f} ms, {rate:.2f} TB/s of rows")
    assert all(torch.allclose(one, found[0], rtol=1e-3, atol=1e-3) for one in found)
    return Chosen(block, min(SEARCHED, key=took.__getitem__))


def _codes(
    shape: Shape,
    dtype: str,
    device: str,
    chosen: dict[Shape, Chosen],
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
    found = chosen.get(shape, Chosen())
    kernels.TILES, certified.BLOCK_BYTES_ON_GPU = found.tiles, found.block
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
