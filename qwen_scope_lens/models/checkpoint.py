"""Open a model's configuration and tokenizer, by folder or name, without running its code.

All of the package opens them through this module. A folder that brings Python code of its own is
refused without asking, damaged files raise a named error, and only regular files are opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from qwen_scope_lens.errors import (
    CheckpointMissing,
    NotACheckpoint,
    ScopeError,
    UnsafeCheckpoint,
    WrongTokenizer,
)
from qwen_scope_lens.hub import only_cache, ways_out

__all__ = [
    "Tokenizer",
    "cache_only",
    "check_folder",
    "in_short",
    "may_be_on_hub",
    "missing",
    "open_config",
    "open_tokenizer",
]

TRUST = "trust_remote_code"
_FOLDERS = (".", "additional_chat_templates")


class Tokenizer(Protocol):
    """The methods of a tokenizer that this package calls. Those of transformers have them."""

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    def __len__(self) -> int: ...

    def __call__(self, text: Any, **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...

    def decode(self, token_ids: Any, **options: Any) -> str: ...


def open_config(name: str, **source: Any) -> Any:
    """The model's configuration, by transformers. `source` may have `trust_remote_code=True`."""
    import transformers

    check_folder(name)
    source = {TRUST: False, **source, **cache_only(name, source)}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **source)
    except ScopeError:
        raise
    except OSError as error:
        raise CheckpointMissing(missing(name, error)) from error
    except Exception as error:  # transformers raises errors of many kinds here
        _refuse_code(name, TRUST in str(error))
        raise NotACheckpoint(
            f"{name} is not a model that transformers can open: expected a hub name, or a folder"
            f" with the config.json of a Qwen model ({in_short(error)})"
        ) from error
    _refuse_code(name, bool(getattr(config, "auto_map", None)) and not source[TRUST])
    kernel = getattr(config, "_attn_implementation_internal", None)
    # A kernel with a slash in its name is a repository of compiled code.
    _refuse_code(name, "/" in str(kernel) and not source[TRUST])
    return config


def open_tokenizer(name: str, **source: Any) -> Tokenizer:
    """The model's tokenizer, by transformers. Raises OSError if there is none."""
    import transformers

    check_folder(name)
    source = {TRUST: False, **source, **cache_only(name, source)}
    try:
        tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
    except OSError:
        raise
    except Exception as error:
        _refuse_code(name, TRUST in str(error))
        raise WrongTokenizer(
            f"the tokenizer of {name} is damaged, or transformers cannot open it"
            f" ({in_short(error)}): fetch its files again"
        ) from error
    own = getattr(tokenizer, "init_kwargs", {}).get("auto_map")
    _refuse_code(name, bool(own) and not source[TRUST])
    return tokenizer


def cache_only(name: str, source: Mapping[str, Any]) -> dict[str, bool]:
    """What says to transformers that the hub is not to be asked, where it cannot be reached."""
    given = bool(source.get("local_files_only"))
    from_hub = may_be_on_hub(name) and not Path(name).is_dir()
    return {"local_files_only": given or (from_hub and only_cache())}


def may_be_on_hub(name: str) -> bool:
    """Whether a name may be one of the hub's, such as Qwen/Qwen3-8B, and not only a folder's."""
    return not (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1)


def missing(name: str, error: OSError) -> str:
    """The message where a model is neither a folder nor to be had from the hub."""
    if Path(name).is_dir():
        return f"{name} cannot be loaded as a model from its folder: {in_short(error)}"
    if not may_be_on_hub(name):
        return (
            f"{name} cannot be loaded as a model: it is not a folder. Expected a model's folder, or"
            f" a hub name such as Qwen/Qwen3-8B ({in_short(error)})"
        )
    folder = f"/path/to/{name.rpartition('/')[2]}"
    way = (
        f"download it elsewhere, copy it, and name its folder: load_model({folder!r}), --model"
        f" {folder}"
    )
    return (
        f"{name} cannot be loaded as a model: it is not a folder here, {ways_out(way)}"
        f"\n  ({in_short(error)})"
    )


def check_folder(name: str) -> None:
    """Raise when a model's folder holds a FIFO, a socket or a device in place of a file."""
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
    """The message of an error on one line, at most 200 characters."""
    said = " ".join(str(error).split())
    return said[:200] or type(error).__name__


def _refuse_code(name: str, has_code: bool) -> None:
    if has_code:
        raise UnsafeCheckpoint(
            f"{name} brings Python code of its own, and nothing of it was run. If you have read"
            " that code and trust it, call load_model(..., trust_remote_code=True) in Python. If it"
            " is a plain Qwen model, copy it and remove auto_map from the files of the copy"
        )
