"""Step 4: the official layout (`layer{n}.sae.pt`, `config.json`) and a card with measured figures.

Layers whose training is finished are released; a later call with more of them makes the folder
anew. The folder is loaded as SAEs of one's own: `QWEN_SCOPE_HOME=WORK/release`, `local/<folder>`.
Usage: `python -m tools.real.release --model MODEL --work WORK --base-model HUB/NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.files import exclusive, whole_folder, write_json
from qwen_scope_lens.models.load import load_model
from qwen_scope_lens.saes.load import load_sae
from qwen_scope_lens.saes.sae import ScopeSAE
from tools.real import texts
from tools.real.capture import residuals_folder
from tools.real.measure import Losses, Reconstruction, losses, reconstruction
from tools.real.shards import Layer, Source
from tools.real.train import MADE_BY, Run, read_run, sae_folder

__all__ = ["card", "export", "finished", "folder_name", "measured"]

FORMAT = "qsl-real-card"
WANTED_TOKENS = 1_500_000
"""What the recipe asks for; the card says by how much a run was shrunk."""


def finished(work: Path, source: Source) -> dict[int, tuple[Run, dict[str, Any]]]:
    """The layers whose training has ended, with their settings and facts."""
    layers = [n for n in source.layers if (sae_folder(work, n) / "done.json").is_file()]
    if not layers:
        raise TooLittleData(f"no layer in {work / 'saes'} is finished: `{MADE_BY}` trains them")
    return {layer: read_run(sae_folder(work, layer)) for layer in layers}


def folder_name(base_model: str, run: Run) -> str:
    """As the official repositories are named."""
    return f"SAE-Res-{base_model.split('/')[-1]}-W{run.d_sae // 1024}K-L0_{run.k}"


def export(work: Path, source: Source, base_model: str) -> Path:
    """Write the folder in the official layout; returns it."""
    runs = finished(work, source)
    first = next(iter(runs.values()))[0]
    for run, _ in runs.values():
        if (run.d_sae, run.k) != (first.d_sae, first.k):
            raise TooLittleData(
                f"the layers were trained with different sizes ({run.d_sae}, k = {run.k} and"
                f" {first.d_sae}, k = {first.k}): one folder holds SAEs of one size"
            )
    target = work / "release" / folder_name(base_model, first)
    config = {
        "model_type": "topk_sae",
        "base_model": base_model,
        "d_model": source.d_model,
        "d_sae": first.d_sae,
        "k": first.k,
        "num_layers": source.num_layers,
        "hook_point": "resid_post",
        "dtype": "float32",
    }
    with whole_folder(target) as partial:
        for layer in runs:
            shutil.copyfile(sae_folder(work, layer) / "sae.pt", partial / f"layer{layer}.sae.pt")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return target


def load(folder: Path, layers: list[int]) -> dict[int, ScopeSAE]:
    """The released SAEs, through the package's own door for SAEs of one's own."""
    before = os.environ.get("QWEN_SCOPE_HOME")
    os.environ["QWEN_SCOPE_HOME"] = str(folder.parent)
    try:
        return {layer: load_sae(f"local/{folder.name}", layer) for layer in layers}
    finally:
        if before is None:
            del os.environ["QWEN_SCOPE_HOME"]
        else:
            os.environ["QWEN_SCOPE_HOME"] = before


def measured(
    work: Path, folder: Path, model: Any, layers: list[int], loss_tokens: int, dead_positions: int
) -> tuple[dict[int, Reconstruction], dict[int, Losses]]:
    """The figures of the released files themselves."""
    saes = load(folder, layers)
    residuals = residuals_folder(work)
    found = {
        layer: reconstruction(
            sae,
            Layer(residuals, "heldout", layer),
            Layer(residuals, "train", layer),
            dead_positions,
        )
        for layer, sae in saes.items()
    }
    chosen, got = [], 0
    for text in texts.read(work, "heldout"):
        if got >= loss_tokens:
            break
        chosen.append(text.text)
        got += text.tokens
    return found, losses(model, saes, chosen, max_tokens=texts.MAX_TOKENS, token_budget=1024)


def card(
    source: Source,
    base_model: str,
    runs: Mapping[int, tuple[Run, dict[str, Any]]],
    found: Mapping[int, Reconstruction],
    lost: Mapping[int, Losses],
    wanted: int = WANTED_TOKENS,
) -> str:
    """The README of the folder, in Markdown."""
    run = next(iter(runs.values()))[0]
    captured = [facts["captured"] for _, facts in runs.values()]
    some = next(iter(found.values()))
    lines = [
        f"# TopK SAEs for {base_model}",
        "",
        f"Trained on the residuals of {source.model} ({source.dtype} pass), with SAELens's own"
        f" trainer: {run.d_sae} features ({run.width} per dimension), k = {run.k}, after decoder"
        f" layers {', '.join(map(str, runs))} of {source.num_layers} (from 0). The layout is that"
        " of the official Qwen-Scope repositories: `TopK(ReLU(x @ W_enc.T + b_enc))`, no `b_dec`"
        " subtracted, decoder columns of length one.",
        "",
        "First tokens and tokens of extreme norm (ten times the median of their document) were"
        " left out of training and of every figure.",
        "",
    ]
    if min(captured) < wanted:
        lines += [
            f"**Shrunk.** The recipe asks for {wanted:,} tokens; these SAEs saw"
            f" {min(captured):,} ({min(captured) / wanted:.0%}). They serve to try things out on a"
            " real model, and are worse than they would be on the whole.",
            "",
        ]
    lines += [
        "| layer | tokens captured | of them used | rows seen | FVU | FVU without the widest column"
        " | its share of variance | L0 | dead features | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for layer, (_, facts) in runs.items():
        one = found[layer]
        lines.append(
            f"| {layer} | {facts['captured']:,} | {facts['positions']:,} | {facts['samples']:,} |"
            f" {one.fvu:.3f} | {one.fvu_others:.3f} | {one.widest:.1%} | {one.l0:.1f} |"
            f" {one.dead:,} of {run.d_sae:,} | {facts['seconds']:,.0f} |"
        )
    lines += [
        "",
        f"FVU and L0 on {some.positions:,} held-out positions; a feature is dead that fired at none"
        f" of {some.dead_positions:,} positions (those and training ones). Seconds are training"
        " only, on a shared machine.",
        "",
        "| layer | tokens | loss | with the SAE | with a random SAE | with zeros | recovered"
        " against the random SAE | against zeros |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layer, losses_ in lost.items():
        lines.append(
            f"| {layer} | {losses_.tokens:,} | {losses_.clean:.3f} | {losses_.spliced:.3f} |"
            f" {losses_.random:.3f} | {losses_.zeroed:.3f} | {losses_.recovered:.1%} |"
            f" {losses_.recovered_from_zeros:.1%} |"
        )
    lines += ["", "Losses are in nats per predicted token, on held-out texts.", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base-model", help="for config.json; else the name used in capturing")
    parser.add_argument("--loss-tokens", type=int, default=2_000)
    parser.add_argument("--dead-positions", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    source = Source.read(residuals_folder(options.work))
    base_model = options.base_model or source.model
    with exclusive(options.work / "release"):
        runs = finished(options.work, source)
        folder = export(options.work, source, base_model)
        model = load_model(options.model, dtype=getattr(torch, source.dtype))
        found, lost = measured(
            options.work, folder, model, list(runs), options.loss_tokens, options.dead_positions
        )
        text = card(source, base_model, runs, found, lost)
        (folder / "README.md").write_text(text, "utf-8")
        layers = {
            str(layer): {
                "run": asdict(run),
                **facts,
                **asdict(found[layer]),
                "losses": asdict(lost[layer]),
            }
            for layer, (run, facts) in runs.items()
        }
        write_json(folder / "card.json", FORMAT, 1, {"source": asdict(source), "layers": layers})
        print(text)
        print(folder)


if __name__ == "__main__":
    main()
