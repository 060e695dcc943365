"""Classify documents with features: rules that a person can read, compared with probes.

    qsl classify fit texts/corpus.jsonl --label chinese --out clf.json --store classify_store \\
        --model mini-qwen3 --sae mini-qwen3/w1k-l0-16 --layers 5-6
    qsl classify predict clf.json texts/new.jsonl --out predictions.jsonl
    qsl classify report store/ --label chinese --out report.html
    qsl classify efficiency store/ --label chinese
    # needs the hub, and texts of two classes in several languages:
    qsl classify transfer all.jsonl --label toxic --language lang \\
        --model Qwen/Qwen3-1.7B --sae qwen3-1.7b-base/w32k-l0-50 --layers 10-20

DATA is a feature store (`qsl extract`) or a corpus (JSON Lines, CSV, Parquet, a dataset). A corpus
is extracted first, into --store (default: DATA.store), which is kept: the next command on it starts
at once and needs no --model or --sae, and an interrupted command goes on. Rules are written as
JSON, never as a pickle. A rule that was fitted on long documents misses short ones; `predict` says
so.
`qsl classify VERB --help` explains each.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_group,
    add_json,
    add_labels,
    add_layers,
    add_model,
    add_old,
    add_words,
    count,
    finite,
    output,
    print_json,
    read_labels,
    remark,
)

if TYPE_CHECKING:
    from qwen_scope_lens.classify.methods import Documents
    from qwen_scope_lens.stores.store import FeatureStore

MOST_DIGITS = 40
RULES = ("or", "k-of-n", "thresholds", "logistic", "tree")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, WORDS)


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0


def _data(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("data", metavar="DATA", action=Input, check=inputs.data, help=what)
    parser.add_argument("--label", required=True, metavar="COLUMN", help="the column to predict")
    parser.add_argument("--positive", metavar="VALUE", help="its positive value (default: true, 1)")
    corpus = parser.add_argument_group("for a corpus")
    add_model(corpus, "a folder, a name on the hub, or mini-qwen3", device=False)
    add_group(corpus, required=False)
    add_layers(
        corpus,
        "layers to extract and to choose from, such as 10-20; default: all",
        check=inputs.unchecked,  # `data` looks whether the store or the group has them
    )
    corpus.add_argument("--store", metavar="FOLDER", help="where it is extracted to (DATA.store)")
    corpus.add_argument("--text", metavar="COLUMN", help="the column of the texts")
    corpus.add_argument("--max-tokens", type=count, metavar="N", help="cut longer documents")
    corpus.add_argument("--split", help="of a dataset")


def _rule(parser: argparse.ArgumentParser) -> None:
    rule = parser.add_argument_group("the rule")
    rule.add_argument("--rule", choices=RULES, default="or", help="default: %(default)s")
    rule.add_argument("--top-k", type=count, default=2, metavar="K", help="features per layer (2)")
    rule.add_argument(
        "--rule-layer",
        dest="layer",
        default="auto",
        help="the layer of the rule, or auto: the one with the largest difference",
    )
    add_old(rule, "--layer", "--rule-layer")
    rule.add_argument(
        "--n-layers", type=count, default=1, metavar="M", help="layers to combine (1)"
    )
    rule.add_argument("--threshold", type=finite, default=0.0, help="fires above this value (0)")
    rule.add_argument("--at-least", type=count, metavar="K", help="k-of-n: how many have to fire")


def _test(parser: argparse.ArgumentParser, language_needed: bool = False) -> None:
    _data(parser, "discovery documents, and test documents where --test is not given")
    _rule(parser)
    parser.add_argument(
        "--test",
        metavar="DATA",
        action=Input,
        check=inputs.data,
        help="test documents: a store or a corpus",
    )
    parser.add_argument("--test-store", metavar="FOLDER", help="where --test is extracted to")
    parser.add_argument(
        "--language",
        metavar="COLUMN",
        required=language_needed,
        help="the column that holds the language",
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from qwen_scope_lens.errors import BadPlan

    layer = arguments.layer
    if layer != "auto" and not (layer.isdecimal() and len(layer) < MOST_DIGITS):
        raise BadPlan(f"--rule-layer {layer[:MOST_DIGITS]}: expected a layer number or auto")
    return {
        "rule": arguments.rule,
        "top_k": arguments.top_k,
        "layer": layer if layer == "auto" else int(layer),
        "n_layers": arguments.n_layers,
        "threshold": arguments.threshold,
        "at_least": arguments.at_least,
    }


def _open(arguments: argparse.Namespace, data: str, store: str | None) -> FeatureStore:
    from qwen_scope_lens.classify.task import open_data
    from qwen_scope_lens.stores.manifest import model_and_group

    places = (store, f"{data}.store", arguments.data)
    model, group = model_and_group(arguments.model, arguments.sae, *places)
    return open_data(
        data,
        model=model,
        group=group,
        layers=arguments.layers,
        store=store,
        text=arguments.text,
        column=arguments.label,
        max_tokens=arguments.max_tokens,
        split=arguments.split,
    )


def _read(
    arguments: argparse.Namespace, residuals: bool = False
) -> tuple[Documents, Documents, str, FeatureStore]:
    """Discovery and test documents, a line that says what they are, and the store of the test."""
    from qwen_scope_lens.classify.task import Task, documents_of, residuals_of, split
    from qwen_scope_lens.stores.reread import StoreReader

    model: Any = None
    task = Task(arguments.label, arguments.positive)
    found = []
    for data, place in ((arguments.data, arguments.store), (arguments.test, arguments.test_store)):
        if data is None:
            continue
        store = _open(arguments, data, place)
        layers = arguments.layers or list(store.layers)
        documents = documents_of(store, task, layers=layers, language=arguments.language)
        if residuals:
            model = model or StoreReader.of(store, layers).open_model()
            documents = residuals_of(documents, store, layers, model)
        found.append(documents)
    discovery, test = found if len(found) == 2 else split(found[0])
    source = discovery.pooled.source
    group = source.layers[0].ref.rpartition("/")[0]
    numbers = ", ".join(str(facts.layer) for facts in source.layers)
    return discovery, test, f"{task}: {source.model}, {group}, layers {numbers}", store


def _fit_arguments(parser: argparse.ArgumentParser) -> None:
    _data(parser, "discovery documents: a store or a corpus")
    _rule(parser)
    parser.add_argument("--out", type=output, required=True, help="the classifier, a JSON file")
    add_json(parser)


def _fit(arguments: argparse.Namespace) -> None:
    """Learn a rule and write it as JSON.

    The defaults are the paper's: firing-rate differences, the layer whose best feature differs
    most, its --top-k features, and yes when any of them fires. --n-layers 3 --top-k 1 is the
    paper's rule over several layers.
    """
    from qwen_scope_lens.classify.estimator import FeatureRuleClassifier
    from qwen_scope_lens.classify.report import fit_facts, fit_text
    from qwen_scope_lens.classify.task import Task, documents_of

    task = Task(arguments.label, arguments.positive)
    classifier = FeatureRuleClassifier(**_settings(arguments))
    store = _open(arguments, arguments.data, arguments.store)
    documents = documents_of(store, task, layers=arguments.layers)
    classifier.fit(documents.pooled, documents.truth)
    classifier.task_ = task.to_json()
    classifier.save(arguments.out)
    if arguments.json:
        print_json(arguments.json, fit_facts(classifier, documents, str(task)))
    else:
        print(fit_text(classifier, documents, str(task)))
    remark(f"written to {arguments.out}")


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "classifier",
        type=Path,
        action=Input,
        check=inputs.made_by("qsl classify fit", "qwen-scope-classifier"),
        help="what `fit` wrote",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        action=Input,
        check=inputs.store_or_corpus,
        help="a store or a corpus",
    )
    parser.add_argument("--out", type=output, help="JSON Lines (default: stdout)")
    add_labels(parser)
    parser.add_argument("--text", metavar="COLUMN", help="the column of the texts")
    parser.add_argument("--split", help="which part of a dataset on the hub")


def _predict(arguments: argparse.Namespace) -> None:
    """Use a rule on new documents: one JSON line each, with the features that decided.

    For a corpus the model runs no deeper than the rule's last layer, and only the rule's features
    are computed where those are enough to decide. An interrupted run goes on with the same command.
    Another SAE, layer or model than the rule was fitted on is refused.
    """
    from qwen_scope_lens.classify.estimator import FeatureRuleClassifier
    from qwen_scope_lens.classify.predict import predict_data

    classifier = FeatureRuleClassifier.load(arguments.classifier)
    labels = read_labels(arguments.labels)
    made = predict_data(
        classifier,
        arguments.data,
        arguments.out,
        labels=labels,
        text=arguments.text,
        split=arguments.split,
    )
    remark(f"{made:,} documents predicted")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _test(parser)
    parser.add_argument("--at", default="precision=0.9", help="default: %(default)s")
    parser.add_argument("--out", type=output, help="also write an HTML page")
    add_old(parser, "--page", "--out")
    add_json(parser)
    add_labels(parser)
    parser.add_argument("--no-residuals", action="store_true", help="no model, no probes")


def _report(arguments: argparse.Namespace) -> None:
    """Compare all rules and baselines on the same documents, side by side, with intervals.

    They are fitted on DATA and measured on --test (without it, on a fifth of DATA, held out). The
    first row is the rule that the options describe. Baselines: always yes, bag of words, character
    n-grams, and, with the residuals read again, a linear probe and the difference of means
    (--no-residuals leaves these two out).
    """
    from qwen_scope_lens.classify.comparison import compare
    from qwen_scope_lens.classify.methods import RuleMethod, name_of
    from qwen_scope_lens.classify.report import report_page, report_text
    from qwen_scope_lens.classify.scores import At

    settings, at = _settings(arguments), At.parse(arguments.at)
    labels = read_labels(arguments.labels)
    discovery, test, said, store = _read(arguments, residuals=not arguments.no_residuals)
    first = RuleMethod(name_of(settings), settings)
    report = compare(
        discovery,
        test,
        first,
        at,
        described=said,
        why=lambda classifier, doc: classifier.explain(doc, store, labels),
    )
    if arguments.json:
        print_json(arguments.json, asdict(report))
    else:
        print(report_text(report))
    if arguments.out:
        report_page(report, f"Classifier: {arguments.label}").save(arguments.out)
        remark(f"page: {arguments.out}")


def _transfer_arguments(parser: argparse.ArgumentParser) -> None:
    _test(parser, language_needed=True)
    add_json(parser)


def _transfer(arguments: argparse.Namespace) -> None:
    """Fit one rule per language, and use it on the others.

    Shows how far the languages' best features overlap, and what a rule that was fitted on one
    language is worth on the others.
    """
    from qwen_scope_lens.classify.experiments import overlap, transfer
    from qwen_scope_lens.classify.report import overlap_table, transfer_table
    from qwen_scope_lens.classify.task import by_language

    discovery, test, said, _ = _read(arguments)
    known, held = by_language(discovery), by_language(test)
    found, shared = transfer(known, held, _settings(arguments)), overlap(known)
    if arguments.json:
        print_json(arguments.json, {"task": said, **asdict(found), "overlap": shared})
        return
    print(f"{said}\n\nF1 of rules used on another language than they were fitted on:")
    print(transfer_table(found))
    print("\nOverlap of the languages' ten best features:")
    print(overlap_table(shared))


def _efficiency_arguments(parser: argparse.ArgumentParser) -> None:
    _test(parser)
    add_json(parser)


def _efficiency(arguments: argparse.Namespace) -> None:
    """How much discovery data a rule needs: F1 with 1% to all of it, over several draws."""
    from qwen_scope_lens.classify.experiments import efficiency
    from qwen_scope_lens.classify.report import efficiency_table

    discovery, test, said, _ = _read(arguments)
    rows = efficiency(discovery, test, _settings(arguments))
    if arguments.json:
        print_json(arguments.json, {"task": said, "rows": rows})
    else:
        print(f"{said}\n\n{efficiency_table(rows)}")


WORDS = (
    Word("fit", _fit_arguments, _fit),
    Word("predict", _predict_arguments, _predict),
    Word("report", _report_arguments, _report),
    Word("transfer", _transfer_arguments, _transfer),
    Word("efficiency", _efficiency_arguments, _efficiency),
)
