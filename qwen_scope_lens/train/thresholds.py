"""Mean pre-activations of chosen features on each language, before ReLU and top-k: alpha of Eq. 26.

A store keeps only values after top-k, so the model reads the documents again. It reads the token
ids of the store, not the texts, so that truncation and chat templates are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.models.architecture import Model
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.stores.facts import check_model
from qwen_scope_lens.stores.reread import StoreReader
from qwen_scope_lens.train.penalty import FeatureRows

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["mean_pre_activations"]


def mean_pre_activations(
    store: FeatureStore,
    refs: Sequence[FeatureRef],
    docs_of: Mapping[str, np.ndarray],
    model: Model | None = None,
) -> dict[FeatureRef, dict[str, float]]:
    """`{feature: {language: mean}}` over the kept tokens of each language's documents.

    `docs_of` gives the numbers of each language's documents in the store. The default `model` is
    the one that filled the store; a model with another backbone is refused.
    """
    layers = sorted({ref.layer for ref in refs})
    numbers = {
        layer: list(dict.fromkeys(ref.feature for ref in refs if ref.layer == layer))
        for layer in layers
    }
    reading = StoreReader.of(store, layers)
    if model is None:
        model = reading.open_model()
    check_model(model, refs[0].sae.row)  # the width
    check_backbone(model, refs[0].sae.row)
    rows = {
        layer: FeatureRows.of(open_sae(store.sae(layer).ref), numbers[layer]) for layer in layers
    }
    means: dict[FeatureRef, dict[str, float]] = {ref: {} for ref in refs}
    for language, docs in docs_of.items():
        sums = {layer: torch.zeros(len(numbers[layer]), dtype=torch.float64) for layer in layers}
        tokens = dict.fromkeys(layers, 0)
        ids = [found for doc in docs if len(found := store.token_ids(int(doc)).tolist())]
        for read in reading.captures(model, ids):
            for layer in layers:
                x = read.residuals[layer][read.keep(layer)]
                found = rows[layer].to(x.device).pre_activations(x)
                sums[layer] += found.double().sum(dim=0).cpu()
                tokens[layer] += len(x)
        for ref in means:
            count = tokens[ref.layer]
            if not count:
                raise TooLittleData(
                    f"{language!r} has no token that counts: its documents are too short"
                )
            at = numbers[ref.layer].index(ref.feature)
            means[ref][language] = float(sums[ref.layer][at] / count)
    return means
