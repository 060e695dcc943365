"""The embedded default: tiny trained Qwen3 and Qwen3.5 models with a TopK SAE for every layer.

This module only says where the files lie; nothing is loaded here. The folders have the layout of
the official repositories, so whatever opens a Qwen model or a Qwen-Scope SAE from a folder opens
these: `MINI_HOME/<model>` and `MINI_HOME/<SAE repository>/layer{n}.sae.pt`. How they were made is
`mini/train/`, what they are good for is the model card `README.md` beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["HELDOUT", "MINI_HOME", "MODELS", "SAES", "heldout", "model_path", "sae_folder"]

MINI_HOME = Path(__file__).parent
"""Holds one folder a model and one folder a repository of SAEs."""

HELDOUT = MINI_HOME / "heldout.jsonl"
"""A labelled sample of texts that neither models nor SAEs were trained on."""

MODELS = ("mini-qwen3", "mini-qwen3.5")

SAES = {
    "mini-qwen3": "SAE-Res-mini-qwen3-W1K-L0_16",
    "mini-qwen3.5": "SAE-Res-mini-qwen3.5-W1K-L0_16",
}
"""Model -> its repository of SAEs."""


def model_path(model: str) -> Path:
    """The folder to give to `from_pretrained`: weights, configuration and tokenizer."""
    return MINI_HOME / _known(model)


def sae_folder(model: str) -> Path:
    """The folder with `config.json` and one `layer{n}.sae.pt` a layer."""
    return MINI_HOME / SAES[_known(model)]


def heldout(domain: str | None = None, lang: str | None = None) -> Iterator[dict[str, Any]]:
    """Held-out documents: `text`, `lang`, `domain`, `label` and what the domain adds in `extra`."""
    with HELDOUT.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if domain in (None, record["domain"]) and lang in (None, record["lang"]):
                yield record


def _known(model: str) -> str:
    if model not in MODELS:
        raise KeyError(f"no mini model is named {model!r}: there are {', '.join(MODELS)}")
    return model
