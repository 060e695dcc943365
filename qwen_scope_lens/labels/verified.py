"""Imports label exports: which of our SAEs do the labels belong to? Its texts are encoded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.labels.exports import (
    Agreement,
    Export,
    Passage,
    exports_in,
    labels_of,
    measure,
    require_candidates,
)
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.open import open_model
from qwen_scope_lens.models.residuals import iter_captures
from qwen_scope_lens.models.tokenize import find_tokenizer
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.tables import Table, View

__all__ = ["Imported", "Layer", "import_labels"]

LINE_BREAKS = {"↵": "\n", "⏎": "\n", "⇥": "\t", "Ġ": " ", "Ċ": "\n"}
"""How exports write characters that a page would not show."""


@dataclass(frozen=True)
class Layer:
    """The answer for one source: the SAE that the labels belong to, or None."""

    id: str
    sae: str | None
    labels: int
    tried: tuple[Agreement, ...]
    reason: str


@dataclass(frozen=True, repr=False)
class Imported(View):
    """Labels of the accepted layers, and how every source did."""

    pack: LabelPack
    layers: tuple[Layer, ...]

    def table(self, most: int | None = None) -> Table:
        """A row for every SAE that was tried for every source."""
        rows = [
            (
                layer.id,
                one.ref,
                one.passages,
                one.same_token,
                one.correlation,
                one.ratio,
                "accepted" if one.ref == layer.sae else "refused",
            )
            for layer in self.layers
            for one in layer.tried
        ]
        columns = ("source", "SAE", "passages", "same token", "correlation", "ratio", "answer")
        reasons = [f"{layer.id}: {layer.reason}" for layer in self.layers if layer.sae is None]
        return Table.of(
            columns,
            rows if most is None else rows[:most],
            below=(f"{len(self.pack):,} labels", *reasons),
            more=0 if most is None else max(0, len(rows) - most),
            formats={"same token": ".0%"},
        )


def import_labels(
    folder: str | Path,
    *,
    model: Any = None,
    features: int = 32,
    per_feature: int = 2,
    seed: int = 0,
    sae_folder: str | Path | None = None,
    device: str | None = None,
    allow_other_model: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Imported:
    """Read the exports below a folder, and check each layer before its labels are used.

    Args:
        model: a model in memory, or a name; by default the one that the SAEs were trained on.
        features, per_feature: how many features are checked on how many passages each.
    """
    tell = progress or (lambda line: None)
    packs, layers = [], []
    for export in exports_in(folder):
        refs = require_candidates(export)
        passages = export.passages(per_feature, features, seed)
        tell(f"{export.id}: {len(passages)} passages, tried with {', '.join(map(str, refs))}")
        tried = agreements(
            export, refs, passages, model, sae_folder, device, allow_other_model=allow_other_model
        )
        best, reason = _choice(tried)
        if best is None:
            layers.append(Layer(export.id, None, 0, tuple(tried), reason))
            continue
        sae = LayerRef.parse(best.ref)
        facts = {
            "verified": {
                "same_token": round(best.same_token, 4),
                "correlation": round(best.correlation, 4),
                "passages": best.passages,
            }
        }
        pack = labels_of(export, sae, facts)
        packs.append(pack)
        layers.append(Layer(export.id, str(sae), len(pack), tuple(tried), reason))
    return Imported(LabelPack.merge(packs), tuple(layers))


@torch.no_grad()
def agreements(
    export: Export,
    refs: Sequence[LayerRef],
    passages: Sequence[Passage],
    model: Any = None,
    sae_folder: str | Path | None = None,
    device: str | None = None,
    *,
    allow_other_model: bool = False,
) -> list[Agreement]:
    """Encode the passages with every SAE that the source can be, the best agreement first."""
    layer, row = refs[0].layer, refs[0].row
    source = model if model is not None else row.backbone.model_id
    running = (
        source
        if isinstance(source, torch.nn.Module)
        else open_model(source, up_to_layer=layer, device=device)
    )
    check_backbone(running, row, allow_other_model=allow_other_model)
    tokenizer = find_tokenizer(running)
    ids = [_ids(tokenizer, passage.tokens) for passage in passages]
    usable = [number for number, found in enumerate(ids) if found is not None]
    saes = {ref: open_sae(ref, folder=sae_folder, device=device or "cpu") for ref in refs}
    values: dict[LayerRef, dict[int, list[float]]] = {ref: {} for ref in refs}
    rows = [ids[number] for number in usable]
    for read in iter_captures(running, rows, [layer], truncate=True):  # type: ignore[arg-type]
        for i, doc in enumerate(read.doc_ids):
            number = usable[doc]
            x = read.doc(i).residuals[layer]
            for ref, sae in saes.items():
                codes = sae.encode_sparse(x.to(sae.W_dec.device)).to("cpu")
                mine = (codes.indices == passages[number].feature) & codes.active
                values[ref][number] = (codes.values * mine).sum(-1).float().tolist()
    found = [measure(passages, _whole(passages, values[ref]), ref) for ref in refs]
    return sorted(found, key=lambda one: (-one.same_token, -one.correlation))


def _whole(
    passages: Sequence[Passage], values: Mapping[int, list[float]]
) -> dict[int, list[float]]:
    """Without passages that were cut."""
    return {i: v for i, v in values.items() if len(v) == len(passages[i].values)}


def _choice(tried: Sequence[Agreement]) -> tuple[Agreement | None, str]:
    fits = [one for one in tried if one.accepted]
    if not fits:
        return None, "no SAE fires where the export says that its features fire"
    if len(fits) > 1 and fits[0].same_token - fits[1].same_token < 0.1:
        return None, f"{fits[0].ref} and {fits[1].ref} agree alike: the sample is too small"
    return fits[0], ""


def _ids(tokenizer: Any, tokens: Sequence[str]) -> list[int] | None:
    """The token ids of a passage, where our tokenizer cuts the text into the same tokens."""
    texts = ["".join(LINE_BREAKS.get(char, char) for char in token) for token in tokens]
    whole = tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True)
    if len(whole["input_ids"]) != len(texts):
        return None
    return list(whole["input_ids"])
