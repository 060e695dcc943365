"""The groups of SAEs as one table of facts.

The loader, the SAELens releases, the command line and the stores take all they need to know about a
group from its row, so a new group is a new row. A user's own SAEs, in the published layout under
`QWEN_SCOPE_HOME`, are rows as well; they are read from their `config.json`. This module opens no
other file and no tensor.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_scope_lens.errors import LayerOutOfRange, UnknownName, UnsupportedSAE, WrongSettings
from qwen_scope_lens.families import FAMILIES
from qwen_scope_lens.files import read_text

__all__ = [
    "BACKBONES",
    "GROUPS",
    "HOME_VARIABLE",
    "MINI_GROUPS",
    "MINI_HOME",
    "NOT_TOPK",
    "Backbone",
    "Group",
    "bundled_model",
    "find_group",
    "home_folder",
    "is_known",
    "lens_beside",
    "local_groups",
    "name_of_model",
]

Origin = Literal["official", "third-party", "mini", "local"]

HOME_VARIABLE = "QWEN_SCOPE_HOME"
"""The environment variable that names a folder of SAEs. The folder holds
`<repository name>/layer{n}.sae.pt`, or the converted form of those files."""

NOTICE_OFFICIAL = (
    "Qwen-Scope weights carry Qwen's own licence (see LICENSE in the repository) and a caution: "
    "these are tools for interpretability research. Outside scientific research they must not be "
    "used to interfere with what a model can do, nor to produce or spread harmful content; the "
    "permission ends by itself when that is violated. This package never redistributes the weights."
)
NOTICE_MINI = (
    "A toy, trained by this project on a laptop's budget and shipped with the package: see the"
    " model card in qwen_scope_lens/mini/README.md for its texts, their licences and its limits."
)
NOTICE_LOCAL = "Local files: their licence is whatever you received them under."
NOTICE_THIRD_PARTY = (
    "Published by a third party, not by Qwen: read its model card for licence and limits before "
    "use. This package never redistributes the weights."
)


@dataclass(frozen=True)
class Backbone:
    """A language model on whose residual stream SAEs were trained."""

    model_id: str  # on the hub
    family: str | None  # a name in FAMILIES; None where it is unknown (a user's own SAEs)
    num_layers: int
    d_model: int
    tuning: Literal["base", "instruct", "unknown"]

    @property
    def key(self) -> str:
        """The first part of every address (see `address.py`), for example `qwen3-8b-base`."""
        return self.model_id.split("/")[-1].lower()

    @property
    def is_moe(self) -> bool:
        """Whether the model is a mixture of experts."""
        return self.family is not None and FAMILIES[self.family].is_moe

    @property
    def is_multimodal(self) -> bool:
        """Whether the hub checkpoint is an image-text wrapper around the text model."""
        return self.family is not None and FAMILIES[self.family].is_hybrid


@dataclass(frozen=True)
class Group:
    """One repository of SAEs: one backbone, one width, one k, and one file per layer."""

    backbone: Backbone
    d_sae: int
    k: int
    layers: tuple[int, ...]  # counted from 0, as in the file names
    repo_id: str
    release: str  # the name in SAELens's directory
    origin: Origin
    file_pattern: str = "layer{n}.sae.pt"
    subtracts_b_dec: bool | None = False  # before encoding; None where it is not documented
    notice: str = NOTICE_OFFICIAL

    @property
    def short(self) -> str:
        """The short form, such as `qwen3-8b-base/w64k-l0-50`, or `local/<folder>` for own SAEs."""
        if self.origin == "local":
            return self.repo_id
        return f"{self.backbone.key}/w{self.d_sae // 1024}k-l0-{self.k}"

    @property
    def repo_name(self) -> str:
        """The repository's name without its owner, and its folder's name in `QWEN_SCOPE_HOME`."""
        return self.repo_id.split("/")[-1]

    @property
    def d_model(self) -> int:
        return self.backbone.d_model

    @property
    def bytes_per_layer(self) -> int:
        """The size of one float32 layer: both matrices and both biases."""
        return 4 * (2 * self.d_sae * self.d_model + self.d_sae + self.d_model)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name by which this group can be found."""
        return (self.short, self.release, self.repo_id, self.repo_name)

    def file_name(self, layer: int) -> str:
        """The published file of a layer. Raises for a layer that the group does not have."""
        return self.file_pattern.format(n=self.check_layer(layer))

    def sae_ids(self, layer: int) -> tuple[str, ...]:
        """The ids that name a layer: `layer20`, `layer20.sae.pt`, `20`."""
        return tuple(dict.fromkeys((f"layer{layer}", self.file_name(layer), str(layer))))

    def layer_of(self, sae_id: str) -> int:
        """The layer that an id or a file name stands for. Anything else raises."""
        file_name = re.escape(self.file_pattern).replace(re.escape("{n}"), r"(\d{1,9})")
        for pattern in (r"(?:layer)?(\d{1,9})", file_name):
            if found := re.fullmatch(pattern, sae_id):
                return self.check_layer(int(found[1]))
        raise UnknownName(
            f"{sae_id!r:.80} does not name a layer of {self.short}: expected one of"
            f" {', '.join(self.sae_ids(self.layers[0]))}"
        )

    def check_layer(self, layer: int) -> int:
        """Return the layer, or raise `LayerOutOfRange` when the group does not have it."""
        if layer not in self.layers:
            have = (
                f"{self.layers[0]}..{self.layers[-1]}"
                if len(self.layers) > 1
                and self.layers == tuple(range(self.layers[0], self.layers[-1] + 1))
                else ", ".join(map(str, self.layers))
            )
            raise LayerOutOfRange(
                f"layer {layer} is not in {self.short}: it has {have} (counted from 0, as the"
                " files are; the paper's table counts from 1)"
            )
        return layer

    def hook_name(self, layer: int) -> str:
        """TransformerLens's name of the residual stream after decoder layer `layer`."""
        return f"blocks.{self.check_layer(layer)}.hook_resid_post"

    def hf_hook_name(self, layer: int, multimodal: bool = False) -> str:
        """The HF module with that output, in the text-only or in the multimodal class."""
        root = "model.language_model.layers" if multimodal else "model.layers"
        return f"{root}.{self.check_layer(layer)}"


_B = Backbone
BACKBONES: tuple[Backbone, ...] = (
    _B("Qwen/Qwen3-1.7B-Base", "qwen3", 28, 2048, "base"),
    _B("Qwen/Qwen3-8B-Base", "qwen3", 36, 4096, "base"),
    _B("Qwen/Qwen3-30B-A3B-Base", "qwen3_moe", 48, 2048, "base"),
    _B("Qwen/Qwen3.5-2B-Base", "qwen3_5", 24, 2048, "base"),
    _B("Qwen/Qwen3.5-9B-Base", "qwen3_5", 32, 4096, "base"),
    _B("Qwen/Qwen3.5-27B", "qwen3_5", 64, 5120, "instruct"),
    _B("Qwen/Qwen3.5-35B-A3B-Base", "qwen3_5_moe", 40, 2048, "base"),
)

# (width in units of 1024, k) of the repositories of each backbone.
OFFICIAL_SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "qwen3-1.7b-base": ((32, 50), (32, 100)),
    "qwen3-8b-base": ((64, 50), (64, 100)),
    "qwen3-30b-a3b-base": ((32, 50), (128, 100)),
    "qwen3.5-2b-base": ((32, 50), (32, 100)),
    "qwen3.5-9b-base": ((64, 50), (64, 100)),
    "qwen3.5-27b": ((80, 50), (80, 100)),
    "qwen3.5-35b-a3b-base": ((32, 50), (128, 100)),
}


def _official_groups() -> Iterator[Group]:
    for backbone in BACKBONES:
        name = backbone.model_id.split("/")[-1]
        for width, k in OFFICIAL_SIZES[backbone.key]:
            yield Group(
                backbone=backbone,
                d_sae=width * 1024,
                k=k,
                layers=tuple(range(backbone.num_layers)),
                repo_id=f"Qwen/SAE-Res-{name}-W{width}K-L0_{k}",
                release=f"qwen-scope-{name.lower().removeprefix('qwen')}-w{width}k-l{k}",
                origin="official",
            )


_QWEN36_27B = _B("Qwen/Qwen3.6-27B", "qwen3_5", 64, 5120, "instruct")


def _openinterp(width: int, k: int, layers: tuple[int, ...], repo_name: str) -> Group:
    return Group(
        backbone=_QWEN36_27B,
        d_sae=width * 1024,
        k=k,
        layers=layers,
        repo_id=f"caiovicentino1/{repo_name}",
        release=f"openinterp-qwen3.6-27b-w{width}k-l{k}",
        origin="third-party",
        file_pattern="sae_L{n}_latest.safetensors",
        subtracts_b_dec=None,
        notice=NOTICE_THIRD_PARTY,
    )


THIRD_PARTY_GROUPS: tuple[Group, ...] = (
    _openinterp(64, 128, (11, 31, 55), "qwen36-27b-sae-papergrade"),
    _openinterp(40, 128, (15, 19, 23, 27, 35, 39, 43, 47, 51, 59, 63), "qwen36-27b-sae-fullstack"),
)

NOT_TOPK: dict[str, str] = {
    "qwen2.5-7b-instruct-andyrdt": "BatchTopK with one threshold, which SAELens reads as JumpReLU",
    "andyrdt/saes-qwen2.5-7b-instruct": "see the release qwen2.5-7b-instruct-andyrdt",
}
"""Releases for Qwen models that SAELens knows, but that do not encode with TopK."""

MINI_HOME = Path(__file__).parent / "mini"
"""The folder of the models and SAEs that come with the package, in the published layout."""

MINI_BACKBONES: tuple[Backbone, ...] = (
    _B("qwen-scope-lens/mini-qwen3", "qwen3", 8, 128, "base"),
    _B("qwen-scope-lens/mini-qwen3.5", "qwen3_5", 8, 128, "base"),
)

MINI_GROUPS: tuple[Group, ...] = tuple(
    Group(
        backbone=backbone,
        d_sae=1024,
        k=16,
        layers=tuple(range(backbone.num_layers)),
        repo_id=f"qwen-scope-lens/SAE-Res-{backbone.key}-W1K-L0_16",
        release=f"qwen-scope-{backbone.key}-w1k-l16",
        origin="mini",
        notice=NOTICE_MINI,
    )
    for backbone in MINI_BACKBONES
)

GROUPS: tuple[Group, ...] = (*_official_groups(), *THIRD_PARTY_GROUPS, *MINI_GROUPS)

_BY_NAME: dict[str, Group] = {name.lower(): row for row in GROUPS for name in row.names}


def find_group(name: str) -> Group:
    """The row with this short form, SAELens release or repository id, in upper or lower case.

    `local/<folder>` stands for a user's own SAEs, described in
    `$QWEN_SCOPE_HOME/<folder>/config.json`. An unknown name raises and lists the nearest names.
    """
    row = _BY_NAME.get(name.lower())
    if row is None and name.lower().startswith("local/"):
        row = _local_group(name[len("local/") :])
    if row is None and (kind := NOT_TOPK.get(name.lower())):
        raise UnsupportedSAE(
            f"{name} is not a group of TopK SAEs ({kind}): this package encodes TopK only. Load it"
            " with SAELens, `SAE.from_pretrained(release, sae_id)`, and attach it to a model from"
            " `load_model`, which takes Qwen2.5"
        )
    if row is None:
        near = difflib.get_close_matches(name.lower(), _BY_NAME, n=3, cutoff=0.4)
        shorts = dict.fromkeys(_BY_NAME[match].short for match in near)
        hint = f"nearest: {', '.join(shorts)}; " if shorts else ""
        raise UnknownName(f"no group is named {name!r:.80}; {hint}`qsl list` shows all")
    return row


def is_known(name: str) -> bool:
    """Whether the table has a group of this name."""
    return name.lower() in _BY_NAME


def local_groups() -> tuple[Group, ...]:
    """The user's own SAEs: folders under `QWEN_SCOPE_HOME` whose `config.json` describes TopK SAEs.

    Folders with the name of a published repository are left out. A damaged description raises.
    """
    home = home_folder()
    if home is None or not home.is_dir():
        return ()
    folders = sorted(path.parent.name for path in home.glob("*/config.json"))
    found = (_local_group(folder) for folder in folders if folder.lower() not in _BY_NAME)
    return tuple(row for row in found if row is not None)


def bundled_model(name: str) -> Path | None:
    """The folder of `mini-qwen3` or `mini-qwen3.5`, which come with the package. Else None."""
    key = name.lower().removeprefix("qwen-scope-lens/")
    found = any(key == backbone.key for backbone in MINI_BACKBONES)
    return MINI_HOME / key if found else None


def lens_beside(model: str | Path) -> Path | None:
    """The Jacobian lens in the folder of a model, as the minis have one; None without it."""
    path = (bundled_model(str(model)) or Path(model).expanduser()) / "jacobian_lens.pt"
    return path if path.is_file() else None


def name_of_model(place: str) -> str:
    """The name of a model that comes with the package, in place of its folder; others as given."""
    return Path(place).name if Path(place).parent == MINI_HOME else place


def home_folder() -> Path | None:
    """The folder in `QWEN_SCOPE_HOME`, or None when the variable is not set."""
    home = os.environ.get(HOME_VARIABLE)
    return Path(home).expanduser() if home else None


def _local_group(folder: str) -> Group | None:
    home = home_folder()
    if home is None or not folder or Path(folder).name != folder or not folder.isprintable():
        return None
    path = home / folder / "config.json"
    try:
        settings = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(settings, dict) or settings.get("model_type") != "topk_sae":
        return None
    sizes = {name: settings.get(name) for name in ("num_layers", "d_model", "d_sae", "k")}
    wrong = [
        f"{name} = {value!r:.60}"
        for name, value in sizes.items()
        if type(value) is not int or not 1 <= value <= 2**31
    ]
    model = settings.get("base_model")
    if not isinstance(model, str) or not model.isprintable():  # it goes to terminals
        wrong.append(f"base_model = {model!r:.60}")
    if not wrong and (settings["k"] > settings["d_sae"] or settings["num_layers"] > 10_000):
        wrong.append(f"k = {settings['k']} of {settings['d_sae']}, {settings['num_layers']} layers")
    if wrong:
        raise WrongSettings(
            f"{path} does not describe a group ({'; '.join(wrong)}): expected base_model,"
            " num_layers, d_model, d_sae and k, as in the published repositories"
        )
    depth, width = settings["num_layers"], settings["d_model"]
    return Group(
        backbone=Backbone(settings["base_model"], None, depth, width, "unknown"),
        d_sae=settings["d_sae"],
        k=settings["k"],
        layers=tuple(range(depth)),
        repo_id=f"local/{folder}",
        release=f"local-{folder}",
        origin="local",
        notice=NOTICE_LOCAL,
    )
