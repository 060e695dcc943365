"""Neuronpedia's public export layout, so that a layer's features can be imported there.

    v1/<model>/<layer>-<set>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
    v1/<model>/<layer>-<set>/{features,activations,explanations}/batch-<n>.jsonl.gz

Only columns of Neuronpedia's own tables are written. `neuronpedia_id` gives the identifier that
SAELens carries in `cfg.metadata.neuronpedia_id`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import UnknownName
from qwen_scope_lens.files import refuse_other_folder, whole_folder
from qwen_scope_lens.hosted import ours, verified_id
from qwen_scope_lens.site.layer import FeaturePage, LayerPages
from qwen_scope_lens.site.passages import Passage

__all__ = ["Release", "neuronpedia_id", "source_id", "write_neuronpedia"]

BATCH = 128
"""Features a batch file, as Neuronpedia's own runner writes."""

IMPORTER = "clkht01d40000jv08hvalcvly"
"""The user that a fresh Neuronpedia database has; imports of its public exports name it."""

MARK = "neuronpedia.json"
"""Says that a folder is such an export, so that it may be replaced by a newer one."""


@dataclass(frozen=True)
class Release:
    """What an export says about itself."""

    name: str = "qwen-scope"
    title: str = "Qwen-Scope"
    creator: str = "qwen-scope-lens"
    creator_id: str = IMPORTER
    url: str | None = None
    dataset: str | None = None
    model: str | None = None  # its id on Neuronpedia; None: ours
    vectors: bool = False  # with every feature's direction: gigabytes for a real layer


def model_id(ref: LayerRef, release: Release | None = None) -> str:
    """The model's name. Neuronpedia allows letters, digits, dots and dashes."""
    name = (release.model if release else None) or _id(ref)[0]
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise UnknownName(
            f"{name!r} cannot be a model's id on Neuronpedia: lower-case letters, digits, dots,"
            " dashes and underscores"
        )
    return name


def set_name(ref: LayerRef) -> str:
    """All layers of one group: theirs where it was verified, else `qwenscope-res-64k-l0-50`."""
    return source_id(ref).partition("-")[2]


def source_id(ref: LayerRef) -> str:
    return _id(ref)[1]


def _id(ref: LayerRef) -> tuple[str, str]:
    """Model and source: Neuronpedia's own where `qsl label import` verified it."""
    model, _, source = (verified_id(ref) or ours(ref)).partition("/")
    return model, source


def neuronpedia_id(ref: LayerRef, release: Release | None = None) -> str:
    """`<model>/<layer>-<set>`: for SAELens's `cfg.metadata.neuronpedia_id`."""
    return f"{model_id(ref, release)}/{source_id(ref)}"


def write_neuronpedia(
    out: Path,
    layers: Iterable[LayerPages],
    release: Release | None = None,
    *,
    n_prompts: int,
    prompt_tokens: int | None,
    progress: bool = False,
) -> Path:
    """Write all layers below `out/v1`, whole or not at all."""
    release = release or Release()
    refuse_other_folder(out, "an export for Neuronpedia", MARK)
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    ids = []
    with whole_folder(out) as folder:
        for pages in layers:
            place = folder / "v1" / model_id(pages.ref, release) / source_id(pages.ref)
            place.mkdir(parents=True)
            facts = _Facts(pages, release, now, n_prompts, prompt_tokens)
            for name, row in facts.metadata().items():
                _write_lines(place / f"{name}.jsonl", [row])
            _write_features(place, facts, progress)
            ids.append(neuronpedia_id(pages.ref, release))
        (folder / MARK).write_text(json.dumps({"sources": ids}) + "\n")
    return out


@dataclass(frozen=True, eq=False)
class _Facts:
    """One source, as rows of Neuronpedia's tables."""

    pages: LayerPages
    release: Release
    now: str
    n_prompts: int
    prompt_tokens: int | None

    @property
    def names(self) -> dict[str, str]:
        """The columns that every row of the three tables has."""
        ref = self.pages.ref
        return {"modelId": model_id(ref, self.release), "layer": source_id(ref)}

    def metadata(self) -> dict[str, dict[str, Any]]:
        ref, release = self.pages.ref, self.release
        row, model = ref.row, model_id(ref, release)
        owner = {"creatorId": release.creator_id, "createdAt": self.now}
        urls = [release.url] if release.url else []
        return {
            "release": {
                "name": release.name,
                "visibility": "PUBLIC",
                "description": release.title,
                "descriptionShort": release.title,
                "urls": urls,
                "creatorName": release.creator,
                "creatorNameShort": release.creator,
                "defaultUmapSourceIds": [],
                **owner,
            },
            "model": {
                "id": model,
                "displayName": row.backbone.model_id.split("/")[-1],
                "displayNameShort": row.backbone.model_id.split("/")[-1],
                "instruct": row.backbone.tuning == "instruct",
                "dimension": row.d_model,
                "layers": row.backbone.num_layers,
                "neuronsPerLayer": 0,
                "owner": row.backbone.model_id.split("/")[0],
                "visibility": "PUBLIC",
                "updatedAt": self.now,
                **owner,
            },
            "sourceset": {
                "modelId": model,
                "name": set_name(ref),
                "description": f"Residual stream - {row.d_sae:,}, k = {row.k}",
                "type": "sae",
                "urls": urls,
                "creatorName": release.creator,
                "releaseName": release.name,
                "visibility": "PUBLIC",
                "hasDashboards": True,
                "allowInferenceSearch": False,
                **owner,
            },
            "source": {
                "id": source_id(ref),
                "modelId": model,
                "setName": set_name(ref),
                "hasDashboards": True,
                "inferenceEnabled": False,
                "saelensRelease": row.release if row.origin != "local" else None,
                "saelensSaeId": f"layer{ref.layer}",
                "hfRepoId": row.repo_id if row.origin in ("official", "third-party") else None,
                "hfFolderId": None,
                "visibility": "PUBLIC",
                "num_prompts": self.n_prompts,
                "num_tokens_in_prompt": self.prompt_tokens,
                "dataset": release.dataset,
                "notes": f"Features {ref} of qwen-scope-lens",
                **owner,
            },
        }

    def feature(self, page: FeaturePage) -> dict[str, Any]:
        pages, number = self.pages, page.feature
        stats, effects = pages.stats, pages.effects
        counts = stats.histogram[number]
        used = np.flatnonzero(counts)
        bins = slice(used[0], used[-1] + 1) if len(used) else slice(0, 0)
        centres = (stats.bin_edges[:-1] * stats.bin_edges[1:]) ** 0.5
        partners = stats.partner[number] >= 0
        tokens: dict[str, list[Any]] = {}
        if effects is not None:
            text = pages.vocabulary.text
            tokens = {
                "pos_str": [_text(text(t)) for t in effects.promoted[number].tolist()],
                "pos_values": _floats(effects.promoted_by[number]),
                "neg_str": [_text(text(t)) for t in effects.suppressed[number].tolist()],
                "neg_values": _floats(effects.suppressed_by[number]),
            }
        vector = pages.directions[number].tolist() if self.release.vectors else []
        return {
            **self.names,
            "index": str(number),
            "creatorId": self.release.creator_id,
            "createdAt": self.now,
            "sourceSetName": set_name(pages.ref),
            "maxActApprox": _float(stats.maximum[number]),
            "frac_nonzero": _float(stats.density[number]),
            "hasVector": bool(vector),
            "vector": vector,
            "hookName": pages.ref.row.hook_name(pages.ref.layer),
            "topkCosSimIndices": pages.near.features[number].tolist(),
            "topkCosSimValues": _floats(pages.near.cosines[number]),
            "correlated_features_indices": stats.partner[number][partners].tolist(),
            "freq_hist_data_bar_heights": counts[bins].tolist(),
            "freq_hist_data_bar_values": _floats(centres[bins]),
            **tokens,
        }

    def activations(self, page: FeaturePage) -> list[dict[str, Any]]:
        stats, number = self.pages.stats, page.feature
        rows = [
            self._activation(page, p, (-1.0, float(stats.maximum[number]), -1.0)) for p in page.top
        ]
        counts, edges = stats.histogram[number], stats.bin_edges
        for _, group in page.quantiles:
            for passage in group:
                place = int(
                    np.clip(np.searchsorted(edges, passage.value, "right") - 1, 0, len(counts) - 1)
                )
                share = float(counts[place] / max(1, counts.sum()))
                rows.append(
                    self._activation(page, passage, (edges[place], edges[place + 1], share))
                )
        for i, row in enumerate(rows):
            row["id"] = _identifier(*self.names.values(), number, "activation", i)
        return rows

    def _activation(
        self, page: FeaturePage, passage: Passage, bounds: tuple[float, float, float]
    ) -> dict[str, Any]:
        values = [_float(passage.values.get(i, 0.0)) for i in range(len(passage.pieces))]
        strongest = max(values)
        return {
            **self.names,
            "index": str(page.feature),
            "tokens": [_text(piece) for piece in passage.pieces],
            "values": values,
            "maxValue": strongest,
            "maxValueTokenIndex": values.index(strongest),
            "minValue": min(values),
            "dataIndex": str(passage.doc),
            "binMin": _float(bounds[0]),
            "binMax": _float(bounds[1]),
            "binContains": _float(bounds[2]),
            "qualifyingTokenIndex": passage.peak,
            "creatorId": self.release.creator_id,
            "createdAt": self.now,
        }

    def explanations(self, page: FeaturePage) -> list[dict[str, Any]]:
        """The label, if there is one. Types and models of explanations are foreign keys of the
        target's database, so provenance goes into the notes."""
        if (label := page.label) is None:
            return []
        said = {"score": label.score, **label.provenance}
        return [
            {
                "id": _identifier(*self.names.values(), page.feature, "explanation"),
                **self.names,
                "index": str(page.feature),
                "description": _text(label.text),
                "authorId": self.release.creator_id,
                "notes": json.dumps(said, ensure_ascii=False),
                "createdAt": self.now,
                "updatedAt": self.now,
            }
        ]


def _write_features(place: Path, facts: _Facts, progress: bool) -> None:
    d_sae = facts.pages.stats.d_sae
    title = f"export of {facts.pages.ref}"
    with tqdm(total=d_sae, desc=title, disable=not progress, unit="feature") as bar:
        for number, start in enumerate(range(0, d_sae, BATCH)):
            batch = facts.pages.pages(range(start, min(start + BATCH, d_sae)))
            tables = {
                "features": [facts.feature(page) for page in batch],
                "activations": [row for page in batch for row in facts.activations(page)],
                "explanations": [row for page in batch for row in facts.explanations(page)],
            }
            for name, rows in tables.items():
                if rows:
                    _write_lines(place / name / f"batch-{number}.jsonl.gz", rows)
            bar.update(len(batch))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)


def _identifier(*parts: object) -> str:
    """An id of the length of Neuronpedia's ids, the same for the same feature and place."""
    return "c" + hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:24]


def _text(text: str) -> str:
    """The text without the character 0, which PostgreSQL refuses."""
    return text.replace("\0", "␀")


def _float(value: Any) -> float:
    return float(f"{float(value):.6g}")


def _floats(values: Any) -> list[float]:
    return [_float(value) for value in values]
