"""Files that the server may give: the page's, the viewer's, and those of one site.

They are listed when the server starts, and are found by their listed name only. What a client
writes never becomes a path.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.files import open_regular
from qwen_scope_lens.site.data_files import collect, require_site

__all__ = ["TYPES", "Site", "content_of", "kept", "listed_files", "static_files", "tag_of"]

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
    ".woff2": "font/woff2",
}
PACKAGE = Path(__file__).parent.parent
MOST_BLOCKS = 16


def static_files() -> dict[str, Path]:
    """The files of the page and of the viewer, by the path of their URL."""
    found = {}
    for prefix, folder in (("/", PACKAGE / "serve/page"), ("/viewer/", PACKAGE / "site/viewer")):
        for path in sorted(folder.glob("*")):
            if path.is_file() and path.suffix in TYPES:
                found[prefix + path.name] = path
    if "/index.html" in found:
        found["/"] = found["/index.html"]
    return found


@dataclass(frozen=True)
class Content:
    """A file in memory."""

    kind: str
    body: bytes
    tag: str  # of this body, for browsers that have it already


def kept(path: Path) -> Content:
    body = content_of(path)
    return Content(TYPES[path.suffix], body, tag_of(body))


def tag_of(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def listed_files(folder: Path) -> dict[str, Path]:
    """The regular files in a folder and its subfolders, by the path of their URL under /site/."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        links = any(p.is_symlink() for p in (path, *path.parents) if folder in p.parents)
        if path.suffix in TYPES and path.is_file() and not links:
            found[f"/site/{name}"] = path
    return found


class Site:
    """A folder that `qsl dash build` wrote."""

    address = "/site/index.html"

    def __init__(self, folder: Path) -> None:
        require_site(folder)
        self._data = folder / "data"
        self.files: Mapping[str, Path] = listed_files(folder)
        facts = collect(self._data, "site")
        self._layers: dict[str, Any] = {layer["ref"]: layer for layer in facts["layers"]}
        self._blocks: OrderedDict[str, Any] = OrderedDict()

    def has(self, ref: FeatureRef) -> bool:
        return str(ref.sae) in self._layers

    def page(self, ref: FeatureRef) -> Any:
        """The entry of a feature in the data files, or None."""
        layer = self._layers.get(str(ref.sae))
        if layer is None:
            return None
        number, place = divmod(ref.feature, layer["block"])
        name = f"{layer['folder']}/block-{number:04d}"
        if name not in self._blocks:
            self._blocks[name] = collect(self._data, name)
            while len(self._blocks) > MOST_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[name][place]


def content_of(path: Path) -> bytes:
    """A file's content; a link or a device that has taken its place is refused."""
    with open_regular(path) as file:
        return file.read()
