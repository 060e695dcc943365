"""The stages of `toxicity` (section 5): rules over features in many languages.

All languages are in one store, so each SAE is loaded once. The layers' rules, the transfer and the
overlap are those of `classify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from qwen_scope_lens.classify.estimator import FeatureRuleClassifier
from qwen_scope_lens.classify.experiments import best_test_layer, by_layer, overlap_pairs
from qwen_scope_lens.classify.experiments import (
    efficiency as less_data,
)
from qwen_scope_lens.classify.methods import Documents, Method, RuleMethod
from qwen_scope_lens.classify.scores import macro, scored
from qwen_scope_lens.classify.task import Task, by_language, documents_of
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.features.document_sets import held_out_texts
from qwen_scope_lens.files import whole_file, write_rows
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.recipes.data import text_rows
from qwen_scope_lens.recipes.engine import Work
from qwen_scope_lens.recipes.toxicity_baselines import baselines_f1, interval, learners, less
from qwen_scope_lens.stores.corpus import read_corpus
from qwen_scope_lens.stores.extract import extract
from qwen_scope_lens.stores.reread import StoreReader
from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["across", "draw", "efficiency", "features", "residuals", "rules", "texts"]

TASK = Task("toxic")
PART = 1024
"""So many texts are read again at a time; a stage that was stopped goes on behind the last."""


def texts(work: Work) -> Mapping[str, Any]:
    """One file of all languages: as many texts of each class, and a split into two sets."""
    label, values, split_by = work["label"], work["toxic_values"], work["split_by"]
    rng = np.random.default_rng(work["seed"])
    rows: list[dict[str, Any]] = []
    for name in work["languages"]:
        found = text_rows(work, name, label, *([split_by] if split_by else []))
        for toxic in (True, False):
            mine = [row for row in found if (row[label] in values) == toxic]
            least = min(work["per_class"], len(mine))
            if least < 5:
                raise TooLittleData(
                    f"source {name} has {len(mine)} {'toxic' if toxic else 'clean'} texts by"
                    f" {label} in {values}: are these its values?"
                )
            for i in np.sort(rng.choice(len(mine), least, replace=False)):
                group = f"{name} {mine[i][split_by]}" if split_by else mine[i]["text"]
                rows.append({**_row(mine[i], name, toxic), "group": group})
    kind = np.unique([f"{r['language']} {r['toxic']}" for r in rows], return_inverse=True)[1]
    test = held_out_texts([r["group"] for r in rows], kind, work["test_share"], work["seed"])
    for row, held in zip(rows, test.tolist(), strict=True):
        row["set"] = "test" if held else "discovery"
        del row["group"]
    found_sides = {(r["language"], r["toxic"], r["set"]) for r in rows}
    for name, toxic, side in product(work["languages"], (True, False), ("discovery", "test")):
        if (name, toxic, side) not in found_sides:
            raise TooLittleData(
                f"source {name} has no {'toxic' if toxic else 'clean'} text for {side}, because"
                f" texts that belong together stay on one side (split_by is {split_by}): give more"
                " different texts, or another test_share"
            )
    keyed = ({"key": str(number), **row} for number, row in enumerate(rows))
    write_rows(work.path("texts", "texts.jsonl"), keyed)
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        of_language = counts.setdefault(row["language"], {})
        cell = f"{row['set']}, {'toxic' if row['toxic'] else 'clean'}"
        of_language[cell] = of_language.get(cell, 0) + 1
    return {"counts": counts}


def features(work: Work) -> Mapping[str, Any]:
    """All texts through the model once, with every layer of the recipe."""
    corpus = read_corpus(work.path("texts", "texts.jsonl"), text="text")
    layers = work.layers
    store = extract(
        corpus,
        model=work.model(up_to_layer=max(layers)),
        group=work["sae"],
        layers=layers,
        out=work.folder,
        max_tokens=work["max_tokens"],
        sae_revision=work["sae_revision"],
        progress=not work.is_smoke,
        **work.options,
    )
    return {"model": store.manifest.model, "tokens": store.n_tokens, "layers": store.layers}


def residuals(work: Work) -> Mapping[str, Any]:
    """Mean residuals of every text and layer; the model reads the texts again, part by part."""
    work.result("features")
    if not work["residuals"]:
        return {"layers": []}
    store = FeatureStore.open(work.path("features"))
    texts = store.documents(["text"])["text"].to_pylist()
    reading, model = StoreReader.of(store), work.model(up_to_layer=max(work.layers))
    for number, start in enumerate(range(0, len(texts), PART)):
        path = work.path("residuals", f"{number:05}.npz")
        if not path.exists():
            some = reading.document_residuals(model, texts[start : start + PART])
            arrays: dict[str, Any] = {str(layer): x for layer, x in some.items()}
            with whole_file(path) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
    return {"layers": list(reading.layers)}


def rules(work: Work) -> Mapping[str, Any]:
    """F1 of the OR rule by language, layer and K, with and without first tokens; baselines."""
    table, english = {}, {}
    chosen: dict[str, dict[str, Any]] = {}
    for kept, name in ((True, "first token left out"), (False, "first token counted")):
        discovery, test = _documents(work, keep=kept)
        cells = {
            language: {str(k): by_layer(known, test[language], {"top_k": k}) for k in work["top_k"]}
            for language, known in discovery.items()
        }
        table[name] = {
            language: {
                k: [{"layer": r.layer, "d": r.d, "f1": r.test.f1} for r in rows]
                for k, rows in by_k.items()
            }
            for language, by_k in cells.items()
        }
        chosen[name] = {}
        for k in work["top_k"]:
            decisions = []
            for language, known in discovery.items():
                clf = FeatureRuleClassifier(top_k=k).fit(known.pooled, known.truth)
                decisions.append((clf.predict(test[language].pooled), test[language].truth))
            chosen[name][str(k)] = macro(decisions)
        first = next(iter(discovery))
        best = max(
            (best_test_layer(rows) for rows in cells[first].values()), key=lambda row: row.test.f1
        )
        top = max(cells[first]["2" if "2" in cells[first] else str(work["top_k"][0])], key=_by_d)
        english[name] = {
            "best": {"value": best.test.f1, "low": best.test.low, "high": best.test.high},
            "best layer": best.layer,
            "top1-diff": {"value": top.test.f1, "low": top.test.low, "high": top.test.high},
            "top1-diff layer": top.layer,
        }
    return {
        "table": table,
        "chosen": chosen,
        "first": english["first token left out"],
        "first_counted": english["first token counted"],
        "several layers": _several(work),
        "baselines": baselines_f1(*_documents(work, means=True)) if work["baselines"] else {},
    }


def across(work: Work) -> Mapping[str, Any]:
    """The first language's rule of every layer on all others; Jaccard of best features.

    Of the baselines and of the rule whose layer is chosen on discovery texts, F1 has an interval.
    """
    discovery, test = _documents(work, means=True)
    first = next(iter(discovery))
    known = discovery[first]
    every = FeatureRuleClassifier.of_every_layer(
        known.pooled, known.truth, {"top_k": work["transfer_k"]}
    )
    f1 = {
        language: {
            layer: scored(clf.predict(part.pooled), part.truth).f1 for layer, clf in every.items()
        }
        for language, part in test.items()
    }
    methods: list[Method] = [RuleMethod("the rule", {"top_k": work["transfer_k"]})]
    methods += learners(known) if work["baselines"] else []
    fitted = [method.fit(known) for method in methods]
    chosen = {
        method.name: {
            language: interval(scored(method.score(part) > 0, part.truth))
            for language, part in test.items()
        }
        for method in fitted
    }
    jaccard = overlap_pairs(discovery, work["overlap_top"]) if len(discovery) > 1 else {}
    return {
        "from": first,
        "f1": f1,
        "chosen": chosen,
        "jaccard": jaccard,
        "languages": list(discovery),
    }


def efficiency(work: Work) -> Mapping[str, Any]:
    """The mean over languages of the best layer's F1, with shares of the discovery texts.

    Of the baselines, the same with `baseline_share` of them and with all, layers chosen on these.
    """
    discovery, test = _documents(work, means=True)
    rows = {
        language: less_data(
            known,
            test[language],
            {"top_k": work["transfer_k"]},
            work["shares"],
            work["draws"],
            work["seed"],
            best_layer=True,
        )
        for language, known in discovery.items()
    }
    full = float(np.mean([mine[-1].f1 for mine in rows.values()]))
    found = {}
    for i, share in enumerate(work["shares"]):
        parts = [mine[i] for mine in rows.values()]
        means = [
            float(np.mean([getattr(p, what) for p in parts])) for what in ("f1", "low", "high")
        ]
        found[f"{share:.0%}"] = {
            "f1": means[0],
            "of full": {
                "value": means[0] / max(full, 1e-12),
                "low": means[1] / max(full, 1e-12),
                "high": means[2] / max(full, 1e-12),
            },
            "texts": int(np.mean([p.n for p in parts])),
        }
    draws = [int(work["seed"]) + draw for draw in range(work["draws"])]
    others = less(discovery, test, work["baseline_share"], draws) if work["baselines"] else {}
    return {"shares": found, "baselines": others}


def _row(row: Mapping[str, Any], language: str, toxic: bool) -> dict[str, Any]:
    return {"text": row["text"], "language": language, "toxic": toxic}


def _by_d(row: Any) -> tuple[float, int]:
    return row.d, -row.layer


def _documents(
    work: Work, keep: bool = True, means: bool = False
) -> tuple[dict[str, Documents], dict[str, Documents]]:
    """Discovery and test documents of every language, in the recipe's order.

    `means` adds mean residuals, if the recipe has them.
    """
    work.result("features")
    store = FeatureStore.open(work.path("features"))
    documents = documents_of(store, TASK, language="language", keep=keep)
    if means and (layers := work.result("residuals")["layers"]):
        parts_of = [np.load(path) for path in sorted(work.path("residuals").glob("*.npz"))]
        rows = {n: np.concatenate([part[str(n)] for part in parts_of]) for n in layers}
        documents = replace(documents, residuals=rows)
    sets = store.labels("set")
    parts = []
    for name in ("discovery", "test"):
        found = by_language(documents.take(sets == name))
        parts.append({language: found[language] for language in work["languages"]})
    return parts[0], parts[1]


def _several(work: Work) -> Mapping[str, Any]:
    """The paper's multi-layer rule: one best feature from each of the m best layers."""
    discovery, test = _documents(work)
    found = {}
    for m in work["several_layers"]:
        decisions = []
        for language, known in discovery.items():
            clf = FeatureRuleClassifier(top_k=1, n_layers=m).fit(known.pooled, known.truth)
            decisions.append((clf.predict(test[language].pooled), test[language].truth))
        found[str(m)] = macro(decisions)
    return found


def draw(page: Page, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The part of the page that only this recipe has."""
    found, across, less = results["rules"], results["across"], results["efficiency"]["shares"]
    counts = results["texts"]["counts"]
    columns = sorted({cell for mine in counts.values() for cell in mine})
    page.heading("Texts")
    page.table(
        ("language", *columns),
        [(name, *(mine.get(cell, 0) for cell in columns)) for name, mine in counts.items()],
    )
    page.heading("F1 on test, mean over languages")
    rows = [
        (f"OR, K = {k}, layer of the largest difference, {name}", *_triple(value))
        for name, by_k in found["chosen"].items()
        for k, value in by_k.items()
    ]
    rows += [
        (f"OR, one feature from each of {m} layers", *_triple(value))
        for m, value in found["several layers"].items()
    ]
    rows += [(f"{name} (not in the paper)", *_triple(v)) for name, v in found["baselines"].items()]
    page.table(("method", "F1", "from", "to"), rows)
    page.heading("Layer by layer")
    table = found["table"]["first token left out"]
    for k in next(iter(table.values())):
        curves = {name: {r["layer"]: r["f1"] for r in by_k[k]} for name, by_k in table.items()}
        page.figure(chart(partial(_curves, curves)), f"F1 on test, OR rule, K = {k}")
    first = across["from"]
    curves = {name: {int(n): v for n, v in mine.items()} for name, mine in across["f1"].items()}
    page.figure(
        chart(partial(_curves, curves)), f"Transfer: the rules of {first}, unchanged, elsewhere"
    )
    page.table(
        (f"fitted on {first}", "tested on", "F1", "from", "to"),
        [
            (name, language, *_triple(value))
            for name, mine in across["chosen"].items()
            for language, value in mine.items()
        ],
    )
    for layer in _some(list(across["jaccard"])):
        page.figure(
            chart(
                partial(_heat, across["languages"], np.array(across["jaccard"][layer])), 4.6, 3.8
            ),
            f"Layer {layer}: Jaccard index of the languages' best features",
        )
    page.heading("Less discovery data")
    page.table(
        ("share", "texts per language", "F1 of the best layer", "of full", "from", "to"),
        [(n, row["texts"], row["f1"], *_triple(row["of full"])) for n, row in less.items()],
    )
    if others := results["efficiency"]["baselines"]:
        page.text("The same share of the texts for the baselines, layers chosen on those texts:")
        page.table(
            ("baseline", "F1", "with all texts", "of full", "from", "to"),
            [(n, r["f1"], r["all"], *_triple(r["of full"])) for n, r in others.items()],
        )


def _triple(value: Mapping[str, float]) -> tuple[float, float, float]:
    return value["value"], value["low"], value["high"]


def _some(layers: Sequence[str], most: int = 4) -> list[str]:
    """At most so many layers, evenly spread."""
    at = np.unique(np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int))
    return [layers[i] for i in at] if layers else []


def _curves(curves: Mapping[str, Mapping[int, float]], axes: Any) -> None:
    for number, (name, mine) in enumerate(curves.items()):
        style = ("-", "--")[number // 10 % 2]
        axes.plot(list(mine), list(mine.values()), style, color=f"C{number % 10}", lw=1, label=name)
    axes.set(xlabel="layer", ylabel="F1", ylim=(0, 1.02))
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _heat(names: Sequence[str], table: np.ndarray, axes: Any) -> None:
    mesh = axes.pcolormesh(table[::-1], vmin=0, vmax=1, cmap="viridis", edgecolors="none")
    ticks = np.arange(len(names)) + 0.5
    axes.set_xticks(ticks, names, fontsize=7)
    axes.set_yticks(ticks, names[::-1], fontsize=7)
    axes.figure.colorbar(mesh, ax=axes, shrink=0.7)
