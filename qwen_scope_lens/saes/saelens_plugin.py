"""`install()` adds our loader and our names to SAELens, and `uninstall()` takes them out again.

Importing the package changes nothing. `install()` gives the fourteen Qwen-Scope releases our
loader. It adds their repository ids and short forms as further names, and the groups that SAELens
does not have. No other release is changed. The entries that it writes are listed in `_patches`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import sae_lens
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopKSAEConfig
from sae_lens.util import str_to_dtype

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import GROUPS, Group, find_group
from qwen_scope_lens.errors import UnsupportedSAELens
from qwen_scope_lens.hosted import verified_id
from qwen_scope_lens.saes.load import build_config, read_layer
from qwen_scope_lens.saes.locate import HubOptions, locate
from qwen_scope_lens.saes.sae import ARCHITECTURE, ScopeSAE, ScopeSAEConfig

__all__ = ["Installation", "ScopeLoader", "install", "is_installed", "uninstall"]

SUPPORTED = ">=6.54,<7"
LOADER_NAME = "qwen_scope"  # SAELens's own name for the loader of the fourteen releases


@dataclass(frozen=True)
class ScopeLoader:
    """Our loader, as SAELens calls one. It also works without `install()`:
    `SAE.from_pretrained(..., converter=ScopeLoader())`."""

    revisions: Mapping[str, str] = field(default_factory=dict)  # any name of a group -> a commit

    def __post_init__(self) -> None:
        by_short = {find_group(name).short: commit for name, commit in self.revisions.items()}
        object.__setattr__(self, "revisions", by_short)

    def config(
        self,
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The configuration of a layer. Nothing is downloaded or opened for it."""
        return _merged(build_config(_ref(repo_id, folder_name), device=device), cfg_overrides)

    def __call__(
        self,
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor], None]:
        """The configuration and the tensors of a layer, as SAELens expects them."""
        ref = _ref(repo_id, folder_name)
        hub = HubOptions(self.revisions.get(ref.group), force_download=force_download)
        dtype = str_to_dtype((cfg_overrides or {}).get("dtype") or "float32")
        name = str(dtype).removeprefix("torch.")
        read, tensors = read_layer(locate(ref, hub=hub), device=device, dtype=name)
        config = _merged(read, cfg_overrides)
        return config, tensors.state_dict(str_to_dtype(config["dtype"]), config["device"]), None


class Installation:
    """What `install()` returns. As a context manager, it undoes the installation at the end."""

    def __init__(self, before: ScopeLoader | None) -> None:
        self._before = before  # our loader before this installation, or None for SAELens's own

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None:
            uninstall()
        else:
            _apply(self._before)


@dataclass
class _Patch:
    """One entry that is written into one of SAELens's tables, and the entry before it."""

    table: MutableMapping[str, Any]
    key: str
    value: Any
    before: Any = None
    existed: bool = False

    def apply(self) -> None:
        self.existed, self.before = self.key in self.table, self.table.get(self.key)
        self.table[self.key] = self.value

    def undo(self) -> None:
        if self.table.get(self.key) is self.value:  # a later change by somebody else stays
            if self.existed:
                self.table[self.key] = self.before
            else:
                del self.table[self.key]


_applied: list[_Patch] = []


def install(revisions: Mapping[str, str] | None = None) -> Installation:
    """Give SAELens our loader and our names. A second call changes nothing more.

    Args:
        revisions: commits to pin, by any name of the group. A group without one is loaded from the
            hub's main branch. In both cases `sae.cfg.metadata.revision` has the loaded commit.
    """
    before = _loader_in_use()
    if before is None or revisions is not None:
        _apply(ScopeLoader(revisions or {}))
    return Installation(before)


def _apply(loader: ScopeLoader) -> None:
    patches = _patches(loader)
    uninstall()
    for patch in patches:
        patch.apply()
    _applied.extend(patches)


def uninstall() -> None:
    """Put SAELens's tables back as they were before `install()`."""
    while _applied:
        _applied.pop().undo()


def is_installed() -> bool:
    """Whether `install()` is in effect."""
    return bool(_applied)


def _patches(loader: ScopeLoader) -> list[_Patch]:
    try:
        from sae_lens.loading.pretrained_sae_loaders import (
            NAMED_PRETRAINED_SAE_CONFIG_GETTERS as getters,
        )
        from sae_lens.loading.pretrained_sae_loaders import (
            NAMED_PRETRAINED_SAE_LOADERS as loaders,
        )
        from sae_lens.loading.pretrained_saes_directory import (
            PretrainedSAELookup,
            get_pretrained_saes_directory,
        )

        directory = get_pretrained_saes_directory()
        missing = [
            g.release for g in GROUPS if g.origin == "official" and g.release not in directory
        ]
        if LOADER_NAME not in loaders or LOADER_NAME not in getters or missing:
            raise ImportError(f"it has no loader {LOADER_NAME!r}, or no releases {missing}")

        def entry(name: str, group: Group) -> Any:
            saes_map = _LayerIds(group, listed=name == group.release)
            return PretrainedSAELookup(
                release=name,
                repo_id=group.repo_id,
                model=group.backbone.model_id,
                conversion_func=LOADER_NAME,
                saes_map=saes_map,
                expected_var_explained=dict.fromkeys(saes_map.layers, math.nan),  # not published
                expected_l0=dict.fromkeys(saes_map.layers, float(group.k)),
                neuronpedia_id={
                    f"layer{n}": verified_id(LayerRef(group.short, n)) for n in group.layers
                },
                norm_scaling_factor={},
                config_overrides=None,
            )

        entries = [
            _Patch(directory, name, entry(name, group))
            for group in GROUPS
            for name in (group.release, group.repo_id, group.short)
            if name not in directory
        ]
    except (ImportError, AttributeError, TypeError) as error:
        raise UnsupportedSAELens(
            f"sae-lens {sae_lens.__version__} lacks an extension point that install() needs"
            f" ({error}): install sae-lens{SUPPORTED}; `qwen_scope_lens.load_sae` works meanwhile"
        ) from error
    return [
        _Patch(SAE_CLASS_REGISTRY, ARCHITECTURE, (ScopeSAE, ScopeSAEConfig)),
        _Patch(loaders, LOADER_NAME, loader),
        _Patch(getters, LOADER_NAME, loader.config),
        *entries,
    ]


def _loader_in_use() -> ScopeLoader | None:
    return next((p.value for p in _applied if isinstance(p.value, ScopeLoader)), None)


class _LayerIds(dict[str, str]):
    """SAELens's map from ids to files. Each layer is listed once, and found by all its ids.

    The further names of a release list no layer. Otherwise a pattern in `sae_lens.evals` that
    matches several names of a group would select each layer several times.
    """

    def __init__(self, group: Group, *, listed: bool) -> None:
        self.layers = {f"layer{n}": group.file_name(n) for n in group.layers}
        super().__init__(self.layers if listed else {})
        self._more = {i: group.file_name(n) for n in group.layers for i in group.sae_ids(n)}

    def keys(self) -> Any:
        """The ids that a message lists, also for a name that lists no layer itself."""
        return self.layers.keys()

    def __contains__(self, sae_id: object) -> bool:
        return sae_id in self._more

    def __missing__(self, sae_id: str) -> str:
        return self._more[sae_id]


def _merged(config: dict[str, Any], cfg_overrides: dict[str, Any] | None) -> dict[str, Any]:
    """Our configuration with SAELens's overrides, and with a class that SAELens can find."""
    overrides = {k: v for k, v in (cfg_overrides or {}).items() if v is not None}
    if hosted := overrides.pop("neuronpedia_id", None):
        config["metadata"]["neuronpedia_id"] = hosted
    if not _is_registered():  # as a plain `converter=`: SAELens does not know our architecture
        config["architecture"] = TopKSAEConfig.architecture()
    return config | overrides


def _is_registered() -> bool:
    return ARCHITECTURE in SAE_CLASS_REGISTRY


def _ref(repo_id: str, folder_name: str) -> LayerRef:
    return LayerRef.parse(f"{repo_id}/{folder_name}")
