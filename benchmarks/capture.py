"""What hook points and capture cost, beside plain HF and TransformerLens's stock adapter.

    python benchmarks/capture.py > benchmarks/results/capture-cpu.txt

12-layer random models on one CPU thread, float32, sdpa. Times are CPU times of the process, which
other load on the machine disturbs least. Everything is interleaved: in each round every variant
runs once, and a ratio is the median over rounds of variant / plain within the same round.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import string
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_models import make_model, make_tokenizer

from qwen_scope_lens.models import capture, decoder_layers, load_model

N_LAYERS, LAYER = 12, 7
SIZE = {
    "num_hidden_layers": N_LAYERS,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}
DENSE = {"intermediate_size": 768}
LINEAR = {
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MODELS = {
    "Qwen3ForCausalLM": SIZE | DENSE,
    "Qwen3MoeForCausalLM": SIZE | DENSE | {"moe_intermediate_size": 128, "num_experts": 8},
    "Qwen3_5ForCausalLM": SIZE | DENSE | LINEAR,
}
SHAPES = ((1, 1024), (8, 128))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    rounds = arguments.parse_args().rounds
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    print(f"CPU: {cpu_name()}, one thread, CPU time; torch {torch.__version__},")
    print(f"transformers {transformers.__version__}; {N_LAYERS} layers, d_model 256, float32,")
    print(f"sdpa; {rounds} interleaved rounds; ratio: median over rounds [quartiles]\n")
    for kind, settings in MODELS.items():
        for batch, length in SHAPES:
            measure(kind, settings, batch, length, rounds)


def measure(kind: str, settings: dict[str, Any], batch: int, length: int, rounds: int) -> None:
    tokenizer = make_tokenizer()
    plain = make_model(kind, **settings)
    ours = load_model(copy.deepcopy(plain), tokenizer=tokenizer)
    stock_model = copy.deepcopy(plain)
    stock_model.set_attn_implementation("eager")
    stock = build_bridge_from_module(
        stock_model, kind, hf_config=stock_model.config, tokenizer=copy.deepcopy(tokenizer)
    )
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.ascii_letters, k=length)) for _ in range(batch)]
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]
    assert ids.shape == (batch, length)  # a token a letter
    every = [(f"blocks.{n}.hook_resid_post", lambda x, hook: None) for n in range(N_LAYERS)]
    name = f"blocks.{LAYER}.hook_resid_post"

    def stopped() -> None:
        def stop(module: Any, args: Any, output: Any) -> None:
            raise StopIteration

        handle = decoder_layers(plain)[LAYER].register_forward_hook(stop)
        try:
            plain(ids, use_cache=False)
        except StopIteration:
            pass
        finally:
            handle.remove()

    groups: dict[str, dict[str, Callable[[], Any]]] = {
        f"plain HF, stopped after layer {LAYER}": {
            "capture(HF model, texts)": lambda: capture(
                plain, texts, [LAYER], tokenizer=tokenizer, token_budget=batch * length
            ),
            "capture(bridge, texts)": lambda: capture(
                ours, texts, [LAYER], token_budget=batch * length
            ),
            "bridge.run_with_cache(stop_at_layer)": lambda: ours.run_with_cache(
                ids, names_filter=name, stop_at_layer=LAYER + 1
            ),
        },
        "plain HF, whole forward": {
            "bridge(ids)": lambda: ours(ids),
            "bridge.run_with_hooks, a hook on every layer": lambda: ours.run_with_hooks(
                ids, fwd_hooks=every
            ),
            "bridge.run_with_cache, one layer": lambda: ours.run_with_cache(ids, names_filter=name),
            "stock bridge(ids)": lambda: stock(ids, use_cache=True),
            "stock bridge.run_with_hooks, every layer": lambda: stock.run_with_hooks(
                ids, fwd_hooks=every, use_cache=True
            ),
        },
    }
    baselines: list[Callable[[], Any]] = [stopped, lambda: plain(ids, use_cache=False)]
    print(f"{kind}, {batch} x {length} tokens")
    for baseline, (title, variants) in zip(baselines, groups.items(), strict=True):
        base, times = race(baseline, variants, rounds)
        print(f"  {title}: {1e3 * statistics.median(base):.0f} ms")
        for label, found in times.items():
            ratios = sorted(t / b for t, b in zip(found, base, strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"    {middle:5.2f} [{low:.2f}, {high:.2f}]  {label}")
    print(flush=True)


def race(
    baseline: Callable[[], Any], variants: dict[str, Callable[[], Any]], rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Times of the baseline and of each variant, one of each per round, order rotating."""
    runs = [("", baseline), *variants.items()]
    times: dict[str, list[float]] = {label: [] for label, _ in runs}
    for number in range(-2, rounds):
        shift = number % len(runs)
        for label, run in runs[shift:] + runs[:shift]:
            start = time.process_time()
            run()
            if number >= 0:  # two rounds to warm up
                times[label].append(time.process_time() - start)
    return times.pop(""), times


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "unknown"


if __name__ == "__main__":
    main()
