"""The sizes of the mini models, their SAEs and their training, as one table of facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM

from tools.mini.tokenizer import VOCAB_SIZE

__all__ = ["D_SAE", "SPECS", "K", "ModelSpec", "build_model"]

D_SAE = 1024
K = 16


@dataclass(frozen=True)
class ModelSpec:
    """One model and the run that trains it. Tokens are real ones, pads not counted."""

    name: str  # of its folder, and the last part of its model id
    family: str  # "qwen3" or "qwen3_5"
    tokens: int
    d_model: int = 128
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    d_mlp: int = 384
    batch_tokens: int = 2048
    lr_matrix: float = 0.02
    lr_rest: float = 0.004
    seed: int = 11
    snapshots: tuple[float, ...] = ()  # shares of the run after which the weights are kept

    @property
    def model_id(self) -> str:
        return f"qwen-scope-lens/{self.name}"


SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("mini-qwen3", "qwen3", tokens=9_000_000),
        ModelSpec("mini-qwen3.5", "qwen3_5", tokens=6_000_000),
    )
}


def build_model(spec: ModelSpec) -> Any:
    """The untrained model, initialised from the caller's random state."""
    head_dim = spec.d_model // spec.heads
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_mlp,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": 6002,
        "pad_token_id": 6000,
        "initializer_range": 0.02,
    }
    if spec.family == "qwen3":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        return Qwen3ForCausalLM(Qwen3Config(rope_parameters=rope, **common))
    hybrid = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    }
    config = Qwen3_5TextConfig(
        rope_parameters=hybrid,
        linear_num_key_heads=spec.heads,
        linear_num_value_heads=spec.heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        layer_types=[
            "full_attention" if layer % 4 == 3 else "linear_attention"
            for layer in range(spec.layers)
        ],
        **common,
    )
    return Qwen3_5ForCausalLM(config)
