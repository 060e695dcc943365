"""A label export in Neuronpedia's layout, made with a mini: what its SAE does on some texts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import qwen_scope_lens as qsl
from qwen_scope_lens.models.tokenize import find_tokenizer


def write_batch(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


@torch.no_grad()
def write_export(
    root: Path, model: Any, sae: qsl.LayerRef, texts: Sequence[str], name: str
) -> Path:
    """`root/<name>` with explanations and activations of all features that fire on the texts."""
    place = root / name
    where = dict(zip(("modelId", "layer"), name.split("/"), strict=True))
    tokenizer = find_tokenizer(model)
    read = qsl.capture(model, texts, [sae.layer])
    own = qsl.load_sae(sae)
    rows: dict[int, list[dict[str, Any]]] = {}
    for i in range(len(read)):
        one = read.doc(i)
        codes = own.encode_sparse(one.residuals[sae.layer])
        spans = one.char_spans[0]
        assert spans is not None
        tokens = [texts[one.doc_ids[0]][a:b] for a, b in spans]
        assert len(tokens) == len(tokenizer(texts[one.doc_ids[0]])["input_ids"])
        for feature in codes.indices[1:][codes.active[1:]].unique().tolist():
            values = (codes.values * (codes.indices == feature)).sum(-1).tolist()
            row = {"index": str(feature), "tokens": tokens, "values": values, **where}
            row |= {"id": f"a{feature}-{i}", "maxValue": max(values), "minValue": min(values)}
            rows.setdefault(feature, []).append(row)
    listed = sorted(rows)
    half = len(listed) // 2
    for number, part in enumerate((listed[:half], listed[half:])):
        write_batch(
            place / "activations" / f"batch-{number}.jsonl.gz", (r for f in part for r in rows[f])
        )
        write_batch(
            place / "explanations" / f"batch-{number}.jsonl.gz",
            (
                {
                    "id": f"e{feature}",
                    "index": str(feature),
                    "description": f"words of kind {feature}",
                    "explanationModelName": "a-describer",
                    "typeName": "a-method",
                    "embedding": "[0.0, 1.0]",  # as text, as in published files
                    "createdAt": "2026-01-01T00:00:00Z",
                    **where,
                }
                for feature in part
            ),
        )
    (place / "source.jsonl").write_text(
        json.dumps({"id": where["layer"], "modelId": where["modelId"]}) + "\n"
    )
    return place
