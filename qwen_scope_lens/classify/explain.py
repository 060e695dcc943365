"""Why a document got its class: the features behind the decision, their tokens and values.

The store or the text is read again. The decision itself is made in `rules.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.classify.fitted import FittedRule
from qwen_scope_lens.classify.pooled import is_store, source_of_store
from qwen_scope_lens.errors import BadText

if TYPE_CHECKING:
    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["Evidence", "Explanation", "explain"]


@dataclass(frozen=True)
class Evidence:
    """One feature of the rule that fires on one token."""

    feature: str  # its address
    value: float
    position: int  # of the token in its document
    token: str
    start: int  # first character of the token in the text; -1 if there is no text
    end: int  # the character after its last one
    label: str | None = None  # what the feature means, if a LabelPack has a label for it

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        label = f"   {self.label}" if self.label else ""
        return f"{self.feature}  {self.value:7.2f}  token {self.position} {self.token!r}{label}"


@dataclass(frozen=True)
class Explanation:
    """The class, the score, and the evidence: strongest feature first, then by value."""

    predicted: Any
    score: float
    evidence: tuple[Evidence, ...]

    def __str__(self) -> str:
        head = f"{self.predicted} (score {self.score:.3f})"
        if not self.evidence:
            return f"{head}: no feature of the rule fires"
        return "\n".join([head, *(f"  {one}" for one in self.evidence)])


def explain(
    fitted: FittedRule, doc: Any, source: Any = None, labels: LabelPack | None = None
) -> Explanation:
    """See `FeatureRuleClassifier.explain`."""
    fitted.require_source()
    if isinstance(doc, (int, np.integer)):
        if not is_store(source):
            raise BadText(
                f"document {doc} of which store? Pass the store, explain({doc}, store), or a text"
            )
        fired, tokens, spans = _in_store(fitted, int(doc), source)
    else:
        fired, tokens, spans = _in_text(fitted, doc, source)
    values = np.array([value.max(initial=0.0) for value in fired])
    score = fitted.rule.score(values[None])
    evidence = []
    for at in fitted.rule.responsible(values):
        address = fitted.features[at]
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
    return Explanation(fitted.predicted(score)[0], float(score[0]), tuple(evidence))


def label_of(labels: Mapping[Any, Any] | None, address: str) -> str | None:
    """The label of a feature; None if it has no label."""
    if labels is None or address not in labels:
        return None
    return str(labels[address].text)


def _in_store(
    fitted: FittedRule, doc: int, store: FeatureStore
) -> tuple[list[np.ndarray], list[str], np.ndarray]:
    """Values of every feature on the document's tokens, the tokens, and their characters."""
    source = fitted.require_source()
    have = [facts.layer for facts in source.layers if facts.layer in store.layers]
    source.check_same(source_of_store(store, have, source.keep), "the store")
    fired: list[np.ndarray] = []
    blocks = {facts.layer: store.by_token(doc, facts.layer) for facts in source.layers}
    for layer, feature in fitted.places:
        block = blocks[layer]
        hit = (block.values * (block.indices == feature)).sum(-1)
        fired.append(np.where(block.keep, hit, 0) if source.keep else hit)
    block = next(iter(blocks.values()))
    return fired, list(block.tokens), np.asarray(block.spans)


def _in_text(
    fitted: FittedRule, doc: Any, reader: Any
) -> tuple[list[np.ndarray], list[str], np.ndarray]:
    from qwen_scope_lens.classify.read import open_reader
    from qwen_scope_lens.stores.codec import stored_values

    source = fitted.require_source()
    reader = reader or open_reader(source)
    source.check_same(reader.source, "the reader")
    [batch] = reader.captures([doc])
    fired = []
    for layer, feature in fitted.places:
        codes = reader.saes[layer].encode_sparse(batch.residuals[layer]).to("cpu")
        hit = (codes.values * (codes.indices == feature)).sum(-1).numpy()
        keep = batch.keep(layer).cpu().numpy() if reader.source.keep else True
        fired.append(np.where(keep, stored_values(hit), 0))
    text, spans = batch.texts[0], batch.char_spans[0]
    if text is None or spans is None:
        ids = batch.token_ids.tolist()
        return fired, [str(i) for i in ids], np.full((len(ids), 2), -1)
    return fired, [text[a:b] for a, b in spans], np.array(spans)
