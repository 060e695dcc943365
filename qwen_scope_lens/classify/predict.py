"""Predict with a fitted rule: texts as a stream, and whole files with a JSON line per document.

For texts, the forward pass ends after the rule's last layer, only the SAEs of the rule are opened,
and mostly only the rule's features are computed (`saes/few_features.py`). Values equal those of a
full encode bit for bit, and are then rounded as a store rounds them. `estimator.py` predicts for
documents in stores.

If a run is interrupted, the finished lines are kept and the same command continues after them.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from qwen_scope_lens.classify.explain import Evidence, explain, label_of
from qwen_scope_lens.classify.read import Reader, open_reader
from qwen_scope_lens.errors import CannotWrite, ScopeError
from qwen_scope_lens.files import open_own, whole_file
from qwen_scope_lens.models.residuals import Capture
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.saes.few_features import Membership
from qwen_scope_lens.stores.codec import stored_values
from qwen_scope_lens.stores.corpus import Corpus, Document, read_corpus
from qwen_scope_lens.stores.manifest import Manifest
from qwen_scope_lens.stores.store import FeatureStore

if TYPE_CHECKING:
    from qwen_scope_lens.classify.estimator import FeatureRuleClassifier
    from qwen_scope_lens.labels.packs import LabelPack

__all__ = ["Prediction", "Stream", "predict_data"]

WINDOW = 512
"""Documents that are read ahead, so that they can be batched by length."""


@dataclass(frozen=True)
class Prediction:
    """The class and score of a document, and the token on which each feature is strongest."""

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
    """Applies a classifier to texts. `settled` counts which certificates decided."""

    def __init__(
        self,
        classifier: FeatureRuleClassifier,
        reader: Reader,
        labels: LabelPack | None = None,
    ) -> None:
        self.fitted, self.labels = classifier.fitted_, labels
        self.fitted.require_source().check_same(reader.source, "the reader")
        self._columns: dict[int, list[int]] = {}
        features: dict[int, list[int]] = {}
        for column, (layer, feature) in enumerate(self.fitted.places):
            self._columns.setdefault(layer, []).append(column)
            features.setdefault(layer, []).append(feature)
        saes = {layer: reader.saes[layer] for layer in features}
        self.reader = Reader(reader.model, saes, reader.source)
        self.members = {layer: Membership(saes[layer], f) for layer, f in features.items()}
        self.tokens: list[int] = []  # in each document that was read

    @property
    def settled(self) -> dict[str, int]:
        """Counts of (position, feature) pairs by the certificate that settled them."""
        found: dict[str, int] = {}
        for member in self.members.values():
            for how, count in member.settled.items():
                found[how] = found.get(how, 0) + count
        return found

    def predict(self, texts: Iterable[Content]) -> Iterator[Prediction]:
        """One prediction per document, in order; memory does not grow with their number."""
        stream = iter(texts)
        while window := list(islice(stream, WINDOW)):
            done: dict[int, Prediction] = {}
            for batch in self.reader.captures(window):
                done |= zip(batch.doc_ids, self.read_batch(batch), strict=True)
            yield from (done[i] for i in range(len(window)))

    @torch.no_grad()
    def read_batch(self, batch: Capture) -> Iterator[Prediction]:
        m = len(self.fitted.features)
        self.tokens += batch.offsets.diff().tolist()
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
            # Rules are fitted on the rounded values of a store.
            values[:, columns] = stored_values(found.values.cpu().numpy())
            where = place[found.rows.clamp_min(0)] if len(place) else found.rows
            rows[:, columns] = where.masked_fill(found.rows < 0, -1).cpu().numpy()
        scores = self.fitted.rule.score(values)
        for i in range(len(batch)):
            evidence = tuple(self._evidence(batch, i, values[i], rows[i]))
            predicted = self.fitted.predicted(scores[[i]])[0]
            yield Prediction(predicted, float(scores[i]), values[i], evidence)

    def _evidence(
        self, batch: Capture, i: int, values: np.ndarray, rows: np.ndarray
    ) -> Iterator[Evidence]:
        text, spans = batch.texts[i], batch.char_spans[i]
        for at in self.fitted.rule.responsible(values):
            position = int(rows[at] - batch.offsets[i])
            start, end = spans[position] if spans is not None else (-1, -1)
            token = text[start:end] if text is not None and spans is not None else ""
            address = self.fitted.features[at]
            label = label_of(self.labels, address)
            yield Evidence(address, float(values[at]), position, token, start, end, label)


def predict_data(
    classifier: FeatureRuleClassifier,
    data: str,
    out: Path | None,
    labels: LabelPack | None = None,
    text: str | None = None,
    split: str | None = None,
) -> int:
    """Write predictions to `out` (default: stdout) and return how many this run made."""
    classifier.fitted_.require_source()
    path = Path(data).expanduser()
    rows: Callable[[int], Iterator[dict[str, Any]]]
    if path.is_dir() and Manifest.exists(path):
        rows = partial(_from_store, classifier, FeatureStore.open(path), labels)
    else:
        corpus = read_corpus(data, text=text, labels=[], split=split)
        rows = partial(_from_corpus, classifier, corpus, labels)
    if out is not None:
        return _write(rows, out, classifier, data)
    made = 0
    for row in rows(0):
        print(json.dumps(row, ensure_ascii=False))
        made += 1
    return made


def _from_corpus(
    classifier: FeatureRuleClassifier, corpus: Corpus, labels: LabelPack | None, start: int
) -> Iterator[dict[str, Any]]:
    """Rows of predictions from document number `start` of a corpus on."""
    stream = Stream(classifier, open_reader(classifier.fitted_.require_source()), labels)
    keys: deque[str] = deque()

    def contents(documents: Iterable[Document]) -> Iterator[Any]:
        for document in documents:
            keys.append(document.key)
            yield document.content

    for prediction in stream.predict(contents(islice(iter(corpus), start, None))):
        yield {"key": keys.popleft(), **prediction.to_json()}
    if said := stream.fitted.shorter(stream.tokens):
        print(said, file=sys.stderr)


def _from_store(
    classifier: FeatureRuleClassifier, store: FeatureStore, labels: LabelPack | None, start: int
) -> Iterator[dict[str, Any]]:
    """The same for a store; evidence is read only for documents that are called positive."""
    fitted = classifier.fitted_
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scores = classifier.decision_function(store)
    for warning in said:
        print(warning.message, file=sys.stderr)
    keys = store.documents(["key"])["key"].to_pylist()
    for doc in range(start, len(keys)):
        evidence: dict[str, dict[str, Any]] = {}
        if scores[doc] > 0:
            for one in explain(fitted, doc, store, labels).evidence:
                evidence.setdefault(one.feature, one.to_json())  # its strongest token comes first
        [predicted] = fitted.predicted(scores[[doc]]).tolist()
        row = {"predicted": predicted, "score": round(float(scores[doc]), 6)}
        yield {"key": keys[doc], **row, "evidence": list(evidence.values())}


def _write(
    rows: Callable[[int], Iterator[dict[str, Any]]],
    out: Path,
    classifier: FeatureRuleClassifier,
    data: str,
) -> int:
    """Append to a partial file, which gets the name `out` when it is complete."""
    unfinished = out.with_name(f".{out.name}.partial")
    path = Path(data).expanduser()
    changed = path.stat().st_mtime_ns if path.is_file() else None  # edited since: start again
    head = json.dumps(
        {
            "data": data,
            "changed": changed,
            "features": classifier.features_,
            "rule": classifier.rule_.to_json(),
        }
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        done = _finished(unfinished, head)
        with ExitStack() as stack:
            file = stack.enter_context(open_own(unfinished, "a"))
            if done < 0:
                file.write(head + "\n")
                done = 0
            if done:
                print(f"continuing after {done:,} documents", file=sys.stderr)
            made = 0
            for row in tqdm(rows(done), initial=done, unit="doc", disable=None, file=sys.stderr):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                made += 1
        finished = out.with_name(f".{out.name}.finished")
        with unfinished.open(encoding="utf-8") as lines, whole_file(finished) as place:
            next(lines)
            with place.open("w", encoding="utf-8") as target:
                target.writelines(lines)
        finished.replace(out)
        unfinished.unlink()
    except OSError as error:
        if isinstance(error, ScopeError):
            raise
        raise CannotWrite(
            f"cannot write {out}: {error.strerror or error}. The finished documents are kept: make"
            " room and run the same command again"
        ) from error
    return made


def _finished(unfinished: Path, head: str) -> int:
    """How many documents the partial file of the same job holds; -1 if there is no such file."""
    if not unfinished.is_file() or unfinished.is_symlink():
        return -1
    content = unfinished.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    if not lines or lines[0] != head.encode("utf-8"):
        unfinished.unlink()
        return -1
    # Documents are read in windows. An incomplete window is read again as a whole, so that the
    # batches, and with them the last bits of the scores, equal those of an uninterrupted run.
    done = (len(lines) - 1) // WINDOW * WINDOW
    with open_own(unfinished, "r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[: done + 1]))
    return done
