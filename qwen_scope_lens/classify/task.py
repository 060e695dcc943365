"""From a file or a store and the name of a label to `Documents`.

This turns what a user names on the command line into what methods and experiments take. It checks
which label values exist and which of them is the positive class. It fits nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.classify.methods import Documents
from qwen_scope_lens.classify.pooled import pool_layers
from qwen_scope_lens.errors import BadPlan, TooLittleData
from qwen_scope_lens.features.document_sets import DocumentLabel, held_out_texts
from qwen_scope_lens.stores.reread import StoreReader
from qwen_scope_lens.stores.store import FeatureStore

if TYPE_CHECKING:
    from qwen_scope_lens.models.architecture import Model

__all__ = ["Task", "by_language", "documents_of", "open_data", "residuals_of", "split"]


@dataclass(frozen=True)
class Task:
    """The question of a classifier: does `label` have the value `positive`?"""

    label: str
    positive: str | None = None  # None: the positive value is true, yes or 1

    def truth(self, values: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which documents are positive, and which have a label at all. bool `[n]` both."""
        label = DocumentLabel(self.label, values)
        known = label.known
        if not known.any():
            raise TooLittleData(f"no document has the label {self.label!r}")
        if self.positive is None and not label.is_truth:
            raise BadPlan(
                f"label {self.label!r} is not true or false: it has {label.shown}. Say with"
                " --positive which of them is the positive class"
            )
        truth = label.truth() if self.positive is None else label.isin(self.positive)
        if len(np.unique(truth[known])) < 2:
            raise TooLittleData(
                f"every document has the same answer to {self}: label {self.label!r} has"
                f" {label.shown}. Documents of both classes are needed"
            )
        return truth, known

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.label} = {self.positive}" if self.positive else self.label


def open_data(
    data: str,
    *,
    model: str | None = None,
    group: str | None = None,
    layers: Sequence[int] | None = None,
    store: str | None = None,
    text: str | None = None,
    column: str | None = None,
    max_tokens: int | None = None,
    split: str | None = None,
) -> FeatureStore:
    """Open a store, or extract a corpus into a store first.

    The store of a corpus is `store`, or a folder beside the corpus. An interrupted extraction
    continues.
    """
    from qwen_scope_lens.catalog import find_group
    from qwen_scope_lens.stores.corpus import read_corpus
    from qwen_scope_lens.stores.manifest import Manifest, is_stored

    path = Path(data).expanduser()
    if is_stored(path, model, group):
        return FeatureStore.open(path)
    corpus = read_corpus(data, text=text, split=split)
    if column is not None:
        corpus.check_label(column)
    place = store or (f"{path}.store" if path.exists() else f"{data.replace('/', '-')}.store")
    row = find_group(str(group))
    wanted = list(range(row.backbone.num_layers)) if layers is None else list(layers)
    if Manifest.exists(Path(place)):  # as an earlier command made it
        manifest = Manifest.open(Path(place))
        wanted = list(manifest.saes) if layers is None else wanted
        max_tokens = manifest.settings.max_tokens if max_tokens is None else max_tokens
    from qwen_scope_lens.stores.extract import extract

    return extract(
        corpus, model=str(model), group=row.short, layers=wanted, out=place, max_tokens=max_tokens
    )


def documents_of(
    store: FeatureStore,
    task: Task,
    *,
    layers: Sequence[int] | None = None,
    language: str | None = None,
    keep: bool = True,
) -> Documents:
    """The documents of a store that have the label; `language` names the label of languages.

    `keep` leaves out first tokens and tokens of extreme norm.
    """
    truth, known = task.truth(store.labels(task.label))
    rows = np.nonzero(known)[0]
    languages = None
    if language is not None:
        named = [str(text) for text in DocumentLabel.of(store, language).texts]
        languages = np.array(named, dtype=object)[rows]
    texts = store.documents(["text"])["text"].to_pylist()
    return Documents(
        tuple(texts[i] or "" for i in rows),
        truth[rows],
        pool_layers(store, layers, keep, docs=rows),
        {},
        languages,
    )


def residuals_of(
    documents: Documents, store: FeatureStore, layers: Sequence[int], model: Model
) -> Documents:
    """The same with mean residuals, which `model` reads the texts again for."""
    found = StoreReader.of(store, layers).document_residuals(model, documents.texts)
    return replace(documents, residuals=found)


def split(documents: Documents, share: float = 0.2, seed: int = 0) -> tuple[Documents, Documents]:
    """Split into discovery and test: `share` of each class of each language is held out.

    Equal texts stay on one side, because a test text that was seen in discovery measures nothing.
    """
    kind = documents.truth.astype(np.int64)
    if documents.languages is not None:
        kind += 2 * np.unique(list(map(str, documents.languages)), return_inverse=True)[1]
    test = held_out_texts(documents.texts, kind, share, seed)
    if not test.any() or test.all():
        raise TooLittleData(
            f"{len(set(documents.texts))} different texts are too few to hold out {share:.0%}"
            " of every class: add documents, or pass test documents of their own"
        )
    return documents.take(~test), documents.take(test)


def by_language(documents: Documents) -> Mapping[str, Documents]:
    """The documents of each language; raises if one of them has only one class."""
    if documents.languages is None:
        raise BadPlan("the column of languages is not known: name it with --language")
    found = {}
    for language in sorted(set(map(str, documents.languages))):
        part = documents.take(documents.languages == language)
        if len(np.unique(part.truth)) < 2:
            raise TooLittleData(
                f"the {len(part)} documents of {language!r} are all of one class: leave them out"
            )
        found[language] = part
    return found
