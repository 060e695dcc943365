"""Draw the pictures of the explanation pages into docs/images: `python benchmarks/figures.py`.

`certificate.svg` is computed on a token of the toy model, `layers-off.svg` reads
`results/real-verbs.txt`, and the other two are drawings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import qwen_scope_lens as qsl
from qwen_scope_lens.pages import save_chart

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
VIOLET, ORANGE, GREY = "#8577e8", "#d9822b", "#8a8a8a"  # legible on white and on black
TEXT, LAYER, TOKEN, SHOWN = "The kernel reads a file. 内核读取文件。", 6, 5, 44


def certificate(axes: Any) -> None:
    """Approximate scores of one token with the bound of their error, and the line."""
    sae = qsl.load_sae("mini-qwen3/w1k-l0-16/6")
    model = qsl.load_model("mini-qwen3")
    x = qsl.capture(model, [TEXT], layers=[LAYER]).residuals[LAYER].float()
    weights, bias = sae.W_enc.detach().float(), sae.b_enc.detach().float()
    centre = x.median(0).values
    rest, rows = (x - centre)[TOKEN], weights.T
    half_rest, half_rows = rest.bfloat16().float(), rows.bfloat16().float()
    scores = half_rows @ half_rest + centre @ weights + bias
    bound = (rest - half_rest).norm() * half_rows.norm(dim=1) + rest.norm() * (
        rows - half_rows
    ).norm(dim=1)
    k = sae.cfg.k
    line = (scores - bound).topk(k).values[-1].item()
    order = scores.argsort(descending=True)[:SHOWN]
    for place, feature in enumerate(order.tolist()):
        score, error = scores[feature].item(), bound[feature].item()
        colour = VIOLET if score + error >= line else GREY
        axes.errorbar(place, score, yerr=error, fmt="o", markersize=3, color=colour, capsize=2)
    candidates = int((scores + bound >= line).sum())
    axes.axhline(line, color=ORANGE, linewidth=1)
    axes.text(
        SHOWN - 0.5, line, f"the {k}th largest lower bound", color=ORANGE, ha="right", va="bottom"
    )
    axes.set_xlabel(
        f"features by approximate score; {candidates} candidates of {len(scores)} above the line"
    )
    axes.set_ylabel("score")
    axes.set_xticks([])


def layers_off(axes: Any) -> None:
    """FVU of each SAE of the real model one layer below, on its layer and one above."""
    text = (HERE / "results" / "real-verbs.txt").read_text(encoding="utf-8")
    rows = [
        (int(found[1]), int(found[2]), float(found[3]))
        for found in re.finditer(r"^ *(\d+) +(\d+) +(\d\.\d+)", text, re.MULTILINE)
    ]
    for sae in sorted({row[0] for row in rows}):
        values = {
            layer - sae: fvu for own, layer, fvu in rows if own == sae and abs(layer - sae) <= 1
        }
        offsets = sorted(values)
        axes.plot(
            offsets, [values[offset] for offset in offsets], marker="o", label=f"SAE of layer {sae}"
        )
    axes.set_xticks([-1, 0, 1], ["one layer below", "its own layer", "one layer above"])
    axes.set_ylim(0, 0.5)
    axes.set_ylabel("FVU")
    axes.legend(fontsize=9)


def on_disk(axes: Any) -> None:
    """The same pairs, in the order of tokens and in the order of features."""
    pairs = [(0, 7, 2.1), (0, 3, 0.9), (1, 3, 1.4), (1, 5, 0.6), (2, 7, 3.0), (2, 5, 1.1)]
    tables = (
        (0.0, "by token", "indices.npy, values.npy", sorted(pairs)),
        (5.2, "by feature", "features.parquet", sorted(pairs, key=lambda pair: pair[1])),
    )
    for left, title, files, rows in tables:
        axes.text(left + 1.9, 7.7, title, ha="center", weight="bold")
        axes.text(left + 1.9, 7.1, files, ha="center", fontsize=9)
        for x, head in zip((0.6, 1.9, 3.2), ("token", "feature", "value"), strict=True):
            axes.text(left + x, 6.4, head, ha="center", fontsize=9)
        for down, (token, feature, value) in enumerate(rows):
            key = token if left == 0 else feature
            colour = {0: VIOLET, 1: ORANGE, 2: GREY, 3: VIOLET, 5: ORANGE, 7: GREY}[key]
            for x, cell in zip((0.6, 1.9, 3.2), (token, feature, value), strict=True):
                axes.text(left + x, 5.6 - down, str(cell), ha="center", color=colour)
    axes.annotate("", (5.0, 3.2), (3.9, 3.2), arrowprops={"arrowstyle": "<->", "color": GREY})
    axes.set(xlim=(0, 9.2), ylim=(0, 8.2))
    axes.axis("off")


def steering(axes: Any) -> None:
    """What each operation makes of a feature's activation, for tokens with different ones."""
    before = torch.linspace(0, 4, 200)
    fires = before > 0.8  # below, the feature is not among the k
    before = torch.where(fires, before, torch.zeros(()))
    x = torch.linspace(0, 4, 200)
    for label, after, style in (
        ("as it is", before, {"color": GREY, "linewidth": 4, "alpha": 0.5}),
        ("add 1", before + 1, {"color": VIOLET}),
        ("set 2", torch.full_like(before, 2), {"color": ORANGE}),
        ("cap 1.5", before.clamp(max=1.5), {"color": "#3a9d6e", "linestyle": "--"}),
        ("ablate", torch.zeros_like(before), {"color": "#c0504d", "linestyle": ":"}),
    ):
        axes.plot(x, after, label=label, **style)
    axes.set_xlabel("the feature's score on a token (below 0.8 others are among the k)")
    axes.set_ylabel("what the residual has of it")
    axes.legend(fontsize=9)


FIGURES = {
    "certificate.svg": certificate,
    "layers-off.svg": layers_off,
    "on-disk.svg": on_disk,
    "steering.svg": steering,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        print(save_chart(draw, IMAGES / name))
