"""Show reports and experiments as text for the terminal and as one HTML page.

The numbers are computed in `comparison.py` and `experiments.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qwen_scope_lens.classify.comparison import Report
from qwen_scope_lens.classify.estimator import FeatureRuleClassifier
from qwen_scope_lens.classify.experiments import Efficiency, LayerRow, Overlap, Transfer
from qwen_scope_lens.classify.methods import Documents, name_of
from qwen_scope_lens.classify.scores import scored
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.tables import Table

__all__ = [
    "efficiency_table",
    "fit_facts",
    "fit_text",
    "layer_table",
    "overlap_table",
    "report_page",
    "report_text",
    "transfer_table",
]

METHODS = ("method", "F1", "95%", "precision", "recall", "F1 minus the first's", "95% of it")
EXCERPT = 90


def report_text(report: Report) -> str:
    """The whole report as text for a terminal."""
    parts = [
        f"{report.described}\n" if report.described else "",
        f"{report.n_discovery:,} discovery documents, {report.n_test:,} test documents"
        f" ({_share_positive(report)} positive). All numbers are of the test documents; intervals"
        " hold 95% of resamples.\n",
        _text(METHODS, _method_rows(report)),
        f"\nAt {report.at} (fitted on two thirds of the discovery documents, cut set on the rest):",
        _text(("method", "precision", "recall", "called positive"), _point_rows(report)),
    ]
    if report.languages:
        parts += ["\nF1 by language:", _text(("method", *report.languages), _languages(report))]
    parts += [
        "\nWith more features (F1, and precision and recall of the OR rule):",
        _text(_growth_head(report), _growth_rows(report)),
        "\nThe rule's features, and the difference of their firing rates:",
        _text(("feature", "Δ"), report.features),
        "\nLargest Δ of each layer:",
        _text(("layer", "d"), [(str(n), d) for n, d in report.layers.items()]),
        "\nErrors, most extreme scores first:",
    ]
    for error in report.errors:
        head = "missed     " if error.truth else "false alarm"
        why = "; ".join(error.features)
        where = f" [{error.language}]" if error.language else ""
        parts.append(f"  {head} doc {error.doc}{where}: {_excerpt(error.text)}")
        parts.append(f"              {why or 'no feature of the rule fires'}")
    if not report.errors:
        parts.append("  none")
    return "\n".join(part for part in parts if part)


def report_page(report: Report, title: str = "Feature classifier") -> Page:
    """The whole report as a page, with a chart of F1 over the number of features."""
    page = Page(title)
    if report.described:
        page.text(report.described)
    page.text(
        f"{report.n_discovery:,} discovery documents, {report.n_test:,} test documents"
        f" ({_share_positive(report)} positive). All numbers are of the test documents; intervals"
        " hold 95% of resamples."
    )
    page.heading("All methods on the same documents").table(METHODS, _method_rows(report))
    page.heading(f"At {report.at}")
    page.text(
        "Each method is fitted on two thirds of the discovery documents, and its cut is set on the"
        " rest.",
        quiet=True,
    )
    page.table(("method", "precision", "recall", "called positive"), _point_rows(report))
    if report.languages:
        page.heading("F1 by language")
        page.table(("method", *report.languages), _languages(report))
    page.heading("With more features")
    page.figure(
        chart(lambda axes: _draw_growth(axes, report)),
        "F1 on test by the number of features. Bands hold 95% of resamples. Dotted: always yes.",
    )
    page.table(_growth_head(report), _growth_rows(report))
    page.heading("The rule").table(("feature", "Δ of firing rates"), report.features)
    page.text(
        "Δ of firing rates: the share of the positive documents in which the feature fires, minus"
        " that share of the others. The rule “or” says yes where any of its features fires, and"
        " “k-of-n” where k of them do; “thresholds” gives each feature a threshold of its own.",
        quiet=True,
    )
    page.heading("Largest Δ of each layer")
    page.table(("layer", "Δ of firing rates"), [(str(n), d) for n, d in report.layers.items()])
    page.heading("Errors, most extreme scores first")
    rows = [
        (
            "missed" if error.truth else "false alarm",
            str(error.doc),
            *([error.language] if report.languages else []),
            error.text[:400],
            "; ".join(error.features) or None,
        )
        for error in report.errors
    ]
    language = ["language"] if report.languages else []
    page.table(("error", "document", *language, "text", "features that fire"), rows)
    return page


def fit_facts(classifier: FeatureRuleClassifier, documents: Documents, task: str) -> dict[str, Any]:
    """The same as `fit_text`, as numbers."""
    own = scored(classifier.decision_function(documents.pooled) > 0, documents.truth)
    differences = zip(map(str, classifier.features_), classifier.differences_, strict=True)
    return {
        "task": task,
        "rule": name_of(classifier.get_params(deep=False)),
        "features": [{"feature": name, "difference": float(d)} for name, d in differences],
        "layers": classifier.layer_differences_,
        "discovery": own,
    }


def fit_text(classifier: FeatureRuleClassifier, documents: Documents, task: str) -> str:
    """What was learned, and the F1 on the discovery documents, which is optimistic."""
    own = scored(classifier.decision_function(documents.pooled) > 0, documents.truth)
    rows = list(zip(map(str, classifier.features_), classifier.differences_, strict=True))
    layers = [(str(n), d) for n, d in classifier.layer_differences_.items()]
    return "\n".join(
        [
            f"{task}: {own.positives:,} of {own.n:,} documents.",
            f"Rule: {name_of(classifier.get_params(deep=False))}{_used(classifier)}",
            _text(("feature", "Δ"), [(name, float(delta)) for name, delta in rows]),
            "\nLargest Δ of each layer:",
            _text(("layer", "d"), layers),
            f"\nOn these discovery documents: F1 {own.f1:.3f}, precision {own.precision:.3f},"
            f" recall {own.recall:.3f}; `qsl classify report` measures on others.",
        ]
    )


def _used(classifier: FeatureRuleClassifier) -> str:
    """How many features are in the rule, where that is not the number that was asked for."""
    asked, used = classifier.top_k * classifier.n_layers, len(classifier.features_)
    return "" if used == asked else f"; {used} of the {asked} are in it, the others would not help"


def layer_table(rows: Sequence[LayerRow]) -> str:
    """F1 of each layer's rule, with marks for the layer with the largest d and the best on test."""
    chosen = max(rows, key=lambda row: (row.d, -row.layer)).layer
    best = max(rows, key=lambda row: (row.test.f1, -row.layer)).layer
    marks = {chosen: "<- largest d", best: "<- best on test"}
    if chosen == best:
        marks[chosen] = "<- largest d, best on test"
    cells = [
        (str(row.layer), row.d, row.discovery, str(row.test), marks.get(row.layer, ""))
        for row in rows
    ]
    return _text(("layer", "d", "discovery F1", "test F1", ""), cells)


def overlap_table(rows: Sequence[Overlap]) -> str:
    cells = [(str(row.layer), row.mean, f"{row.low:.3f}-{row.high:.3f}") for row in rows]
    return _text(("layer", "Jaccard of best features", "quartiles over pairs"), cells)


def transfer_table(found: Transfer) -> str:
    """One row per language that a rule was fitted on, one column per language that it reads."""
    rows = [
        (f"{name} (layer {found.layers[i]})", *map(float, found.f1[i]))
        for i, name in enumerate(found.languages)
    ]
    return _text(("fitted on", *found.languages), rows)


def efficiency_table(rows: Sequence[Efficiency]) -> str:
    cells = [
        (f"{row.share:.0%}", row.n, row.f1, f"{row.low:.3f}-{row.high:.3f}", f"{row.of_full:.1%}")
        for row in rows
    ]
    return _text(("discovery data", "documents", "F1", "over draws", "of full"), cells)


def _method_rows(report: Report) -> list[tuple[Any, ...]]:
    return [
        (
            row.method,
            row.all.f1,
            f"{row.all.low:.3f}-{row.all.high:.3f}",
            row.all.precision,
            row.all.recall,
            None if row.against is None else row.against.value,
            None if row.against is None else f"{row.against.low:+.3f}..{row.against.high:+.3f}",
        )
        for row in report.rows
    ]


def _point_rows(report: Report) -> list[tuple[Any, ...]]:
    return [
        (row.method, None, None, "no cut reaches it")
        if row.point is None
        else (row.method, row.point.precision, row.point.recall, f"{row.point.share:.1%}")
        for row in report.rows
    ]


def _languages(report: Report) -> list[tuple[Any, ...]]:
    return [
        (row.method, *(row.by_language[name].f1 for name in report.languages))
        for row in report.rows
    ]


def _growth_head(report: Report) -> tuple[str, ...]:
    return ("rule", *(f"{size}" for size in report.growth[0].top_k))


def _growth_rows(report: Report) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [
        (growth.rule, *(score.f1 for score in growth.scores)) for growth in report.growth
    ]
    plain = report.growth[0]
    rows.append((f"{plain.rule}: precision", *(score.precision for score in plain.scores)))
    rows.append((f"{plain.rule}: recall", *(score.recall for score in plain.scores)))
    always = _always(report)
    return [*rows, ("always yes", *(always for _ in plain.top_k))]


def _draw_growth(axes: Any, report: Report) -> None:
    for growth in report.growth:
        [line] = axes.plot(growth.top_k, [s.f1 for s in growth.scores], "o-", label=growth.rule)
        axes.fill_between(
            growth.top_k,
            [s.low for s in growth.scores],
            [s.high for s in growth.scores],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    axes.axhline(_always(report), linestyle=":", color="#808080")
    axes.set_xscale("log", base=2)
    axes.set_xticks(report.growth[0].top_k, [str(size) for size in report.growth[0].top_k])
    axes.set_xlabel("features")
    axes.set_ylabel("F1")
    axes.set_ylim(0, 1)
    axes.legend()


def _always(report: Report) -> float:
    return next(row.all.f1 for row in report.rows if row.method == "always yes")


def _share_positive(report: Report) -> str:
    scores = report.rows[0].all
    return f"{scores.positives / max(1, scores.n):.0%}"


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else line[: EXCERPT - 2] + ".."


def _text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return Table.of(columns, rows).text()
