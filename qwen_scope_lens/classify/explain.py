"""Why a document got its class: the features that count, where, how strongly, and what they mean.

Reads a store or a text again; the decision itself is `rules.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.classify.pooled import is_store, source_of_store
from qwen_scope_lens.errors import BadText, StoreMismatch

if TYPE_CHECKING:
    from qwen_scope_lens.classify.estimator import FeatureRuleClassifier
    from qwen_scope_lens.labels.packs import LabelPack

__all__ = ["Evidence", "Explanation", "explain"]


@dataclass(frozen=True)
class Evidence:
    """One feature of the rule firing on one token."""

    feature: str  # its address
    value: float
    position: int  # of the token in its document
    token: str
    start: int  # characters of the text, [start, end); -1 where there is no text
    end: int
    label: str | None = None  # what the feature means, where a LabelPack knows it

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        label = f"   {self.label}" if self.label else ""
        return f"{self.feature}  {self.value:7.2f}  token {self.position} {self.token!r}{label}"


@dataclass(frozen=True)
class Explanation:
    """The class, the score, and the evidence: heaviest feature first, then by value."""

    predicted: Any
    score: float
    evidence: tuple[Evidence, ...]

    def __str__(self) -> str:
        head = f"{self.predicted} (score {self.score:.3f})"
        if not self.evidence:
            return f"{head}: no feature of the rule fires"
        return "\n".join([head, *(f"  {one}" for one in self.evidence)])


def explain(
    classifier: FeatureRuleClassifier, doc: Any, source: Any = None, labels: LabelPack | None = None
) -> Explanation:
    """See `FeatureRuleClassifier.explain`."""
    if classifier.source_ is None:
        raise StoreMismatch(
            "the classifier was fitted on a plain array: there are no tokens to point at. Fit it"
            " on a store"
        )
    if isinstance(doc, (int, np.integer)):
        if not is_store(source):
            raise BadText(
                f"document {doc} of which store? Pass it: explain({doc}, store); or a text"
            )
        fired, tokens, spans = _in_store(classifier, int(doc), source)
    else:
        fired, tokens, spans = _in_text(classifier, doc, source)
    values = np.array([value.max(initial=0.0) for value in fired])
    score = float(classifier.rule_score(values[None])[0])
    evidence = []
    for at in classifier.rule_.responsible(values):
        address = classifier.features_[at]
        positions = np.nonzero(fired[at])[0]
        for position in positions[np.argsort(-fired[at][positions], kind="stable")]:
            start, end = (int(edge) for edge in spans[position])
            evidence.append(
                Evidence(
                    address,
                    float(fired[at][position]),
                    int(position),
                    tokens[position],
                    start,
                    end,
                    label_of(labels, address),
                )
            )
    predicted = classifier.classes_[int(score > 0)]
    return Explanation(predicted, score, tuple(evidence))


def label_of(labels: Mapping[Any, Any] | None, address: str) -> str | None:
    """The text for a feature, None where nobody wrote one."""
    if labels is None or address not in labels:
        return None
    return str(labels[address].text)


def _in_store(
    classifier: FeatureRuleClassifier, doc: int, store: Any
) -> tuple[list[np.ndarray], list[str], np.ndarray]:
    """Values of every feature along the document's tokens, the tokens, their characters."""
    source = classifier.source_
    assert source is not None
    have = [facts.layer for facts in source.layers if facts.layer in store.layers]
    source.check_same(source_of_store(store, have, source.keep), "the store")
    fired: list[np.ndarray] = []
    blocks = {facts.layer: store.by_token(doc, facts.layer) for facts in source.layers}
    for address in classifier.features_:
        layer, feature = (int(part) for part in address.split("/")[-2:])
        block = blocks[layer]
        hit = (block.codes.values * (block.codes.indices == feature)).sum(-1).numpy()
        fired.append(np.where(block.keep, hit, 0) if source.keep else hit)
    block = next(iter(blocks.values()))
    return fired, list(block.tokens), np.asarray(block.spans)


def _in_text(
    classifier: FeatureRuleClassifier, doc: Any, reader: Any
) -> tuple[list[np.ndarray], list[str], np.ndarray]:
    from qwen_scope_lens.classify.read import open_reader
    from qwen_scope_lens.stores.codec import stored_values

    assert classifier.source_ is not None
    reader = reader or open_reader(classifier.source_)
    classifier.source_.check_same(reader.source, "the reader")
    [batch] = reader.captures([doc])
    fired = []
    for address in classifier.features_:
        layer, feature = (int(part) for part in address.split("/")[-2:])
        codes = reader.saes[layer].encode_sparse(batch.residuals[layer]).to("cpu")
        hit = (codes.values * (codes.indices == feature)).sum(-1).numpy()
        keep = batch.keep(layer).cpu().numpy() if reader.source.keep else True
        fired.append(np.where(keep, stored_values(hit), 0))
    text, spans = batch.texts[0], batch.char_spans[0]
    if text is None or spans is None:
        ids = batch.token_ids.tolist()
        return fired, [str(i) for i in ids], np.full((len(ids), 2), -1)
    return fired, [text[a:b] for a, b in spans], np.array(spans)
