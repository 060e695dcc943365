"""The stages of `bench-redundancy`, `bench-overlap` and `bench-mmlu-pro` (section 4 of the paper).

All three read footprints at the last token of each prompt and compare them with the results of a
panel of models. Correlations are given as the paper defines them and, as the primary endpoint, with
every benchmark cut to the items of the smallest one. Benchmarks on which the panel's accuracies
hardly differ are left out of correlations by a rule that the recipe fixes (`least_spread`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from qwen_scope_lens.bench.analysis import performance, rank_check
from qwen_scope_lens.bench.correlation import correlate
from qwen_scope_lens.bench.coverage import redundancy
from qwen_scope_lens.bench.equal_size import equal_overlap, equal_redundancy, spread_enough
from qwen_scope_lens.bench.footprint import Footprint, saturated
from qwen_scope_lens.bench.overlap import overlap_matrix
from qwen_scope_lens.bench.panel import Agreement, Scores, agreement
from qwen_scope_lens.bench.panel_files import read_panel
from qwen_scope_lens.bench.prompts import (
    PromptFormat,
    prompts_of,
    read_prompts,
    sampled,
    task_prompts,
)
from qwen_scope_lens.bench.suite import extract_suite, open_suite
from qwen_scope_lens.errors import BadCorpus, TooLittleData
from qwen_scope_lens.files import write_rows
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.recipes.data import local_file, rows_of
from qwen_scope_lens.recipes.engine import Work
from qwen_scope_lens.stores.corpus import Document

__all__ = ["draw", "footprints", "measure", "prompts"]

BY_LOT = "by lot"


def prompts(work: Work) -> Mapping[str, Any]:
    """Render the items of every benchmark, and keep those that the panel has answered."""
    found: dict[str, list[Document]] = {}
    for name in work["benchmarks"]:
        for part, documents in _benchmark(work, name).items():
            if part in found:
                raise BadCorpus(f"two benchmarks are called {part}: rename one of the sources")
            found[part] = documents
    drawn = {name: len(documents) for name, documents in found.items()}
    notes: list[str] = []
    scores = _panel(work, {n: [d.key for d in ds] for n, ds in found.items()}, notes)
    if scores is not None and scores.items:
        scored = {name: set(items) for name, items in scores.items.items()}
        found = {
            name: [d for d in ds if {d.key, d.key.rpartition("/")[0]} & scored[name]]
            for name, ds in found.items()
        }
    for line in notes:
        work.say(line)
    for name, documents in found.items():
        rows = ({"key": d.key, "prompt": d.text} for d in documents)
        write_rows(work.path("prompts", f"{name}.jsonl"), rows)
    items = {name: len(documents) for name, documents in found.items()}
    return {"items": items, "rendered": drawn, "left out": notes}


def footprints(work: Work) -> Mapping[str, Any]:
    """The features of the last token of every prompt, in every layer of the recipe."""
    how = PromptFormat(column="prompt", chat=work["chat"])
    names = work.result("prompts")["items"]
    documents = {
        name: list(read_prompts(work.path("prompts", f"{name}.jsonl"), how)) for name in names
    }
    layers = work.layers
    suite = extract_suite(
        documents,
        work.model(up_to_layer=layers[-1]),
        work["sae"],
        layers,
        out=work.folder,
        say=work.say,
        last_token=True,
        enable_thinking=work["thinking"],
        add_generation_prompt=work["chat"],
        sae_revision=work["sae_revision"],
        progress=not work.is_smoke,
        **work.options,
    )
    manifest = suite.benchmarks[0].store.manifest
    return {"layers": suite.layers, "model": manifest.model, "saes": manifest.saes}


def measure(work: Work) -> Mapping[str, Any]:
    """R, R-hat, overlap, and their correlations with the panel's results, in every layer."""
    layers = work.result("footprints")["layers"]
    suite = open_suite(work.path("footprints"))
    if work["layer"] not in layers:
        raise TooLittleData(
            f"layer {work['layer']} was not extracted, only {layers}: --set layer={layers[-1]}"
        )
    keys = suite.keys()
    scores = _panel(work, keys, [])
    if scores is not None:
        scores = scores.matched(keys) if scores.results else scores
    control, draws, resamples, truths = work["control"], work["draws"], work["resamples"], {}
    used, left_out = list(suite.names), []
    if scores is not None:
        good, at_floor = spread_enough(scores.only(suite.names), work["least_spread"])
        used, left_out = [n for n in suite.names if n in good], at_floor
        work.say("R of every benchmark")
        truths = {
            name: agreement(name, scores.results[name], draws=draws, seed=work["seed"])
            for name in scores.results
            if name in used
        }
    curve = {}
    for layer in layers:
        work.say(f"layer {layer}")
        every = suite.footprints(layer)
        chosen = [f for f in every if f.name in used]
        curve[layer] = _at_layer(
            every, chosen, scores, truths, control, draws, resamples, work["seed"]
        )
    spread = {} if scores is None else dict(zip(scores.benchmarks, scores.table.T, strict=True))
    rows = [
        {
            **row,
            "r": truths[row["name"]].r if row["name"] in truths else None,
            "accuracy": [float(f(spread[row["name"]])) for f in (np.min, np.max, np.std)]
            if row["name"] in spread
            else None,
        }
        for row in curve[work["layer"]].pop("rows")
    ]
    return {
        "layer": work["layer"],
        "models": [] if scores is None else scores.models,
        "benchmarks": rows,
        "at floor": left_out,
        **curve[work["layer"]],
        "layers": {
            layer: {name: found.get(name) for name in ("redundancy", "pairs")}
            for layer, found in curve.items()
        },
    }


def _benchmark(work: Work, name: str) -> dict[str, list[Document]]:
    """The prompts of one source: one benchmark, or with `by` one for each value of a column."""
    source, limit, seed = work.source(name), work["limit"], work["seed"]
    if "task" in source and local_file(work, name) is None:
        [documents] = task_prompts(
            [source["task"]], None, source.get("fewshot"), limit, None, seed
        ).values()
        return {name: documents}
    rows = list(rows_of(work, name))
    parts: dict[str, list[tuple[str, Any]]] = {}
    for where, row in rows:
        part = name if "by" not in source else str(row.get(source["by"])).replace(" ", "-")
        parts.setdefault(part, []).append((where, row))
    how = PromptFormat(source.get("column"), source.get("template"))
    found = {}
    for part, mine in parts.items():
        chosen = [mine[i] for i in sampled(len(mine), limit, seed)]
        found[part] = list(prompts_of(chosen, how, part))
    return found


def _panel(work: Work, keys: Mapping[str, Sequence[str]], notes: list[str]) -> Scores | None:
    """The panel's results on these items; None where the recipe has no panel."""
    if work["panel"] is None:
        return None
    if work["panel"] == BY_LOT:
        return _by_lot(keys, work["seed"])
    path = local_file(work, work["panel"])
    if path is None:
        raise BadCorpus(
            f"the panel's results ({work['panel']}) are a file: pass --data FOLDER, or go without"
            " them with --set panel=null"
        )
    return read_panel(path, keys, work["most_missing"], notes.append)


def _by_lot(keys: Mapping[str, Sequence[str]], seed: int, models: int = 8) -> Scores:
    """A made-up panel for smoke runs: model i is right with chance (i + 1) / (models + 1)."""
    rng = np.random.default_rng(seed)
    skill = np.arange(1, models + 1)[:, None] / (models + 1)
    table = {
        name: (rng.random((models, len(mine))) < skill).astype(float) for name, mine in keys.items()
    }
    means = np.stack([part.mean(1) for part in table.values()], axis=1)
    items = {name: tuple(mine) for name, mine in keys.items()}
    named = tuple(f"made up {i}" for i in range(models))
    return Scores(named, tuple(table), means, table, items)


def _at_layer(
    every: Sequence[Footprint],
    used: Sequence[Footprint],
    scores: Scores | None,
    truths: Mapping[str, Agreement],
    control: str | None,
    draws: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The findings at one layer: a row per benchmark, and the correlations over benchmarks."""
    rows = {f.name: redundancy(f, draws, seed) for f in every}
    overlaps = overlap_matrix(every)
    names = [f.name for f in every]
    found: dict[str, Any] = {
        "rows": [
            {
                "name": f.name,
                "items": len(f),
                "features": f.size,
                "share": f.share,
                "r_hat": rows[f.name].r_hat,
            }
            for f in every
        ],
        "overlap": {
            a: {b: float(overlaps[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)
        },
        "warnings": saturated(every),
    }
    if scores is None:
        return found
    ranked = [f for f in used if f.name in truths]
    if len(ranked) >= 3:
        mine = [rows[f.name] for f in ranked]
        check = rank_check(mine, [truths[f.name] for f in ranked], resamples)
        r = np.array([truths[f.name].r.value for f in ranked])
        logs = correlate(r, np.log([row.r_hat.value for row in mine]), seed, resamples)
        equal = equal_redundancy(ranked, scores, seed=seed, resamples=resamples)
        found["redundancy"] = {
            "benchmarks": len(ranked),
            "spearman": check.spearman,
            "log_pearson": logs[0],
            "given_size": check.given_size,
            "by_size": check.by_size,
            "equal": equal,
        }
    pairs = [f for f in used if f.name != control]
    if len(pairs) >= 3:
        shown = performance(pairs, scores, control, resamples)
        column = scores.only([control]).table[:, 0] if control is not None else None
        found["pairs"] = {
            "count": shown.raw.n_pairs,
            "raw": shown.raw,
            "partial": shown.partial,
            "equal": equal_overlap(pairs, scores, seed=seed, resamples=resamples),
            "equal_partial": None
            if column is None
            else equal_overlap(pairs, scores, column, seed=seed, resamples=resamples),
            "overlap_min": overlap_matrix(pairs, smallest=True).tolist(),
            "similarity": shown.similarity.tolist(),
        }
    return found


def draw(page: Page, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The part of the page that only these recipes have."""
    found = results["measure"]
    for line in (*found["warnings"], *results["prompts"]["left out"]):
        page.text(line)
    if found["at floor"]:
        page.text(
            f"Left out of correlations, because the panel's accuracies hardly differ there:"
            f" {', '.join(found['at floor'])}."
        )
    page.heading(f"Benchmarks at layer {found['layer']}")
    page.table(
        ("benchmark", "items", "features", "of dictionary", "accuracy from", "to", "R", "R-hat"),
        [
            (
                row["name"],
                row["items"],
                row["features"],
                row["share"],
                *((row["accuracy"] or [None, None])[:2]),
                _shown(row["r"]),
                _shown(row["r_hat"]),
            )
            for row in found["benchmarks"]
        ],
    )
    if "redundancy" in found:
        known = [row for row in found["benchmarks"] if row["r"]]
        equal = found["redundancy"]["equal"]
        page.figure(
            chart(partial(_scatter, known, equal), 8.5, 4.0),
            "R-hat against R. Hollow points: all items. Full points: every benchmark cut to"
            f" {equal['items']:,} items, which is the primary endpoint.",
        )
    names = [row["name"] for row in found["benchmarks"]]
    table = np.array([[found["overlap"][a][b] for b in names] for a in names])
    size = max(3.4, 0.34 * len(names) + 2.2)
    page.figure(
        chart(partial(_heat, names, table), size + 0.8, size),
        "Overlap (equation 10): the share of the row's footprint that the column covers",
    )
    if len(found["layers"]) > 1:
        page.heading("Layer by layer")
        page.text("The paper does not say which layer it used. The Spearman correlations by layer:")
        page.figure(chart(partial(_layers, found["layers"])), "Shaded: 95% intervals")


def _shown(interval: Mapping[str, float | None] | None) -> str | None:
    if interval is None:
        return None
    parts = [interval[key] for key in ("value", "low", "high")]
    value, low, high = ("–" if part is None else f"{part:.3f}" for part in parts)
    return f"{value} [{low}, {high}]"


def _scatter(rows: Sequence[Mapping[str, Any]], equal: Mapping[str, Any], axes: Any) -> None:
    axes.scatter(
        [row["r_hat"]["value"] for row in rows],
        [row["r"]["value"] for row in rows],
        s=16,
        facecolors="none",
        edgecolors="C0",
    )
    axes.scatter(equal["r_hat"], equal["r"], s=16, color="C0")
    for name, x, y in zip(equal["names"], equal["r_hat"], equal["r"], strict=True):
        axes.annotate(name, (x, y), fontsize=6, xytext=(3, 2), textcoords="offset points")
    axes.set(xlabel="R-hat, from footprints", ylabel="R, from the panel", xscale="log")


def _heat(names: Sequence[str], table: np.ndarray, axes: Any) -> None:
    mesh = axes.pcolormesh(table[::-1], vmin=0, vmax=1, cmap="viridis", edgecolors="none")
    ticks = np.arange(len(names)) + 0.5
    axes.set_xticks(ticks, names, rotation=90, fontsize=7)
    axes.set_yticks(ticks, names[::-1], fontsize=7)
    axes.figure.colorbar(mesh, ax=axes, shrink=0.7)


CURVES = {
    "R and R-hat": ("redundancy", "spearman"),
    "the same at equal size": ("redundancy", "equal", "spearman"),
    "overlap and scores": ("pairs", "raw", "spearman"),
    "the same at equal size, control held fixed": ("pairs", "equal_partial", "spearman"),
}


def _layers(by_layer: Mapping[str, Any], axes: Any) -> None:
    for number, (label, path) in enumerate(CURVES.items()):
        points = []
        for layer, found in by_layer.items():
            value: Any = found
            for key in path:
                value = None if value is None else value.get(key)
            if value is not None and None not in value.values():
                points.append((int(layer), value["value"], value["low"], value["high"]))
        if points:
            x, y, low, high = zip(*sorted(points), strict=True)
            axes.plot(x, y, "o-", ms=3, lw=1.2, color=f"C{number}", label=label)
            axes.fill_between(x, low, high, color=f"C{number}", alpha=0.1, lw=0)
    axes.axhline(0, color="#888888", lw=0.6)
    axes.set(xlabel="layer", ylabel="Spearman", ylim=(-1.05, 1.05))
    axes.legend(fontsize=7)
