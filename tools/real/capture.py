"""Step 2: the residuals of several layers in one pass, in shards; it goes on where it stopped.

The package's own reader does it: documents are batched by length, never packed, and the pass ends
after the last wanted layer. Residuals are stored in the dtype of the pass, so nothing is rounded
and a sink of any length fits. A larger `--tokens` later adds shards to those that are there.
Usage: `python -m tools.real.capture --model MODEL --work WORK --layers 4,10,14,20 --tokens N`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_scope_lens.errors import NotFinite, TooLittleData
from qwen_scope_lens.files import exclusive, whole_file
from qwen_scope_lens.models.architecture import text_config
from qwen_scope_lens.models.load import load_model
from qwen_scope_lens.models.residuals import Capture, capture
from qwen_scope_lens.stores.facts import model_facts
from tools.real import texts
from tools.real.shards import Source, plan_shards, shard_path, shards_there

__all__ = ["capture_shards", "residuals_folder", "source_of"]

SHARD_TOKENS = 8_192
TOKEN_BUDGET = 2048


def residuals_folder(work: Path) -> Path:
    return work / "residuals"


def source_of(
    model: Any, name: str, num_layers: int, layers: Sequence[int], work: Path, shard_tokens: int
) -> Source:
    """The facts that every shard of a folder shares."""
    facts = model_facts(model, layers)
    return Source(
        model=name,
        fingerprint=facts.fingerprint,
        dtype=facts.dtype,
        num_layers=num_layers,
        d_model=facts.d_model,
        layers=tuple(layers),
        texts={split: texts.sha256_of(work, split) for split in texts.SPLITS},
        shard_tokens=shard_tokens,
    )


def capture_shards(
    model: Any, source: Source, work: Path, split: str, tokens: int, token_budget: int
) -> int:
    """Capture what is missing of a split's first `tokens` positions; returns how many are new."""
    folder = residuals_folder(work)
    documents = texts.read(work, split)
    runs = plan_shards([text.tokens for text in documents], source.shard_tokens)
    goal = min(tokens, sum(text.tokens for text in documents))
    done, new, started = 0, 0, time.monotonic()
    for number, run in enumerate(runs):
        if done >= goal:
            break
        path = shard_path(folder, split, number)
        if path.exists():
            done += sum(documents[n].tokens for n in run)
            continue
        found = capture(
            model,
            [documents[n].text for n in run],
            source.layers,
            window=len(run),
            token_budget=token_budget,
            max_tokens=texts.MAX_TOKENS,
            truncate=True,
        )
        _write(path, found)
        done, new = done + found.n_tokens, new + found.n_tokens
        speed = new / (time.monotonic() - started)
        left = (goal - done) / speed / 60
        print(
            f"{split} {number}: {done} of {goal} tokens, {speed:.0f} tokens/s, {left:.0f} minutes"
            " left",
            flush=True,
        )
    return new


def _write(path: Path, found: Capture) -> None:
    tensors = {"tokens": found.token_ids.int(), "offsets": found.offsets}
    for layer in found.layers:
        if not bool(found.residuals[layer].isfinite().all()):
            raise NotFinite(
                f"the residuals of layer {layer} are not finite in {found.residuals[layer].dtype}:"
                " run the model in another dtype (--dtype bfloat16 or float32)"
            )
        tensors[f"layer{layer}"] = found.residuals[layer].cpu().contiguous()
        tensors[f"keep{layer}"] = found.keep(layer).cpu()
    with whole_file(path) as partial:
        save_file(tensors, partial)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="how the model is named in manifest and card")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", required=True, help="from 0, as in 4,10,14,20")
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--heldout-tokens", type=int, default=32_000)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--token-budget", type=int, default=TOKEN_BUDGET)
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    layers = sorted({int(layer) for layer in options.layers.split(",")})
    model = load_model(options.model, up_to_layer=layers[-1], dtype=getattr(torch, options.dtype))
    source = source_of(
        model,
        options.name or Path(options.model).name,
        _depth(options.model),
        layers,
        options.work,
        options.shard_tokens,
    )
    folder = residuals_folder(options.work)
    with exclusive(folder):
        source.claim(folder)
        for split, tokens in (("heldout", options.heldout_tokens), ("train", options.tokens)):
            capture_shards(model, source, options.work, split, tokens, options.token_budget)
            if not shards_there(folder, split):
                raise TooLittleData(f"no shard of {split}: ask for one token or more")


def _depth(name: str) -> int:
    from transformers import AutoConfig

    return int(text_config(AutoConfig.from_pretrained(name)).num_hidden_layers)


if __name__ == "__main__":
    main()
