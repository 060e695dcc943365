"""The embedded default: tiny trained Qwen3 and Qwen3.5 models with a TopK SAE for every layer.

This module only tells where the files are; nothing is loaded here. The folders have the layout of
the official repositories, so whatever opens a Qwen model or a Qwen-Scope SAE from a folder opens
these: `MINI_HOME/<model>` and `MINI_HOME/<SAE repository>/layer{n}.sae.pt`. `tools/mini/`
made them; the model card `README.md` beside them tells what they are good for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_scope_lens.catalog import MINI_GROUPS, MINI_HOME

__all__ = [
    "HELDOUT",
    "MINI_HOME",
    "MODELS",
    "SAES",
    "heldout",
    "model_path",
    "sae_folder",
    "write_texts",
]

HELDOUT = MINI_HOME / "heldout.jsonl"
"""A labelled sample of texts that neither models nor SAEs were trained on."""

SAES = {group.backbone.key: group.repo_name for group in MINI_GROUPS}
"""The name of each model, and the repository of its SAEs."""

MODELS = tuple(SAES)


def model_path(model: str) -> Path:
    """The folder to give to `from_pretrained`: weights, configuration and tokenizer."""
    return MINI_HOME / _known(model)


def sae_folder(model: str) -> Path:
    """The folder with `config.json` and one `layer{n}.sae.pt` per layer."""
    return MINI_HOME / SAES[_known(model)]


def heldout(domain: str | None = None, lang: str | None = None) -> Iterator[dict[str, Any]]:
    """Held-out documents: `text`, `lang`, `domain`, `label` and what the domain adds in `extra`."""
    with HELDOUT.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if domain in (None, record["domain"]) and lang in (None, record["lang"]):
                yield record


def write_texts(folder: Path) -> list[Path]:
    """Write small files to try the verbs on, as `qsl mini texts` does; returns their paths.

    A file of yours is never replaced: it raises `BadFile`.
    """
    from qwen_scope_lens.mini import texts

    return texts.write_texts(folder)


def _known(model: str) -> str:
    if model not in MODELS:
        raise KeyError(f"no mini model is named {model!r}: there are {', '.join(MODELS)}")
    return model
