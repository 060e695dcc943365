"""Tiny random Qwen models of every supported class, and a byte-level Qwen-like tokenizer.

Nothing is downloaded. The weights are drawn large enough that layers differ visibly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_scope_lens.models import decoder_layers

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

D_MODEL = 32
N_LAYERS = 4
CONTEXT = 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
VOCAB = 256 + len(SPECIAL) + 3  # three unused rows, as the real models have

CLASSES = (
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
)

CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}"
    "{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{%- endif -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, Qwen's special tokens after them, `<|endoftext|>` as pad, no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def text_settings(kind: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "pad_token_id": 256,
        "eos_token_id": 258,
        "tie_word_embeddings": False,
    }
    if "Moe" in kind:
        settings |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    if "3_5" in kind:
        settings |= {
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 0],
                "mrope_interleaved": True,
            },
        }
    if "3_5Moe" in kind:
        settings |= {"shared_expert_intermediate_size": 16}
        del settings["intermediate_size"]
    return settings | changes


def make_config(kind: str, **changes: Any) -> Any:
    settings = text_settings(kind, **changes)
    if "3_5" not in kind:
        return getattr(transformers, kind.split("For")[0] + "Config")(**settings)
    family = kind.split("For")[0]
    if kind.endswith("ForCausalLM"):
        return getattr(transformers, family + "TextConfig")(**settings)
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": settings["hidden_size"],
        "num_position_embeddings": 16,
        "patch_size": 4,
    }
    return getattr(transformers, family + "Config")(
        text_config=settings,
        vision_config=vision,
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 3,
    )


def make_model(
    kind: str = "Qwen3ForCausalLM",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Any:
    torch.manual_seed(seed)
    # Not `.to(dtype)`: that would also round the rotary frequencies, which HF keeps in float32.
    model = (
        getattr(transformers, kind)._from_config(make_config(kind, **changes), dtype=dtype).eval()
    )
    model.generation_config.eos_token_id = [258, 256]
    model.generation_config.pad_token_id = 256
    return model


def make_sae(layer: int = 1, d_in: int = D_MODEL, d_sae: int = 64, k: int = 8) -> TopKSAE:
    """A random top-k SAE for `blocks.{layer}.hook_resid_post`."""
    torch.manual_seed(layer)
    cfg = TopKSAEConfig(
        d_in=d_in, d_sae=d_sae, k=k, dtype="float32", device="cpu", apply_b_dec_to_input=False
    )
    cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    cfg.metadata.prepend_bos = True
    sae = TopKSAE(cfg)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d_in, d_sae) / d_in**0.5)
        sae.W_dec.copy_(torch.randn(d_sae, d_in) / d_in**0.5)
        sae.b_dec.copy_(torch.randn(d_in) * 0.1)
    return sae


@contextmanager
def before_each_run(model: Any, do: Callable[[int, int], None]) -> Iterator[None]:
    """Call `do(texts, tokens per text)` whenever the model's first layer is about to run."""

    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        do(*hidden.shape[:2])

    handle = decoder_layers(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
