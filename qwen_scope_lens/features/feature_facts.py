"""What is known of one feature without running the model: for whoever shows a single feature."""

from __future__ import annotations

from typing import Any

import torch

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.features.reading import Labels
from qwen_scope_lens.features.token_effects import TokenEffects, nearest
from qwen_scope_lens.models.token_text import Vocabulary
from qwen_scope_lens.saes.layer_sae import LayerSAE

__all__ = ["feature_facts"]


@torch.no_grad()
def feature_facts(
    ref: FeatureRef,
    sae: LayerSAE,
    effects: TokenEffects,
    vocabulary: Vocabulary,
    labels: Labels,
    neighbours: int,
) -> dict[str, Any]:
    """Promoted and suppressed tokens, the nearest features of the layer, and the geometry.

    `effects` are those of the feature alone, `[1, count]`. The values are plain JSON.
    """
    direction = sae.direction([ref.feature]).detach()
    beside = nearest(direction, neighbours + 1, among=sae.W_dec.detach())
    near = [
        (ref.sae.feature(other), cosine)
        for other, cosine in zip(
            beside.features[0].tolist(), beside.cosines[0].tolist(), strict=True
        )
        if other != ref.feature
    ]
    write, read = direction[0].float(), sae.encoder_row(ref.feature).detach().float()
    return {
        "promoted": _tokens(vocabulary, effects.promoted[0], effects.promoted_by[0]),
        "suppressed": _tokens(vocabulary, effects.suppressed[0], effects.suppressed_by[0]),
        "nearest": [[str(one), cosine, labels.text(one)] for one, cosine in near[:neighbours]],
        "geometry": {
            "decoder_norm": float(write.norm()),
            "encoder_norm": float(read.norm()),
            "cosine": float(torch.nn.functional.cosine_similarity(write, read, dim=0)),
            "bias": float(sae.b_enc[ref.feature]),
        },
    }


def _tokens(vocabulary: Vocabulary, ids: Any, logits: Any) -> list[list[Any]]:
    return [
        [vocabulary.text(token), logit]
        for token, logit in zip(ids.tolist(), logits.tolist(), strict=True)
    ]
