"""What steering costs: steered over unsteered generation, and SAELens's way in the same run.

    python benchmarks/steer.py > benchmarks/results/steer-cpu.txt

A random Qwen3 of 16 layers (d_model 1024) with an SAE whose encode is about as large a share of the
model's work as on Qwen3-8B, or a real model (--model, --sae). SAELens's way: the SAE attached to a
bridge at its hook with the error term, and a hook on its activations that sets the feature. One CPU
thread, float32, greedy, batch of one; CPU time, interleaved; a ratio is the median over the rounds
of variant / unsteered.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sae_lens
import torch
import transformers
from _measure import cpu_name
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_models import make_model, make_tokenizer

from qwen_scope_lens.models import load_model, unwrap
from qwen_scope_lens.saes import ScopeSAE, load_sae
from qwen_scope_lens.steering import Plan, steer

LAYERS, WIDTH, D_SAE, K = 16, 1024, 8192, 50
SIZE = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}
PROMPT = 32


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--new-tokens", type=int, default=16)
    arguments.add_argument("--model", help="a real model's folder, with --sae")
    arguments.add_argument("--sae", help="the group of its SAEs")
    arguments.add_argument("--layers", default="", help="three layers, such as 4,10,14")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    if options.model:
        bridge = load_model(options.model)
        layers = [int(layer) for layer in options.layers.split(",")]
        measure(options, bridge, options.sae, layers)
        return
    with tempfile.TemporaryDirectory() as home:
        os.environ["QWEN_SCOPE_HOME"] = home
        write_saes(Path(home) / "mid")
        bridge = load_model(make_model(**SIZE), tokenizer=make_tokenizer())
        measure(options, bridge, "local/mid", (4, 8, 12))


def write_saes(folder: Path) -> None:
    folder.mkdir()
    settings = {
        "model_type": "topk_sae",
        "base_model": "random/mid",
        "num_layers": LAYERS,
        "d_model": WIDTH,
        "d_sae": D_SAE,
        "k": K,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for layer in (4, 8, 12):
        torch.manual_seed(layer)
        rows = torch.nn.functional.normalize(torch.randn(D_SAE, WIDTH), dim=-1)
        weights = {
            "W_enc": rows,
            "W_dec": rows.T.contiguous(),
            "b_enc": torch.zeros(D_SAE),
            "b_dec": torch.zeros(WIDTH),
        }
        torch.save(weights, folder / f"layer{layer}.sae.pt")


def plain_sae(ours: ScopeSAE) -> TopKSAE:
    """The same weights as SAELens's own class."""
    d_in, d_sae, k = ours.cfg.d_in, ours.cfg.d_sae, ours.cfg.k
    cfg = TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k, apply_b_dec_to_input=False)
    cfg.metadata.hook_name = ours.cfg.metadata.hook_name
    sae = TopKSAE(cfg)
    sae.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()})
    return sae.requires_grad_(False)


def measure(options: argparse.Namespace, bridge: Any, group: str, layers: Sequence[int]) -> None:
    rounds, new_tokens = options.rounds, options.new_tokens
    model = unwrap(bridge)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    ids = torch.randint(0, 256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    saes = {f"{group}/{layer}": load_sae(f"{group}/{layer}") for layer in layers}
    middle = f"{group}/{layers[1]}"
    saelens = plain_sae(saes[middle])

    def ours(*edits: str) -> Callable[[], Any]:
        return lambda: steer(bridge, Plan(edits), saes)

    variants = {
        "unsteered": nullcontext,
        "add, one feature": ours(f"{middle}/7:add:3"),
        "add, 9 features in 3 layers": ours(
            *(f"{group}/{layer}/{f}:add:1" for layer in layers for f in (1, 2, 3))
        ),
        "set, one feature": ours(f"{middle}/7:set:3"),
        "set, 8 features of one layer": ours(*(f"{middle}/{f}:set:1" for f in range(8))),
        "set, in 3 layers": ours(*(f"{group}/{layer}/7:set:3" for layer in layers)),
        "SAELens: attach and hook, one feature": lambda: attached(bridge, saelens),
    }
    produced: dict[str, list[int]] = {}

    def run(name: str) -> float:
        with variants[name]():
            start = time.process_time()
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
            )
            took = time.process_time() - start
        produced[name] = out[0].tolist()
        return took

    for name in variants:
        run(name)  # warm up: derived weights are made once
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in variants:
            times[name].append(run(name))
    assert produced["set, one feature"] == produced["SAELens: attach and hook, one feature"]
    base = times["unsteered"]
    print(f"CPU: {cpu_name()}, one thread, CPU time; torch {torch.__version__},")
    print(f"transformers {transformers.__version__}, sae-lens {sae_lens.__version__}")
    cfg = saelens.cfg
    print(f"{group}: {model.config.num_hidden_layers} layers, d_model {cfg.d_in}, SAE {cfg.d_sae}")
    print(f"features, k={cfg.k}, float32;")
    print(f"prompt of {PROMPT} tokens, {new_tokens} new ones; {rounds} interleaved rounds")
    print(f"unsteered: {statistics.median(base) / new_tokens * 1e3:.0f} ms a new token\n")
    for name, found in times.items():
        ratios = sorted(a / b for a, b in zip(found, base, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"  {statistics.median(ratios):5.2f}x [{low:.2f}, {high:.2f}]  {name}")
    print("\n`set` of one feature: same tokens as SAELens's way")


@contextmanager
def attached(bridge: Any, sae: TopKSAE) -> Iterator[None]:
    def hook(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[:, 1 if acts.shape[1] > 1 else 0 :, 7] = 3.0  # all but the first token
        return acts

    name = f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"
    with bridge.saes([sae], use_error_term=True), bridge.hooks(fwd_hooks=[(name, hook)]):
        yield


if __name__ == "__main__":
    main()
