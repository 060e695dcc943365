"""Activations per token, as they come back with the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.features.reading import EXTREME, FIRST
from qwen_scope_lens.models.residuals import EXTREME_NORM_RATIO
from qwen_scope_lens.serve.asking import Watching
from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.rows import Row
from qwen_scope_lens.serve.text import Characters

__all__ = ["Records"]


class Records:
    """Makes the records of one reply, from the residuals that its row has collected."""

    def __init__(self, lens: Lens, row: Row, watching: Watching) -> None:
        self._lens, self._row, self._watching = lens, row, watching
        self._parts = self._tokens = 0
        self._characters = Characters(lens.vocabulary)
        self._median: dict[int, float] = {}
        self._by_layer: dict[int, list[FeatureRef]] = {}
        for ref in watching.monitor:
            self._by_layer.setdefault(ref.layer, []).append(ref)

    def more(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The records that have become known: of the prompt, and of the reply."""
        row, layers = self._row, self._watching.layers
        if not layers or not row.residuals:
            return [], []
        count = min(len(row.residuals[layer]) for layer in layers)
        if count == self._parts:
            return [], []
        parts = {layer: row.residuals[layer][self._parts : count] for layer in layers}
        self._parts = count
        x = {layer: torch.cat(list(tensors)) for layer, tensors in parts.items()}
        ids, first = row.ids, self._tokens
        self._tokens += len(x[layers[0]])
        rows: list[dict[str, Any]] = []
        for number in range(first, self._tokens):
            token = ids[number]
            special = token in self._lens.engine.special
            words = self._lens.vocabulary.text(token) if special else self._characters.add(token)
            prompt = len(row.wanted.prompt)
            rows.append(
                {
                    "index": number if number < prompt else number - prompt,
                    "id": token,
                    "text": words,
                    "special": special,
                    "monitor": {},
                    "explain": {},
                    "note": FIRST if number == 0 else "",
                }
            )
        for layer in layers:
            self._fill(layer, x[layer], rows)
        prompts = max(0, len(row.wanted.prompt) - first)
        return rows[:prompts], rows[prompts:]

    def _fill(self, layer: int, x: Tensor, rows: list[dict[str, Any]]) -> None:
        norms = x.float().norm(dim=-1)
        if layer not in self._median:
            rest = norms[1:] if len(norms) > 1 else norms
            self._median[layer] = float(rest.median())
        extreme = (norms > EXTREME_NORM_RATIO * self._median[layer]).tolist()
        codes = self._lens.encode(layer, x)
        values = codes.values.masked_fill(~codes.active, 0).tolist()
        names = codes.indices.tolist()
        group, labels = self._lens.group.short, self._lens.labels
        for i, row in enumerate(rows):
            found = {f: v for f, v in zip(names[i], values[i], strict=True) if v > 0}
            for ref in self._by_layer.get(layer, ()):
                row["monitor"][str(ref)] = found.get(ref.feature, 0.0)
            if layer in self._watching.explain:
                best = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
                row["explain"][str(layer)] = [
                    {
                        "feature": str(ref := FeatureRef(group, layer, feature)),
                        "activation": value,
                        "label": labels.text(ref),
                    }
                    for feature, value in best[: self._watching.top]
                ]
            if extreme[i] and not row["note"]:
                row["note"] = EXTREME
