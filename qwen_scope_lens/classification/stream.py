"""Predictions over texts of any number, reading only what the rule needs.

The forward pass ends after the rule's last layer, only its SAEs are opened, and of those mostly
only its features are computed (`saes/membership.py`); values equal those of a full encode, bit for
bit, and are then rounded as a store rounds them. Documents in stores are `estimator.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qwen_scope_lens.classification.explain import Evidence, label_of
from qwen_scope_lens.classification.read import Reader
from qwen_scope_lens.errors import StoreMismatch
from qwen_scope_lens.features.packed import stored_values
from qwen_scope_lens.models.capture import Capture
from qwen_scope_lens.models.tokens import Document
from qwen_scope_lens.saes.membership import Membership

if TYPE_CHECKING:
    from qwen_scope_lens.classification.estimator import FeatureRuleClassifier
    from qwen_scope_lens.features.labels import LabelPack

__all__ = ["Prediction", "Stream"]

WINDOW = 512
"""Documents read ahead: they are batched by length, and given back in their order."""


@dataclass(frozen=True)
class Prediction:
    """One document: its class, its score, and where each feature of the rule is strongest."""

    predicted: Any
    score: float
    values: np.ndarray  # [m]
    evidence: tuple[Evidence, ...]

    def to_json(self) -> dict[str, Any]:
        predicted = self.predicted.item() if isinstance(self.predicted, np.generic) else None
        return {
            "predicted": self.predicted if predicted is None else predicted,
            "score": round(self.score, 6),
            "evidence": [one.to_json() for one in self.evidence],
        }


class Stream:
    """A classifier at work on texts. `settled` says which certificates decided."""

    def __init__(
        self,
        classifier: FeatureRuleClassifier,
        reader: Reader,
        labels: LabelPack | None = None,
    ) -> None:
        if classifier.source_ is None:
            raise StoreMismatch(
                "the classifier was fitted on a plain array: it does not say which model and SAE"
                " its columns come from. Fit it on a store"
            )
        classifier.source_.check_same(reader.source, "the reader")
        self.classifier, self.labels = classifier, labels
        self._columns: dict[int, list[int]] = {}
        features: dict[int, list[int]] = {}
        for column, address in enumerate(classifier.features_):
            layer, feature = (int(part) for part in address.split("/")[-2:])
            self._columns.setdefault(layer, []).append(column)
            features.setdefault(layer, []).append(feature)
        saes = {layer: reader.saes[layer] for layer in features}
        self.reader = Reader(reader.model, saes, reader.source)
        self.members = {layer: Membership(saes[layer], f) for layer, f in features.items()}

    @property
    def settled(self) -> dict[str, int]:
        """(position, feature) pairs by the certificate that settled them."""
        found: dict[str, int] = {}
        for member in self.members.values():
            for how, count in member.settled.items():
                found[how] = found.get(how, 0) + count
        return found

    def predict(self, texts: Iterable[Document]) -> Iterator[Prediction]:
        """One prediction a document, in order; memory does not grow with their number."""
        stream = iter(texts)
        while window := list(islice(stream, WINDOW)):
            done: dict[int, Prediction] = {}
            for batch in self.reader.captures(window):
                done |= zip(batch.doc_ids, self._batch(batch), strict=True)
            yield from (done[i] for i in range(len(window)))

    @torch.no_grad()
    def _batch(self, batch: Capture) -> Iterator[Prediction]:
        m = len(self.classifier.features_)
        values = np.zeros((len(batch), m), dtype=np.float32)
        rows = np.full((len(batch), m), -1)
        owner = batch.doc_rows()
        for layer, member in self.members.items():
            x, doc = batch.residuals[layer], owner.to(batch.residuals[layer].device)
            place = torch.arange(len(x), device=x.device)
            if self.reader.source.keep:
                place = place[batch.keep(layer)]
                x, doc = x[place], doc[place]
            found = member.maxima(x, doc, len(batch))
            columns = self._columns[layer]
            # A store keeps rounded values, and rules are fitted on those.
            values[:, columns] = stored_values(found.values.cpu().numpy())
            where = place[found.rows.clamp_min(0)] if len(place) else found.rows
            rows[:, columns] = where.masked_fill(found.rows < 0, -1).cpu().numpy()
        scores = self.classifier.rule_score(values)
        for i in range(len(batch)):
            evidence = tuple(self._evidence(batch, i, values[i], rows[i]))
            predicted = self.classifier.classes_[int(scores[i] > 0)]
            yield Prediction(predicted, float(scores[i]), values[i], evidence)

    def _evidence(
        self, batch: Capture, i: int, values: np.ndarray, rows: np.ndarray
    ) -> Iterator[Evidence]:
        text, spans = batch.texts[i], batch.char_spans[i]
        for at in self.classifier.rule_.responsible(values):
            position = int(rows[at] - batch.offsets[i])
            start, end = spans[position] if spans is not None else (-1, -1)
            token = text[start:end] if text is not None and spans is not None else ""
            address = self.classifier.features_[at]
            label = label_of(self.labels, address)
            yield Evidence(address, float(values[at]), position, token, start, end, label)
