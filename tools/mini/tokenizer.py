"""Step 2: the tokenizer. Byte-level BPE with Qwen's pretokenisation, special tokens and no BOS.

Special tokens stand after the vocabulary, as Qwen's do; the vocabulary has room for the whole byte
alphabet, so that any text goes through. Usage: `python -m tools.mini.tokenizer`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from tools.mini.corpus import read, work_folder
from tools.mini.durations import measured

__all__ = ["CHAT_TEMPLATE", "SPECIAL", "VOCAB_SIZE", "build"]

BPE_SIZE = 6000
VOCAB_SIZE = 6016
"""Rows of the embedding: BPE, special tokens, and padding to a multiple of 64."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTROL = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""One token each, but part of the text as in Qwen3: not removed by `skip_special_tokens`."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)


def build(work: Path) -> Path:
    """Train on the training split and write `tokenizer/`, loadable by AutoTokenizer."""
    texts = [record["text"] for record in read(work, "train")]
    random.Random(5).shuffle(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(SPLIT), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_SIZE,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    chopped = (_without_markers(text) for text in texts)
    tokenizer.train_from_iterator(chopped, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in CONTROL])
    folder = work / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 1024,
        "split_special_tokens": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8"
    )
    return folder


def _without_markers(text: str) -> str:
    for token in (*SPECIAL, *CONTROL):
        text = text.replace(token, "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default=None)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    work = work_folder(arguments.work)
    if (work / "tokenizer" / "tokenizer_config.json").is_file() and not arguments.again:
        print("tokenizer: already there")
        return
    with measured(work, "tokenizer"):
        folder = build(work)
    print("tokenizer:", folder, (folder / "tokenizer.json").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
