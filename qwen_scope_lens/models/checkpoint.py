"""A model's configuration and tokenizer, by folder or name, opened without running any of its code.

Whoever opens either goes through here: a folder that brings Python code of its own is refused and
nobody is asked, what is damaged has a named error, and only regular files are opened.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import (
    CheckpointMissing,
    NotACheckpoint,
    ScopeError,
    UnsafeCheckpoint,
    WrongTokenizer,
)

__all__ = ["check_folder", "in_short", "open_config", "open_tokenizer"]

TRUST = "trust_remote_code"
_FOLDERS = (".", "additional_chat_templates")


def open_config(name: str, **source: Any) -> Any:
    """transformers' configuration of a model. `source` may have `trust_remote_code=True`."""
    import transformers

    check_folder(name)
    source = {TRUST: False, **source}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **source)
    except ScopeError:
        raise
    except OSError as error:
        raise CheckpointMissing(
            f"{name} cannot be loaded as a model, from a folder or from the hub: {in_short(error)}"
        ) from error
    except Exception as error:  # libraries raise every kind here: KeyError, their own, ...
        _refuse_code(name, TRUST in str(error))
        raise NotACheckpoint(
            f"{name} is no model that transformers can open: expected a hub name, or a folder with"
            f" the config.json of a Qwen model ({in_short(error)})"
        ) from error
    _refuse_code(name, bool(getattr(config, "auto_map", None)) and not source[TRUST])
    kernel = getattr(config, "_attn_implementation_internal", None)
    _refuse_code(name, "/" in str(kernel) and not source[TRUST])  # a repository of compiled code
    return config


def open_tokenizer(name: str, **source: Any) -> Any:
    """transformers' tokenizer of a model; OSError where there is none."""
    import transformers

    check_folder(name)
    source = {TRUST: False, **source}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
    except OSError:
        raise
    except Exception as error:
        _refuse_code(name, TRUST in str(error))
        raise WrongTokenizer(
            f"the tokenizer of {name} is damaged, or none that transformers can open"
            f" ({in_short(error)}): fetch its files again"
        ) from error
    own = getattr(tokenizer, "init_kwargs", {}).get("auto_map")
    _refuse_code(name, bool(own) and not source[TRUST])
    return tokenizer


def check_folder(name: str) -> None:
    """Raise where a model's folder holds a FIFO, a socket or a device under the name of a file."""
    for inner in _FOLDERS:
        folder = Path(name) / inner
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                known = entry.is_file() or entry.is_dir() or not os.path.exists(entry.path)
                if not known:
                    raise NotACheckpoint(
                        f"{entry.path} is neither a file nor a folder: nothing of {name} was"
                        " opened. Remove it, or fetch the model again"
                    )


def in_short(error: BaseException) -> str:
    """What a library says, on one line."""
    said = " ".join(str(error).split())
    return said[:200] or type(error).__name__


def _refuse_code(name: str, has_code: bool) -> None:
    if has_code:
        raise UnsafeCheckpoint(
            f"{name} brings Python code of its own, and nothing of it was run. Where you have read"
            " that code and trust it: load_model(..., trust_remote_code=True) in Python; where it"
            " is a plain Qwen model: remove auto_map from the files of a copy"
        )
