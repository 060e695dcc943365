"""Step 3: a mini model, trained from scratch on the corpus.

Muon for the matrices inside the layers, AdamW for the rest; constant learning rate, then a linear
descent to zero over the last part. Resumable: the same command continues from the last checkpoint.
Usage: `python -m tools.mini.model mini-qwen3`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from tools.mini.corpus import work_folder
from tools.mini.data import PAD, epochs, padded, token_rows
from tools.mini.durations import measured
from tools.mini.specs import SPECS, ModelSpec, build_model

__all__ = ["held_out_loss", "loss_of", "train"]

COOLDOWN = 0.35
WARMUP_STEPS = 40
SAVE_SECONDS = 150.0


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loss_of(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Mean next-token loss over the real tokens of a padded batch, and how many there were."""
    labels = ids.masked_fill(~mask, PAD)[:, 1:]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    chosen = labels != PAD
    logits = model.lm_head(hidden[chosen]).float()
    return functional.cross_entropy(logits, labels[chosen]), int(chosen.sum())


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Sequence[int]], tokens: int = 4096) -> float:
    """Mean loss per token over rows, in nats."""
    total, count = 0.0, 0
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    width = max(1, tokens // max(len(row) for row in rows))
    for start in range(0, len(order), width):
        ids, mask = padded(rows, order[start : start + width])
        loss, n = loss_of(model, ids.to(model.device), mask.to(model.device))
        total, count = total + float(loss) * n, count + n
    return total / count


def _optimizers(model: Any, spec: ModelSpec) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=spec.lr_matrix, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(rest, lr=spec.lr_rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _scale(step: int, seen: int, goal: int) -> float:
    left = max(0.0, 1.0 - seen / goal)
    return min(1.0, (step + 1) / WARMUP_STEPS, left / COOLDOWN + 0.01)


def _write(path: Path, content: Any) -> None:
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def train(spec: ModelSpec, work: Path, rows: Sequence[Sequence[int]] | None = None) -> Path:
    """Train (or continue to train) a model; returns the folder of the finished checkpoint."""
    folder = work / "models" / spec.name
    final = folder / "final"
    if (final / "config.json").is_file():
        print(f"{spec.name}: already trained")
        return final
    folder.mkdir(parents=True, exist_ok=True)
    if rows is None:
        rows = token_rows(work, "train")[1]
    valid = token_rows(work, "valid")[1][:256]
    torch.manual_seed(spec.seed)
    model = build_model(spec).to(device())
    if model.device.type == "cpu":  # for rows this short quicker than the fused kernel
        model.set_attn_implementation("eager")
    optimizers = _optimizers(model, spec)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step, seen, kept = 0, 0, 0
    saved = folder / "checkpoint.pt"
    if saved.is_file():
        state = torch.load(saved, map_location=model.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        step, seen, kept = state["step"], state["seen"], state["kept"]
        print(f"{spec.name}: continues at step {step}", flush=True)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{spec.name}: {size / 1e6:.2f}M parameters, {spec.tokens / 1e6:.1f}M tokens", flush=True)
    last_save = started = time.monotonic()
    begun_at, running = seen, 0.0
    for numbers in islice(epochs(rows, spec.batch_tokens, spec.seed), step, None):
        if seen >= spec.tokens:
            break
        scale = _scale(step, seen, spec.tokens)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        ids, mask = padded(rows, numbers)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            loss, count = loss_of(model, ids.to(model.device), mask.to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + count
        recent = float(loss.detach())
        running = recent if running == 0.0 else 0.95 * running + 0.05 * recent
        now = time.monotonic()
        if step % 50 == 0 or step <= 5:
            speed = (seen - begun_at) / (now - started)
            print(f"step {step} tokens {seen} loss {running:.3f} {speed:.0f} tok/s", flush=True)
        if kept < len(spec.snapshots) and seen >= spec.snapshots[kept] * spec.tokens:
            kept += 1
            model.save_pretrained(folder / f"snapshot-{kept}-{seen}")
        if now - last_save > SAVE_SECONDS:
            last_save = now
            states = [optimizer.state_dict() for optimizer in optimizers]
            content = {"model": model.state_dict(), "optimizers": states}
            _write(saved, {**content, "step": step, "seen": seen, "kept": kept})
            if kept:
                print(f"  held-out {held_out_loss(model.eval(), valid):.3f}", flush=True)
                model.train()
    print(f"{spec.name}: held-out loss {held_out_loss(model.eval(), valid):.3f} nats", flush=True)
    _finish(model, work, final)
    return final


def _finish(model: Any, work: Path, final: Path) -> None:
    """Write the checkpoint as Transformers expects it: bfloat16 on disk, float32 to run."""
    partial = final.with_suffix(".partial")
    model.generation_config.eos_token_id = [6002, 6000]
    model.generation_config.pad_token_id = 6000
    model.to(torch.bfloat16).save_pretrained(partial)
    for path in sorted((work / "tokenizer").iterdir()):
        shutil.copy(path, partial / path.name)
    config = json.loads((partial / "config.json").read_text("utf-8"))
    text = json.dumps({**config, "dtype": "float32"}, indent=2)
    (partial / "config.json").write_text(text + "\n", "utf-8")
    (partial / "model.safetensors").chmod(0o644)
    os.replace(partial, final)


def step_arguments(doc: str) -> tuple[ModelSpec, Path]:
    """What the command line of a step says: which model, and the folder of all steps."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("name", choices=sorted(SPECS))
    parser.add_argument("--work", default=None)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return SPECS[arguments.name], work_folder(arguments.work)


def main() -> None:
    spec, work = step_arguments(__doc__)
    with measured(work, f"model {spec.name}"):
        train(spec, work)


if __name__ == "__main__":
    main()
