"""What the SASFT term costs: a training step with it against the same step without.

One process, steps taken in turns; CPU time. The mini, and a random Qwen3 of 3 layers of
Qwen3-1.7B's width with two features per layer in the last two layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _measure import cpu_name, interleaved
from _mini_runs import mini
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen_scope_lens.train import FeatureRows, Penalty, record_residuals


def wide() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8000,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).train()


def steps(model: Any, shape: tuple[int, int]) -> dict[str, Callable[[], object]]:
    width, depth = model.config.hidden_size, model.config.num_hidden_layers
    layers = (depth - 2, depth - 1)
    rows = {n: FeatureRows(torch.randn(2, width) / width**0.5, torch.zeros(2)) for n in layers}
    penalty = Penalty(rows, {n: torch.zeros(3, 2) for n in layers})
    ids = torch.randint(0, 5000, shape)
    languages, counted = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)

    def plain() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    def with_penalty() -> None:
        model.zero_grad()
        with record_residuals(model, layers) as residuals:
            loss = model(input_ids=ids, labels=ids).loss
        (loss + 0.001 * penalty.loss(residuals, languages, counted)).backward()

    return {"step": plain, "step with SASFT": with_penalty}


def main() -> None:
    torch.set_num_threads(1)
    print(f"{cpu_name()}, one thread, torch {torch.__version__}")
    cases = (
        ("mini-qwen3, 8 x 128 tokens", mini()[0].train(), (8, 128)),
        ("Qwen3 of width 2048, 3 layers, 1 x 128 tokens", wide(), (1, 128)),
    )
    for name, model, shape in cases:
        times = interleaved(steps(model, shape), repeats=15 if shape[0] > 1 else 5)
        base, ours = times["step"], times["step with SASFT"]
        print(
            f"{name}: {base * 1e3:.0f} ms a step, with SASFT {ours * 1e3:.0f} ms: "
            f"{ours / base - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
