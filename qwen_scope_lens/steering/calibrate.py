"""Measure typical activations, on texts that a model reads or in a feature store.

Both go through `Activity`, so the word means one number in the whole project. First tokens and
tokens of extreme norm are left out. `typical.py` holds the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import StoreMismatch, TooLittleData
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.residuals import iter_captures
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.saes.load import load_sae
from qwen_scope_lens.steering.readers import SAEs, by_address
from qwen_scope_lens.steering.typical import Calibration, Typical, split_refs
from qwen_scope_lens.stores.facts import model_facts
from qwen_scope_lens.version import versions

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = [
    "Activity",
    "activity_in_store",
    "calibrate",
    "calibrate_from_store",
]


def calibrate(
    model: Any,
    refs: Iterable[FeatureRef | LayerRef | str],
    texts: Iterable[Content],
    saes: SAEs = None,
    *,
    allow_other_model: bool = False,
    **options: Any,
) -> Calibration:
    """Run texts through a model and count how features fire.

    `refs` are features, or SAEs, which stand for all of their features that fire. `options` are
    those of `iter_captures`.
    """
    wanted = split_refs(refs)
    for row in dict.fromkeys(sae.row for sae in wanted):
        check_backbone(model, row, allow_other_model=allow_other_model)
    known = by_address(saes)
    layers: dict[int, list[LayerRef]] = {}
    for sae in wanted:
        layers.setdefault(sae.layer, []).append(sae)
        if str(sae) not in known:
            known[str(sae)] = load_sae(sae)
    sums = {sae: Activity(sae.row.d_sae) for sae in wanted}
    documents = 0
    for read in iter_captures(model, texts, layers, **options):
        documents += len(read)
        for layer, members in layers.items():
            x = read.residuals[layer][read.keep(layer)]
            for sae in members:
                own = known[str(sae)]
                sums[sae].add(own.encode_sparse(x.to(own.W_dec.device)))
    facts = asdict(model_facts(model, layers))
    return _result(wanted, sums, {"model": facts, "documents": documents})


def calibrate_from_store(
    store: FeatureStore, refs: Iterable[FeatureRef | LayerRef | str]
) -> Calibration:
    """The same as `calibrate`, from the codes of a feature store; no model is run."""
    wanted = split_refs(refs)
    sums = {}
    for sae in wanted:
        stored = str(store.sae(sae.layer).ref)
        if stored != str(sae):
            raise StoreMismatch(
                f"the store holds codes of {stored} at layer {sae.layer}, not of {sae}: extract"
                f" with {sae}, or calibrate features of {stored}"
            )
        sums[sae] = activity_in_store(store, sae.layer)
    facts = asdict(store.manifest.model)
    return _result(wanted, sums, {"model": facts, "documents": store.n_docs})


class Activity:
    """How all features of one SAE fire on some tokens. Every attribute is `[d_sae]` float64."""

    def __init__(self, d_sae: int) -> None:
        self.tokens = 0
        self.sum = torch.zeros(d_sae, dtype=torch.float64)
        self.count = torch.zeros(d_sae, dtype=torch.float64)
        self.largest = torch.zeros(d_sae, dtype=torch.float64)

    def add(self, codes: SparseCodes) -> None:
        """Count the codes `[.., k]` of more tokens."""
        flat = codes.flatten().detach()
        self.tokens += len(flat)
        index = flat.indices[flat.active].long().cpu()
        values: Tensor = flat.values[flat.active].double().cpu()
        self.sum.index_add_(0, index, values)
        self.count.index_add_(0, index, torch.ones_like(values))
        self.largest.scatter_reduce_(0, index, values, "amax")

    @property
    def typical(self) -> Tensor:
        """The typical activation: the mean over the tokens where the feature fires, else 0."""
        return self.sum / self.count.clamp(min=1)


def activity_in_store(store: FeatureStore, layer: int) -> Activity:
    """How the features of a layer fire in a store, without first and extreme-norm tokens."""
    found = Activity(store.sae(layer).d_sae)
    for block in store.iter_blocks(layer, keep=True):
        found.add(block.codes)
    return found


def _result(
    wanted: Mapping[LayerRef, Sequence[int] | None],
    sums: Mapping[LayerRef, Activity],
    provenance: dict[str, Any],
) -> Calibration:
    tokens = max(one.tokens for one in sums.values())
    if not tokens:
        raise TooLittleData(
            "the texts have no token that counts: every token is the first of its text or has an"
            " extreme norm. Give longer texts"
        )
    facts = {}
    for sae, features in wanted.items():
        own = sums[sae]
        typical = own.typical
        listed = own.count.nonzero().flatten().tolist() if features is None else sorted(features)
        for feature in listed:
            fired = int(own.count[feature])
            if fired:
                facts[str(sae.feature(feature))] = Typical(
                    mean=float(typical[feature]),
                    largest=float(own.largest[feature]),
                    fired=fired,
                    rate=fired / own.tokens,
                )
    made_with = {"saes": [str(sae) for sae in wanted], "versions": versions()}
    return Calibration(facts, {**provenance, "tokens": tokens, **made_with})
