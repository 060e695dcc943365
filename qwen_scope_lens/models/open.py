"""`open_model` loads a Qwen model from a checkpoint by transformers alone.

This package's own verbs open their models here, without the seconds that importing SAELens and
TransformerLens takes; `load_model` of `load.py` puts hook points around them. No image processor is
needed, nothing is installed, and the dtype is that of the checkpoint. With `up_to_layer`, only the
embedding and the first layers are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.errors import (
    CheckpointMissing,
    LayerOutOfRange,
    NotACheckpoint,
    ScopeError,
    TruncatedCheckpoint,
    UnknownName,
    WrongKeys,
    WrongModel,
)
from qwen_scope_lens.files import read_text
from qwen_scope_lens.models.architecture import PLACES, Model, places_of_config, text_config
from qwen_scope_lens.models.checkpoint import (
    TRUST,
    Tokenizer,
    cache_only,
    in_short,
    missing,
    open_config,
    open_tokenizer,
)
from qwen_scope_lens.models.tokenize import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["fetch_file", "files_of", "keep_tokenizer", "open_model"]

M = TypeVar("M", bound=Model)

_TEXT_WEIGHT = re.compile(
    r"(?:model\.)?(?:language_model\.)?(?:embed_tokens|norm|layers\.(?P<layer>\d+))\."
)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def open_model(
    name: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    up_to_layer: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    **hf_options: Any,
) -> PreTrainedModel:
    """The HF model of a checkpoint, in evaluation mode. The options are those of `load_model`.

    Every function of this package takes it, and finds its tokenizer (`find_tokenizer`). It has no
    hook points of TransformerLens, and a text is not its input.
    """
    import transformers

    name = str(bundled_model(str(name)) or name)
    source: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    source |= cache_only(name, source)
    trusted = {TRUST: bool(hf_options.pop(TRUST, False))}
    if device is not None:
        _require_device(device)
    try:
        config = open_config(name, **source, **trusted)
        places_of_config(config)
        if tokenizer is None:
            tokenizer = _tokenizer(name, source | trusted)
        place = {"device_map": device_map} if device_map is not None else {}
        if up_to_layer is None:
            model = _load(
                transformers.AutoModelForCausalLM,
                name,
                dtype=dtype or "auto",
                **place,
                **source,
                **trusted,
                **hf_options,
            )
        else:
            model = _load_first_layers(
                name, config, up_to_layer, dtype, source, **place, **hf_options
            )
    except OSError as error:
        if isinstance(error, ScopeError):
            raise
        raise CheckpointMissing(missing(name, error)) from error
    if device is not None:
        model = model.to(device)
    model.__dict__["up_to_layer"] = up_to_layer
    return keep_tokenizer(model.eval(), tokenizer)


def keep_tokenizer(model: M, tokenizer: Tokenizer | None) -> M:
    """Put a tokenizer, checked, beside an HF model in memory, where `find_tokenizer` finds it."""
    if tokenizer is not None:
        check_tokenizer(tokenizer, model)
    model.__dict__["_tokenizer"] = tokenizer
    return model


def _require_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UnknownName(
            f"device {str(device)!r} cannot be used here: expected cpu, or cuda, cuda:1, ... on a"
            f" machine with such a GPU and a torch built for it ({str(error).splitlines()[0]})"
        ) from error


def _tokenizer(name: str, source: dict[str, Any]) -> Tokenizer | None:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None  # transformers would make up an empty one
    return open_tokenizer(name, **source)


def _load(loader: Any, name: str | None, **options: Any) -> Any:
    """Call `from_pretrained`, and refuse a checkpoint that would leave weights at random values."""
    try:
        model, info = loader.from_pretrained(name, output_loading_info=True, **options)
    except (torch.OutOfMemoryError, ImportError, OSError, ScopeError):
        raise
    except Exception as error:  # such as for a truncated file or sizes that contradict config.json
        raise NotACheckpoint(
            f"the weights of {name or options['config']._name_or_path} are damaged or do not fit"
            f" its config.json ({in_short(error)}): fetch the model again"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise WrongKeys(
            f"{len(missing)} weights are not in the checkpoint and would be random, the first is"
            f" {missing[0]}: it belongs to another architecture, or is incomplete"
        )
    return model


def _load_first_layers(
    name: str,
    config: Any,
    last: int,
    dtype: torch.dtype | None,
    source: dict[str, Any],
    **options: Any,
) -> Any:
    """The text model up to layer `last`, without head. Other tensors are never read."""
    import transformers
    from safetensors import safe_open

    if getattr(config, "quantization_config", None):
        raise WrongModel("up_to_layer reads plain checkpoints, but this one is stored quantised")
    family = places_of_config(config).family
    text = text_config(config)
    if not 0 <= last < text.num_hidden_layers:
        raise LayerOutOfRange(f"up_to_layer={last}: {name} has 0..{text.num_hidden_layers - 1}")
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: last + 1]
    text.num_hidden_layers = last + 1
    [row] = [row for row in PLACES if row.family == family and row.kind == "text"]
    with ExitStack() as files, _damage_named(name):
        weights: dict[str, Any] = {}
        for file, keys in files_of(name, source).items():
            wanted = None if keys is None else [key for key in keys if _is_wanted(key, last)]
            if wanted == []:
                continue
            opened = files.enter_context(
                safe_open(fetch_file(name, file, source), framework="pt", device="cpu")
            )
            for key in opened.keys() if wanted is None else wanted:
                if _is_wanted(key, last):
                    weights[key] = opened.get_slice(key)
        if not weights:
            raise WrongKeys(f"{name} has no weights named as those of a {row.hf_class}")
        stored = _DTYPES.get(next(iter(weights.values())).get_dtype(), torch.float32)
        declared = getattr(text, "dtype", None) or getattr(config, "dtype", None)
        model = _load(
            getattr(transformers, row.hf_class),
            None,
            config=text,
            state_dict=weights,
            dtype=dtype or declared or stored,
            **options,
        )
    model.config._name_or_path = name
    return model


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise TruncatedCheckpoint(
            f"a file of weights of {name} is cut off or damaged ({in_short(error)}): fetch it again"
        ) from error


def _is_wanted(key: str, last: int) -> bool:
    found = _TEXT_WEIGHT.match(key)
    return found is not None and int(found["layer"] or 0) <= last


def files_of(name: str, source: dict[str, Any]) -> dict[str, list[str] | None]:
    """The checkpoint's files and the names of the tensors in each, or None without an index."""
    try:
        index = Path(fetch_file(name, "model.safetensors.index.json", source))
    except OSError:
        return {"model.safetensors": None}
    found: dict[str, list[str] | None] = {}
    try:
        for key, file in json.loads(read_text(index))["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"{file!r:.60} is not the name of a file")
            keys = found.setdefault(file, [])
            assert keys is not None
            keys.append(key)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotACheckpoint(
            f"{index} is damaged ({error!r:.200}): expected a weight_map of tensors to files."
            " Fetch it again"
        ) from error
    return found


def fetch_file(name: str, file: str, source: dict[str, Any]) -> str:
    """The local path of one file of a folder or repository."""
    if Path(name).is_dir():
        path = Path(name) / file
        if not path.is_file():
            raise FileNotFoundError(f"no {file} in {name}")
        return str(path)
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(name, file, **source))
