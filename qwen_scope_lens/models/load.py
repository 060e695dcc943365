"""`load_model` makes a bridge with hook points from a checkpoint or from an HF model in memory.

Checkpoints are opened by transformers alone. No image processor is needed, nothing is installed,
and the dtype is that of the checkpoint. With `up_to_layer`, only the embedding and the first layers
are read. The methods of a bridge are in `bridge.py`; which modules it wraps is in `adapters.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

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
from qwen_scope_lens.models.adapters import prepare_full, register_adapters, residual_name
from qwen_scope_lens.models.architecture import (
    PLACES,
    Model,
    describe,
    input_device,
    places_of,
    places_of_config,
    text_config,
    unwrap,
)
from qwen_scope_lens.models.bridge import RepairedBridge
from qwen_scope_lens.models.checkpoint import (
    TRUST,
    Tokenizer,
    cache_only,
    in_short,
    missing,
    open_config,
    open_tokenizer,
)

__all__ = ["ScopeBridge", "fetch_file", "files_of", "load_model"]

_TEXT_WEIGHT = re.compile(
    r"(?:model\.)?(?:language_model\.)?(?:embed_tokens|norm|layers\.(?P<layer>\d+))\."
)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class ScopeBridge(RepairedBridge):
    """A Qwen model with TransformerLens hook points, made by `load_model`."""

    @classmethod
    def boot_transformers(cls, model_name: str, **kwargs: Any) -> ScopeBridge:
        """`load_model` under the name that SAELens's examples use."""
        return load_model(model_name, **kwargs)


def load_model(
    name_or_model: str | Path | Model,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    up_to_layer: int | None = None,
    full_hooks: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    **hf_options: Any,
) -> ScopeBridge:
    """Load a Qwen model of a family in `families.py`, with TransformerLens hook points.

    `name_or_model` is a hub name, a folder, a model that comes with the package (`mini-qwen3`), or
    an HF model in memory: plain, quantised, spread over devices, or with a LoRA-like adapter. The
    bridge owns a model from memory until `release()`.

    By default, the hook points are those of the residual stream, around HF's own layers.
    `full_hooks` uses TransformerLens's complete adapter instead. It has all hook points, but
    attention is eager and slower.

    `up_to_layer=L` reads layers 0..L of a checkpoint and no later weights, so the model has
    residuals and no logits. The dtype is that of the checkpoint unless `dtype` is given. All
    `hf_options` go to `from_pretrained`.
    """
    if isinstance(name_or_model, ScopeBridge):
        return name_or_model
    if isinstance(name_or_model, TransformerBridge):
        raise WrongModel("this is a bridge already: use it as it is, or load the model again")
    if isinstance(name_or_model, nn.Module):
        given = {
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "up_to_layer": up_to_layer,
            "revision": revision,
            **hf_options,
        }
        if named := [name for name, value in given.items() if value is not None]:
            raise WrongModel(
                f"{', '.join(named)}: only for loading by name; a model in memory is taken as it is"
            )
        return _bridge(name_or_model, tokenizer, full_hooks)
    if full_hooks and up_to_layer is not None:
        raise WrongModel("with up_to_layer there are residual hooks only: leave full_hooks out")
    name = str(bundled_model(str(name_or_model)) or name_or_model)
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
    bridge = _bridge(model.eval(), tokenizer, full_hooks)
    bridge.up_to_layer = up_to_layer
    return bridge


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


def _bridge(model: Model, tokenizer: Tokenizer | None, full_hooks: bool) -> ScopeBridge:
    """Wrap an HF model, with the thin or the full adapter."""
    inner = unwrap(model)
    places = places_of(inner)
    if any(isinstance(module, GeneralizedComponent) for module in inner.modules()):
        raise WrongModel(
            f"{describe(inner)} is inside a bridge already: use that bridge, or release() it"
        )
    undo: list[Callable[[], None]] = []
    if full_hooks:
        architecture = places.hf_class
        undo = prepare_full(inner, places)
    else:
        register_adapters()
        architecture = residual_name(places.hf_class)
    dtype = next(inner.parameters()).dtype
    cfg = build_bridge_config_from_hf(inner.config, architecture, describe(inner), dtype)
    cfg.rmsnorm_uses_offset = places.is_hybrid  # Qwen3.5's norms multiply by 1 + weight
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    adapter.cfg.device = str(input_device(inner))
    spread: dict[str, Any] = getattr(inner, "hf_device_map", None) or {"": 0}
    adapter.cfg.n_devices = len(set(spread.values()))
    adapter.prepare_model(inner)
    bridge = ScopeBridge(inner, adapter, tokenizer)
    bridge.__dict__["_undo"] = undo
    return bridge
