"""Comparisons at mini scale: seeds, widths, layers, two models, a fine-tune; a report and pictures.

    OMP_NUM_THREADS=1 python benchmarks/compare_mini.py > benchmarks/results/compare-mini.txt

Everything comes with the package: the models, their SAEs and the held-out texts, of which one half
trains (the small SAEs, the fine-tune) and the other is compared on. `--work` keeps what was made,
so that a second call goes on; pictures go to `--images` (docs/images). About two minutes of CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import cpu_name

import qwen_scope_lens as qsl
from qwen_scope_lens.compare import (
    Drift,
    Matching,
    align,
    drift,
    drift_page,
    fidelity,
    match_activations,
    match_decoders,
    transfer,
)
from qwen_scope_lens.compare import summary as drift_summary
from qwen_scope_lens.features import rank
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.pages import save_chart
from qwen_scope_lens.stores import FeatureStore, extract
from tools.mini.sae import train_layer

BASE, OTHER = "mini-qwen3", "mini-qwen3.5"
GROUP, OTHER_GROUP = f"{BASE}/w1k-l0-16", f"{OTHER}/w1k-l0-16"
LAYER, MAX_TOKENS, SAMPLES = 6, 96, 150_000
TUNE_LANG, TUNE_STEPS, TUNE_ROWS, TUNE_LR = "zh", 60, 8, 3e-4
SMALL = {"seed-1": (1024, 1), "seed-2": (1024, 2), "wide": (2048, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        os.environ["QWEN_SCOPE_HOME"] = str(work / "home")
        report(work, arguments.images)


def report(work: Path, images: Path) -> None:
    started = time.process_time()
    print(f"{cpu_name()}; held-out texts of the package, cut to {MAX_TOKENS} tokens\n")
    train, test = halves()
    model = qsl.load_model(BASE)
    train_saes(model, train, work)
    tuned = fine_tune(model, train, work)
    stores = {
        "base": store(test, model, GROUP, range(8), work / "stores" / "base"),
        "tuned": store(test, tuned, GROUP, range(8), work / "stores" / "tuned"),
        "other": store(test, OTHER, OTHER_GROUP, [LAYER], work / "stores" / "other"),
        **{
            name: store(test, model, f"local/{name}", [LAYER], work / "stores" / name)
            for name in SMALL
        },
    }
    matchings = match_all(stores)
    save_chart(draw_matchings(matchings), images / "compare-match.svg", height=3.2)
    changes = show_drift(stores, both_fvu(model, tuned, test), work)
    save_chart(draw_drift(changes), images / "compare-drift.svg", height=3.0)
    show_transfer(model, tuned, test)
    print(f"\n{time.process_time() - started:.0f} s of CPU time")


def halves() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    records = [
        {"text": r["text"], "lang": r["lang"], "domain": r["domain"], "key": f"heldout-{n}"}
        for n, r in enumerate(heldout())
        if r["domain"] in ("prose", "chat", "code", "tone", "knowledge")
    ]
    return records[1::2], records[::2]


def train_saes(model: Any, train: Sequence[dict[str, Any]], work: Path) -> None:
    """Three SAEs of one layer, as `local/<name>`: two seeds, and one of twice the width."""
    wanted = {n: v for n, v in SMALL.items() if not (work / "home" / n / "config.json").is_file()}
    if not wanted:
        return
    texts = [record["text"] for record in train]
    got = qsl.capture(model, texts, [LAYER], max_tokens=192, truncate=True)
    data = got.residuals[LAYER][got.keep(LAYER)].numpy()
    for name, (d_sae, seed) in wanted.items():
        tensors = train_layer(data, SAMPLES, d_sae=d_sae, seed=seed)
        folder = work / "home" / name
        folder.mkdir(parents=True, exist_ok=True)
        plain = {key: tensor.detach().float().clone() for key, tensor in tensors.items()}
        torch.save(plain, folder / f"layer{LAYER}.sae.pt")
        settings = {
            "model_type": "topk_sae",
            "base_model": f"qwen-scope-lens/{BASE}",
            "d_model": data.shape[1],
            "d_sae": d_sae,
            "k": 16,
            "num_layers": 8,
            "hook_point": "resid_post",
            "dtype": "float32",
        }
        (folder / "config.json").write_text(json.dumps(settings))
    print(f"trained {', '.join(wanted)} on {len(data):,} tokens, {SAMPLES:,} samples each\n")


def fine_tune(model: Any, train: Sequence[dict[str, Any]], work: Path) -> Any:
    """The base model after some steps on texts of one language. A bridge of its own."""
    path = work / "tuned.pt"
    tokenizer = model.tokenizer
    hf = copy.deepcopy(qsl.load_model(BASE).release())
    hf.name_or_path = hf.config._name_or_path = f"{BASE}, fine-tuned on {TUNE_LANG}"
    if path.is_file():
        hf.load_state_dict(torch.load(path, weights_only=True))
        return qsl.load_model(hf.eval(), tokenizer=tokenizer)
    texts = [r["text"] for r in train if r["lang"] == TUNE_LANG]
    rows = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in texts]
    optimizer = torch.optim.AdamW(hf.parameters(), lr=TUNE_LR, weight_decay=0.01)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(TUNE_STEPS):
        batch = [rows[i] for i in rng.choice(len(rows), TUNE_ROWS, replace=False)]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        labels = ids.masked_fill(mask == 0, -100)
        loss = hf(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    print(
        f"fine-tuned {BASE} on {len(rows)} {TUNE_LANG} texts, {TUNE_STEPS} steps: training loss"
        f" {np.mean(losses[:10]):.2f} -> {np.mean(losses[-10:]):.2f}\n"
    )
    torch.save(hf.state_dict(), path)
    return qsl.load_model(hf.eval(), tokenizer=tokenizer)


def store(
    test: Sequence[dict[str, Any]], model: Any, group: str, layers: Sequence[int], out: Path
) -> FeatureStore:
    return extract(
        test,
        model=model,
        group=group,
        layers=list(layers),
        out=out,
        max_tokens=MAX_TOKENS,
        progress=False,
    )


def match_all(stores: dict[str, FeatureStore]) -> dict[str, Matching]:
    def directions(ref: str) -> torch.Tensor:
        return qsl.load_sae(ref).W_dec

    def by_direction(a: str, b: str) -> Matching:
        return match_decoders(directions(a), directions(b), (a, b))

    def by_activation(a: str, layer_a: int, b: str, layer_b: int) -> Matching:
        common = align(stores[a], layer_a, stores[b], layer_b)
        names = (stores[a].sae(layer_a).ref, stores[b].sae(layer_b).ref)
        return match_activations(common.a, common.b, names, doc=common.doc)

    found = {
        "another seed": by_direction(f"local/seed-1/{LAYER}", f"local/seed-2/{LAYER}"),
        "another seed, by activation": by_activation("seed-1", LAYER, "seed-2", LAYER),
        "twice the width": by_direction(f"local/seed-1/{LAYER}", f"local/wide/{LAYER}"),
        "the layer before": by_direction(f"{GROUP}/{LAYER}", f"{GROUP}/{LAYER - 1}"),
        "the layer before, by activation": by_activation("base", LAYER, "base", LAYER - 1),
        "the other model, by activation": by_activation("base", LAYER, "other", LAYER),
    }
    for name, matching in found.items():
        print(f"== {name}\n{matching.table(3)}\n")
    return found


def draw_matchings(found: dict[str, Matching]) -> Any:
    def draw(axes: Any) -> None:
        for name, one in found.items():
            score = np.sort(one.score)
            [line] = axes.plot(score, np.linspace(1, 0, len(score)), label=name, linewidth=1.3)
            axes.plot(
                one.null,
                np.linspace(1, 0, len(one.null)),
                linestyle=":",
                linewidth=1,
                color=line.get_color(),
            )
        axes.set_xlabel("score of the best partner (dotted: against a shuffled B)")
        axes.set_ylabel("share of features above")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw


def both_fvu(
    model: Any, tuned: Any, test: Sequence[dict[str, Any]]
) -> dict[int, tuple[float, float]]:
    texts = [record["text"] for record in test[::4]]
    saes = {layer: qsl.load_sae(f"{GROUP}/{layer}") for layer in range(8)}
    base, after = (
        fidelity(one, saes, texts, losses=False, max_tokens=MAX_TOKENS) for one in (model, tuned)
    )
    return {layer: (base[layer].fvu, after[layer].fvu) for layer in saes}


def show_drift(
    stores: dict[str, FeatureStore], fvu: dict[int, tuple[float, float]], work: Path
) -> Drift:
    found = drift(stores["base"], stores["tuned"], fvu=fvu)
    print(f"== drift\n{drift_summary(found)}")
    drift_page(found).save(work / "drift.html")
    ranking = rank(stores["base"], [TUNE_LANG], label="lang", layers=LAYER, pool="mean", top=20)
    features = [int(row.ref.rsplit("/", 1)[1]) for row in ranking.rows]
    one = found.layers[LAYER]
    alive = one.rate_base > 0
    ratio = np.log2((one.rate_tuned + 1e-5) / (one.rate_base + 1e-5))
    strength = np.log2((one.strength_tuned + 1e-9) / (one.strength_base + 1e-9))
    both = alive & (one.rate_tuned > 0)
    print(
        f"the {len(features)} best {TUNE_LANG} features of layer {LAYER}: changed"
        f" {one.changed[features].mean():.0%} (all features: {one.changed.mean():.0%});"
        f" median log2 change of rate {np.median(ratio[features]):+.3f}"
        f" (all: {np.median(ratio[alive]):+.3f}), of strength"
        f" {np.median(strength[features]):+.3f} (all: {np.median(strength[both]):+.3f})"
    )
    return found


def draw_drift(found: Drift) -> Any:
    def draw(axes: Any) -> None:
        layers = list(found.layers)
        for kind, colour in (
            ("more", "#c0504d"),
            ("less", "#4a7ebb"),
            ("stronger", "#d99694"),
            ("weaker", "#95b3d7"),
        ):
            counts = [one.count(kind) for one in found.layers.values()]
            axes.plot(layers, counts, "o-", color=colour, label=kind, linewidth=1.2)
        axes.set_xlabel("layer")
        axes.set_ylabel("features that changed")
        axes.legend(loc="upper left")
        overlap = axes.twinx()
        overlap.plot(
            layers,
            [one.overlap for one in found.layers.values()],
            "s--",
            color="#808080",
            linewidth=1,
        )
        overlap.set_ylabel("overlap of active sets (dashed)")
        overlap.set_ylim(0, 1.02)

    return draw


def show_transfer(model: Any, tuned: Any, test: Sequence[dict[str, Any]]) -> None:
    texts = [record["text"] for record in test[::4]]
    saes = {layer: qsl.load_sae(f"{GROUP}/{layer}") for layer in (2, LAYER)}
    models = {
        BASE: model,
        f"fine-tuned on {TUNE_LANG}": tuned,
        "8-bit weights": lambda: rounded(8),
        "4-bit weights": lambda: rounded(4),
        OTHER: lambda: qsl.load_model(OTHER),
    }
    found = transfer(saes, models, texts, name=GROUP, max_tokens=MAX_TOKENS)
    print(f"\n== transfer\n{found.table()}")


def rounded(bits: int) -> Any:
    """The base with every decoder matrix rounded to so many bits, one scale a row."""
    model = qsl.load_model(BASE)
    tokenizer, hf = model.tokenizer, model.release()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim == 2 and ".layers." in name:
                scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                weight.copy_((weight / scale).round() * scale)
    return qsl.load_model(hf.eval(), tokenizer=tokenizer)


if __name__ == "__main__":
    main()
