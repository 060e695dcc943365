"""Pooled residuals of a store's documents: the model is read again, for probes beside a ranking.

A store keeps sparse codes only. Reading tokens is `models/residuals.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["pooled_residuals"]


def pooled_residuals(
    store: FeatureStore,
    layers: Iterable[int],
    model: Any = None,
    *,
    last: bool = False,
    keep: bool = True,
    **capture_options: Any,
) -> dict[int, np.ndarray[Any, Any]]:
    """`{layer: [n_docs, d_model]}`: the mean residual of each document's tokens, or its last one.

    `model` is the store's own unless given. Documents are cut where the store cut them. A document
    without a kept token has a row of zeros, as it has no features.
    """
    from tqdm import tqdm

    from qwen_scope_lens.models.load import load_model
    from qwen_scope_lens.models.residuals import iter_captures

    wanted = sorted(set(layers))
    table = store.documents(["text", "n_tokens"])
    texts, lengths = table["text"].to_pylist(), table["n_tokens"].to_pylist()
    if model is None:
        model = load_model(store.manifest.model.id, up_to_layer=max(wanted))
    out: dict[int, np.ndarray[Any, Any]] = {}
    captures = iter_captures(
        model, texts, wanted, max_tokens=max(lengths), truncate=True, **capture_options
    )
    with tqdm(total=len(texts), unit="doc", desc="residuals", disable=None) as bar:
        for batch in captures:
            starts, ends = batch.offsets[:-1].tolist(), batch.offsets[1:].tolist()
            for layer in wanted:
                x = batch.residuals[layer].float().cpu().numpy()
                kept = batch.keep(layer).cpu().numpy()
                rows = out.setdefault(layer, np.zeros((len(texts), x.shape[1]), np.float32))
                for doc, start, end in zip(batch.doc_ids, starts, ends, strict=True):
                    if last:
                        rows[doc] = x[end - 1]
                        continue
                    mine = x[start:end][kept[start:end]] if keep else x[start:end]
                    if len(mine):
                        rows[doc] = mine.mean(0)
            bar.update(len(batch))
    return out
