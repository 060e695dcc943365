"""SAEs whose right answer is known: activations are made from the SAE's own features."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

D_MODEL, D_SAE, K, NUM_LAYERS = 64, 160, 4, 3


def tensors(
    seed: int = 0, d_model: int = D_MODEL, d_sae: int = D_SAE, b_dec: float = 2.0
) -> dict[str, torch.Tensor]:
    """A dictionary in the published layout whose encoder undoes its decoder, `b_dec` included."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=rng), dim=-1)
    bias = b_dec * torch.randn(d_model, generator=rng) / d_model**0.5 * 4
    return {
        "W_enc": directions.clone(),
        "W_dec": directions.T.contiguous(),
        "b_enc": -directions @ bias,
        "b_dec": bias,
    }


def activations(
    weights: dict[str, torch.Tensor], tokens: int = 512, k: int = K, seed: int = 1
) -> torch.Tensor:
    """`[tokens, d_model]`: k features per token, strong enough to be told apart, plus b_dec."""
    rng = torch.Generator().manual_seed(seed)
    d_sae = weights["W_enc"].shape[0]
    index = torch.stack([torch.randperm(d_sae, generator=rng)[:k] for _ in range(tokens)])
    values = 4 + torch.rand(tokens, k, generator=rng)
    codes = torch.zeros(tokens, d_sae).scatter_(1, index, values)
    return codes @ weights["W_dec"].T + weights["b_dec"]


def settings(**changes: object) -> dict[str, object]:
    return {
        "model_type": "topk_sae",
        "base_model": "somebody/their-model",
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "k": K,
        "num_layers": NUM_LAYERS,
        "hook_point": "resid_post",
        "dtype": "float32",
    } | changes


def write_group(folder: Path, layers: range = range(NUM_LAYERS), **changes: object) -> Path:
    """A repository in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings(**changes)))
    for layer in layers:
        torch.save(tensors(seed=layer), folder / f"layer{layer}.sae.pt")
    return folder


def saelens_sae(weights: dict[str, torch.Tensor], **config: object) -> TopKSAE:
    """The same weights as somebody's own SAELens SAE."""
    metadata = SAEMetadata(model_name="somebody/their-model", hook_name="blocks.1.hook_resid_post")
    sae = TopKSAE(
        TopKSAEConfig(
            **(
                {
                    "d_in": weights["b_dec"].numel(),
                    "d_sae": weights["b_enc"].numel(),
                    "k": K,
                    "apply_b_dec_to_input": False,
                    "metadata": metadata,
                }
                | config
            )
        )
    )
    state = {
        "W_enc": weights["W_enc"].T.contiguous(),
        "W_dec": weights["W_dec"].T.contiguous(),
        "b_enc": weights["b_enc"],
        "b_dec": weights["b_dec"],
    }
    sae.load_state_dict(state)
    return sae


def model_card_encode(weights: dict[str, torch.Tensor], x: torch.Tensor, k: int) -> torch.Tensor:
    """The published formula in float64, with the paper's ReLU; the independent reference."""
    pre = x.double() @ weights["W_enc"].double().T + weights["b_enc"].double()
    values, index = pre.relu().topk(k, dim=-1)
    return torch.zeros_like(pre).scatter_(-1, index, values)
