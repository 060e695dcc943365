"""The static site: one page for every feature, readable from disk and from any file host.

The files of the viewer are copied as they are; `data_files.py` says how the data lies beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_scope_lens.features.statistics import BIN_EDGES
from qwen_scope_lens.files import refuse_other_folder, whole_folder
from qwen_scope_lens.site.data_files import FORMAT, MARKS, VERSION, deliver, folder_of
from qwen_scope_lens.site.earlier import EarlierSite
from qwen_scope_lens.site.layer import FeaturePage, LayerPages
from qwen_scope_lens.site.passages import Passage

__all__ = ["BLOCK", "TEXTS", "VIEWER", "DocumentTexts", "check_target", "write_site"]

BLOCK = 128
"""Features per data file: one page costs one file of some hundred kilobytes."""

TEXTS = 64
"""Documents per data file of full texts."""

PROMOTED_IN_INDEX = 5

VIEWER = (
    "index.html",
    "viewer.css",
    "dom.js",
    "data.js",
    "charts.js",
    "search.js",
    "list.js",
    "download.js",
    "feature.js",
    "viewer.js",
)


@dataclass(frozen=True)
class DocumentTexts:
    """The full text of every document, None where it is not known."""

    id: str  # twelve hexadecimal digits that tell corpora apart
    texts: Sequence[str | None]

    @property
    def folder(self) -> str:
        return f"documents-{self.id}"


def write_site(
    out: Path,
    layers: Iterable[LayerPages],
    *,
    model: str,
    made: str,
    title: str | None = None,
    documents: Sequence[tuple[str, list[tuple[str, str]]]],
    texts: DocumentTexts | None = None,
    earlier: EarlierSite | None = None,
    progress: bool = False,
) -> Path:
    """Write the site, whole or not at all. `documents` are key and labels of every document.

    With `texts`, pages can show whole documents. The layers of an `earlier` site that are not among
    `layers` stay.
    """
    check_target(out)
    more = {"made": made, "documents_folder": texts.folder if texts else None, "texts": TEXTS}
    with whole_folder(out) as folder:
        for name in VIEWER:
            source = resources.files("qwen_scope_lens.site") / "viewer" / name
            (folder / name).write_bytes(source.read_bytes())
        facts = [
            _write_layer(folder / "data", pages, documents, progress) | more for pages in layers
        ]
        if texts is not None:
            for number, start in enumerate(range(0, len(texts.texts), TEXTS)):
                part = list(texts.texts[start : start + TEXTS])
                deliver(folder / "data", f"{texts.folder}/{number:04d}", part)
        if earlier is not None:
            kept = earlier.besides({row["ref"] for row in facts})
            earlier.copy(kept, folder)
            facts = sorted([*kept, *facts], key=_place)
            title = title or earlier.title
        site = {
            "format": FORMAT,
            "version": VERSION,
            "title": title or f"Features of {model}",
            "model": model,
            "edges": BIN_EDGES.tolist(),
            "layers": facts,
        }
        deliver(folder / "data", "site", site)
    return out


def _place(facts: dict[str, Any]) -> tuple[str, int]:
    """Layers of one group stand together, in their order."""
    return facts["ref"].rpartition("/")[0], facts["layer"]


def check_target(out: Path) -> None:
    """Refuse to replace a folder that is not an older site."""
    refuse_other_folder(out, "a site of features", *MARKS)


def _write_layer(
    data: Path,
    pages: LayerPages,
    documents: Sequence[tuple[str, list[tuple[str, str]]]],
    progress: bool,
) -> dict[str, Any]:
    folder, stats = folder_of(str(pages.ref)), pages.stats
    words = _Words()
    peaks: list[list[int]] = []
    title = f"pages of {pages.ref}"
    with tqdm(total=stats.d_sae, desc=title, disable=not progress, unit="feature") as bar:
        for number, start in enumerate(range(0, stats.d_sae, BLOCK)):
            block = pages.pages(range(start, min(start + BLOCK, stats.d_sae)))
            peaks += [[words(token) for token in page.peaks()] for page in block]
            content = [_page(pages, page, documents) for page in block]
            deliver(data, f"{folder}/block-{number:04d}", content)
            bar.update(len(block))
    effects = pages.effects
    promoted = [] if effects is None else effects.promoted[:, :PROMOTED_IN_INDEX].tolist()
    index = {
        "count": stats.token_count.tolist(),
        "maximum": [_short(value) for value in stats.maximum.tolist()],
        "labels": {str(feature): label.text for feature, label in pages.labels.items()},
        "peaks": peaks,
        "promoted": [[words(pages.vocabulary.text(t)) for t in row] for row in promoted]
        or [[] for _ in range(stats.d_sae)],
        "words": words.table,
    }
    deliver(data, f"{folder}/index", index)
    return {
        "ref": str(pages.ref),
        "folder": folder,
        "layer": pages.ref.layer,
        "d_sae": stats.d_sae,
        "k": pages.k,
        "block": BLOCK,
        "tokens": stats.n_tokens,
        "documents": stats.n_docs,
        "l0": _short(stats.l0),
        "metrics": _metrics(pages),
    }


def _metrics(pages: LayerPages) -> list[tuple[str, float]]:
    """Metrics of the weights, over the features that fire."""
    alive = ~pages.stats.dead
    if not alive.any():
        return []
    return [
        ("median decoder norm", _short(np.median(pages.geometry.decoder_norm[alive]))),
        ("median encoder-decoder cosine", _short(np.median(pages.geometry.cosine[alive]))),
    ]


def _page(
    pages: LayerPages,
    page: FeaturePage,
    documents: Sequence[tuple[str, list[tuple[str, str]]]],
) -> dict[str, Any]:
    feature, stats = page.feature, pages.stats
    shown = [*page.top, *(p for _, group in page.quantiles for p in group)]
    content: dict[str, Any] = {
        "tokens": int(stats.token_count[feature]),
        "documents": int(stats.doc_count[feature]),
        "maximum": _short(stats.maximum[feature]),
        "mean": _short(stats.mean_active[feature]),
        "histogram": stats.histogram[feature].tolist(),
        "top": [_passage(passage) for passage in page.top],
        "quantiles": [[q, [_passage(p) for p in group]] for q, group in page.quantiles],
        "from": {str(doc): documents[doc] for doc in {passage.doc for passage in shown}},
        "nearest": [
            [int(f), round(float(cosine), 3)]
            for f, cosine in zip(
                pages.near.features[feature], pages.near.cosines[feature], strict=True
            )
        ],
        "together": [
            [int(f), round(float(share), 4), int(count)]
            for f, share, count in zip(
                stats.partner[feature],
                stats.partner_jaccard[feature],
                stats.partner_count[feature],
                strict=True,
            )
            if f >= 0
        ],
        "across": [
            [str(ref), int(f), round(float(cosine), 3)]
            for ref, near in pages.across
            for f, cosine in zip(near.features[feature], near.cosines[feature], strict=True)
        ],
        "groups": [[group.name, group.of(feature)] for group in pages.groups],
        "geometry": {name: _short(value) for name, value in pages.geometry.of(feature).items()},
        "label": None
        if page.label is None
        else {
            "text": page.label.text,
            "score": page.label.score,
            "provenance": dict(page.label.provenance),
        },
        "promoted": None,
        "suppressed": None,
    }
    if (effects := pages.effects) is not None:
        for name, tokens, by in (
            ("promoted", effects.promoted, effects.promoted_by),
            ("suppressed", effects.suppressed, effects.suppressed_by),
        ):
            content[name] = [
                [pages.vocabulary.text(token), _short(value)]
                for token, value in zip(tokens[feature].tolist(), by[feature].tolist(), strict=True)
            ]
    return content


def _passage(passage: Passage) -> dict[str, Any]:
    return {
        "d": passage.doc,
        "p": passage.position,
        "v": _short(passage.value),
        "t": passage.pieces,
        "on": [[piece, _short(value)] for piece, value in passage.values.items()],
        "at": passage.peak,
        "c": passage.characters,
    }


def _short(value: Any) -> float:
    """At most four digits are shown, so no more are stored."""
    return float(f"{float(value):.4g}")


class _Words:
    """A table of strings without repeats."""

    def __init__(self) -> None:
        self.table: list[str] = []
        self._number: dict[str, int] = {}

    def __call__(self, word: str) -> int:
        if word not in self._number:
            self._number[word] = len(self.table)
            self.table.append(word)
        return self._number[word]
