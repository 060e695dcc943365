"""What an earlier build left in a site: its layers and labels, which the next build keeps.

A site grows: `qsl dash build --layers 6` after `--layers 2` makes a site of both layers, and a
layer that is built again keeps the labels that it had. `--replace` begins from nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import BadFile, StoreMismatch
from qwen_scope_lens.labels.packs import Label, LabelPack
from qwen_scope_lens.site.data_files import FORMAT, VERSION, collect, folder_of, is_site

__all__ = ["EarlierSite"]

_DATA_FILE = re.compile(r"(?:index|block-\d+|\d+)\.js")
_DOCUMENTS = re.compile(r"documents-[0-9a-f]{12}")


@dataclass(frozen=True)
class EarlierSite:
    """A site on disk, as it was built."""

    folder: Path
    title: str
    model: str
    layers: tuple[dict[str, Any], ...]  # the facts of each layer, as `site.js` has them

    @classmethod
    def read(cls, folder: Path) -> EarlierSite | None:
        """The site in a folder, None where there is none; raises for one that cannot be kept."""
        if not is_site(folder):
            return None
        content = collect(folder / "data", "site")
        try:
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise BadFile(
                    f"{folder} is a site of version {content['version']}, and this package writes"
                    f" version {VERSION}: its layers cannot be kept. Build all of them again, with"
                    " --replace"
                )
            layers = tuple(content["layers"])
            for facts in layers:
                known = facts.get("documents_folder")
                if facts["folder"] != folder_of(facts["ref"]) or not (
                    known is None or _DOCUMENTS.fullmatch(known)
                ):
                    raise ValueError(f"the folder of {facts['ref']} has another name")
            return cls(folder, content["title"], content["model"], layers)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, BadFile):
                raise
            raise BadFile(
                f"{folder / 'data' / 'site.js'} lacks what a site says about itself ({error!r}):"
                " build all layers again, with --replace"
            ) from error

    def check_model(self, model: str) -> None:
        """Raise where the pages of another model would join this site."""
        if model != self.model:
            raise StoreMismatch(
                f"{self.folder} holds pages of {self.model}, and these would be of {model}: name"
                " another folder, or give --replace to drop what is there"
            )

    def besides(self, refs: Collection[str]) -> list[dict[str, Any]]:
        """The facts of the layers that are not among `refs`."""
        return [facts for facts in self.layers if facts["ref"] not in refs]

    def labels(self, refs: Collection[str]) -> LabelPack:
        """The labels that features of these layers have."""
        found: list[Label] = []
        data = self.folder / "data"
        for facts in self.layers:
            if facts["ref"] not in refs:
                continue
            folder, size = facts["folder"], facts["block"]
            sae = LayerRef.parse(facts["ref"])
            numbers = sorted(map(int, collect(data, f"{folder}/index")["labels"]))
            for number in sorted({feature // size for feature in numbers}):
                block = collect(data, f"{folder}/block-{number:04d}")
                for feature in numbers:
                    if feature // size == number:
                        label = block[feature - number * size]["label"]
                        ref = sae.feature(feature)
                        found.append(Label(ref, label["text"], label["score"], label["provenance"]))
        return LabelPack(found)

    def _check(self, name: str, kept: list[dict[str, Any]]) -> None:
        """Raise where a data file of a folder is missing or damaged: a copy would hide it."""
        data = self.folder / "data"
        for facts in kept:
            if facts["folder"] == name:
                blocks = range(-(-LayerRef.parse(facts["ref"]).row.d_sae // facts["block"]))
                for file in ("index", *(f"block-{number:04d}" for number in blocks)):
                    collect(data, f"{name}/{file}")
        for path in sorted((data / name).glob("*.js")):
            if path.stem.isdecimal():
                collect(data, f"{name}/{path.stem}")

    def copy(self, kept: list[dict[str, Any]], folder: Path) -> None:
        """Copy the data files of some layers into a new site."""
        names = {facts["folder"] for facts in kept}
        names |= {facts["documents_folder"] for facts in kept if facts.get("documents_folder")}
        for name in sorted(names):
            self._check(name, kept)
        for name in sorted(names):
            source, target = self.folder / "data" / name, folder / "data" / name
            if target.exists():  # the same documents, written anew
                continue
            target.mkdir(parents=True)
            for path in sorted(source.iterdir()):
                if _DATA_FILE.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                    shutil.copyfile(path, target / path.name)
