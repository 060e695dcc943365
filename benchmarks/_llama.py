"""What the benchmarks with llama.cpp share: a model as a GGUF file in float32, and a plan.

llama.cpp has a converter of its own for the models of the hub. This one is for models that it does
not know by name: the minis, and Qwen2 and Qwen3 models in a folder.

    python benchmarks/_llama.py mini-qwen3 mini.gguf
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

from qwen_scope_lens.steering import Plan, calibrate

__all__ = ["make_plan", "write_model"]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_model(hf: Any, path: Path, tokenizer: Any = None) -> Path:
    """Write the weights, and the vocabulary where a tokenizer is given."""
    cfg = hf.config
    writer = gguf.GGUFWriter(str(path), cfg.model_type)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    head = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(float(cfg.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_vocab_size(cfg.vocab_size)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        _add_vocabulary(writer, tokenizer, cfg.vocab_size)
    for name, value in hf.state_dict().items():
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        writer.add_tensor(gguf_name(name), value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")  # weight or bias
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def _add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Qwen's byte-level BPE, which llama.cpp calls gpt2 with the splitting of qwen2."""
    known, added = len(tokenizer), tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(size):
        entry = added.get(number)
        if entry is not None:
            kind = kinds.CONTROL if entry.special else kinds.USER_DEFINED
        else:
            kind = kinds.NORMAL if number < known else kinds.UNUSED
        name = tokenizer.convert_ids_to_tokens(number) if number < known else f"[PAD{number}]"
        tokens.append(str(entry.content if entry is not None else name))
        types.append(kind)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(int(tokenizer.eos_token_id))
    writer.add_add_bos_token(False)


def make_plan(bridge: Any, group: str, layers: Sequence[str], documents: Sequence[str]) -> Plan:
    """Three features in two layers that fire in these texts, half up and half down."""
    low, high = (f"{group}/{layer}" for layer in layers)
    found = calibrate(bridge, [low, high], documents)
    common = sorted(found, key=lambda ref: -found.facts[ref].rate)
    three = [
        *[ref for ref in common if ref.startswith(f"{low}/")][5:6],
        *[ref for ref in common if ref.startswith(f"{high}/")][5:7],
    ]
    edits = [f"{ref}:add:{sign}1typical@first" for ref, sign in zip(three, "+-+", strict=True)]
    return Plan(edits).calibrated(found)


if __name__ == "__main__":
    import sys

    import torch

    from qwen_scope_lens.models import load_model

    name, out = sys.argv[1:]
    bridge = load_model(name, dtype=torch.float32)
    tokenizer = bridge.tokenizer
    write_model(bridge.release(), Path(out), tokenizer)
