"""Does the model still say it when only the graph's features are left? And without them?

At every SAE layer of a run, features that fire are removed (or set to their mean) by their decoder
rows; silent features stay silent, and the SAE's error stays as it is in that run. With m for the
target's value, *faithfulness* of a set of features is (m(only these) - m(none)) / (m(model) -
m(none)), and *completeness* is what the model loses without them, (m(model) - m(all but these)) /
(m(model) - m(none)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.errors import BadText, TooLittleData
from qwen_scope_lens.graphs.attribution import open_saes
from qwen_scope_lens.graphs.edges import Target, decompose
from qwen_scope_lens.graphs.frozen import frozen
from qwen_scope_lens.graphs.graph import FeatureGraph
from qwen_scope_lens.models.architecture import Model
from qwen_scope_lens.models.residuals import capture
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.tables import Table, View

__all__ = ["Faithfulness", "faithfulness"]

Ablation = Literal["zero", "mean"]
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROWS = 16
"""How many ablated runs are one batch."""


@dataclass(frozen=True, repr=False)
class Faithfulness(View):
    """The curves of one graph, beside those of random sets of active features.

    A random set has as many features in each layer as the graph's. Of `random`, the mean over the
    draws is kept for each size.
    """

    ablation: Ablation
    sizes: tuple[int, ...]
    faithful: tuple[float, ...]
    complete: tuple[float, ...]
    random_faithful: tuple[float, ...]
    random_complete: tuple[float, ...]
    model: float  # m of the model as it is
    none: float  # m without any feature
    draws: int

    def table(self, most: int | None = None) -> Table:
        """One row per size."""
        names = ("faithfulness", "of random ones", "completeness", "of random ones ")
        columns = (self.faithful, self.random_faithful, self.complete, self.random_complete)
        rows = list(zip(self.sizes, *columns, strict=True))
        return Table.of(
            ("features", *names),
            rows[:most],
            above=(
                f"{self.ablation} ablation: the target is {self.model:.4g} in the model,"
                f" {self.none:.4g} without features; {self.draws} random sets",
            ),
            more=len(rows) - len(rows[:most]),
            formats=dict.fromkeys(names, ".2f"),
        )


def faithfulness(
    model: Model,
    graph: FeatureGraph,
    *,
    ablation: Ablation = "zero",
    sizes: Sequence[int] = SIZES,
    draws: int = 3,
    seed: int = 0,
    reference: Sequence[str] = (),
    saes: Mapping[int, LayerSAE] | None = None,
    sae_folder: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Faithfulness:
    """Run the model with the graph's first features only, and without them, for each size.

    The features stand by influence. `reference` are texts whose mean activations "mean" sets
    features to; without any, the means are those of the graph's own text.
    """
    order = [(node.layer, node.position or 0, node.number or 0) for node in graph.features]
    chosen = sorted({size for size in sizes if size < len(order)} | {len(order)})
    if not order or min(chosen) < 1 or draws < 1:
        raise TooLittleData("the graph has no features to test, or no set of them was asked for")
    if ablation not in ("zero", "mean"):
        raise BadText(f"ablation {ablation!r}: expected zero or mean")
    sae_of = open_saes(find_group(graph.group), sae_folder, device, saes)
    loaded = {layer: sae_of(layer) for layer in graph.layers}
    minus = graph.target_ids[1] if len(graph.target_ids) == 2 else None
    target = Target(graph.target_ids[0], minus, "")
    means = None
    if ablation == "mean":
        texts: list[str | list[int]] = [*reference] or [list(graph.token_ids)]
        means = _means(model, texts, loaded)
    with torch.no_grad(), frozen(model, graph.token_ids, graph.layers, ()) as one:
        active = {layer: decompose(one, layer, sae) for layer, sae in loaded.items()}
        random = np.random.default_rng(seed)
        places = {
            layer: list(zip(*_places(level.values, level.indices), strict=True))
            for layer, level in active.items()
        }
        orders = [order, *(_like(order, places, random) for _ in range(draws))]
        runs = [_Run(0, 0, True)]
        runs += [_Run(o, n, keep) for o in range(len(orders)) for n in chosen for keep in (1, 0)]
        values = [float(target.value(one.logits[None].float())[0])]
        ranks = {layer: _Ranks(orders, layer, sae) for layer, sae in loaded.items()}
        for start in tqdm(range(0, len(runs), ROWS), desc="ablations", disable=not progress):
            some = runs[start : start + ROWS]
            changes = {
                layer: _Ablation(sae, ranks[layer], some, None if means is None else means[layer])
                for layer, sae in loaded.items()
            }
            values += target.value(one.edited(len(some), changes).float()).tolist()
    whole, none, rest = values[0], values[1], np.array(values[2:])
    if whole == none:
        raise TooLittleData("the target is the same without any feature: there is nothing to test")
    shares = ((rest - none) / (whole - none)).reshape(len(orders), len(chosen), 2)
    return Faithfulness(
        ablation=ablation,
        sizes=tuple(chosen),
        faithful=tuple(shares[0, :, 0].tolist()),
        complete=tuple((1 - shares[0, :, 1]).tolist()),
        random_faithful=tuple(shares[1:, :, 0].mean(0).tolist()),
        random_complete=tuple((1 - shares[1:, :, 1]).mean(0).tolist()),
        model=whole,
        none=none,
        draws=draws,
    )


@dataclass(frozen=True)
class _Run:
    order: int  # which order of features
    size: int  # how many of them
    keep: bool | int  # only these are left, or they are removed


class _Ranks:
    """At which place of each order the features of one layer stand."""

    def __init__(
        self, orders: Sequence[Sequence[tuple[int, int, int]]], layer: int, sae: LayerSAE
    ) -> None:
        self.d_sae = sae.cfg.d_sae
        table: dict[int, list[int]] = {}
        for number, order in enumerate(orders):
            for rank, (at_layer, position, feature) in enumerate(order):
                if at_layer == layer:
                    key = position * self.d_sae + feature
                    table.setdefault(key, [_NEVER] * len(orders))[number] = rank
        keys = sorted(table)
        self.keys = torch.tensor(keys, dtype=torch.long)
        self.ranks = torch.tensor([table[key] for key in keys], dtype=torch.long)
        self.ranks = self.ranks.reshape(len(keys), len(orders)).T

    def of(self, codes: SparseCodes, runs: Sequence[_Run]) -> Tensor:
        """Which entries of `codes [rows, T]` are in their run's set. bool `[rows, T, k]`"""
        at = torch.arange(codes.shape[1])[:, None] * self.d_sae
        keys = codes.indices.cpu().long() + at
        if not len(self.keys):
            return torch.zeros(keys.shape, dtype=torch.bool)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        there = self.keys[place] == keys
        inside = [self.ranks[run.order][place[row]] < run.size for row, run in enumerate(runs)]
        return torch.stack(inside) & there & codes.active.cpu()


_NEVER = 2**62


class _Ablation:
    """The change of one layer's residuals, `[rows, T, d_model]`, for a batch of runs."""

    def __init__(
        self, sae: LayerSAE, ranks: _Ranks, runs: Sequence[_Run], means: Tensor | None
    ) -> None:
        self.sae, self.ranks, self.runs, self.means = sae, ranks, runs, means

    def __call__(self, x: Tensor) -> Tensor:
        codes = self.sae.encode_sparse(x.to(self.sae.W_dec.device))
        inside = self.ranks.of(codes, self.runs)
        keep = torch.tensor([bool(run.keep) for run in self.runs])[:, None, None]
        gone = codes.values * torch.where(keep, ~inside, inside).to(codes.values.device)
        if self.means is not None:
            gone = gone - gone.sign() * self.means[codes.indices.long()].to(gone)
        change = self.sae.decode_sparse(SparseCodes(gone, codes.indices, codes.d_sae))
        return x - (change - self.sae.b_dec).to(x)


def _places(values: Tensor, indices: Tensor) -> tuple[list[int], list[int]]:
    at, entry = (values > 0).nonzero(as_tuple=True)
    return at.tolist(), indices[at, entry].tolist()


def _like(
    order: Sequence[tuple[int, int, int]],
    places: Mapping[int, Sequence[tuple[int, int]]],
    random: np.random.Generator,
) -> list[tuple[int, int, int]]:
    """Active features drawn at random, layer for layer like those of an order."""
    drawn = {layer: iter(random.permutation(len(some))) for layer, some in places.items()}
    return [(layer, *places[layer][int(next(drawn[layer]))]) for layer, _, _ in order]


def _means(
    model: Model, texts: Sequence[str | list[int]], saes: Mapping[int, LayerSAE]
) -> dict[int, Tensor]:
    """The mean activation of every feature over all tokens but the first of each text. `[d_sae]`"""
    read = capture(model, texts, list(saes))
    found = {}
    for layer, sae in saes.items():
        keep = ~read.first.to(read.residuals[layer].device)
        rows = read.residuals[layer][keep if bool(keep.any()) else slice(None)]
        codes = sae.encode_sparse(rows.to(sae.W_dec.device))
        total = torch.zeros(sae.cfg.d_sae, device=codes.device)
        total.index_add_(0, codes.indices.long().flatten(), codes.values.float().flatten())
        found[layer] = total / len(rows)
    return found
