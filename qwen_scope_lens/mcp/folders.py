"""The folders that an agent may read, and nothing beside them.

A language model chooses the paths, so each is looked at with all links followed before anything is
opened. It imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_scope_lens.errors import OutsideFolders

__all__ = ["Folders"]

MANIFEST = "manifest.json"
DEEPEST, MOST = 3, 200
"""How far below a folder stores are looked for, and how many are listed."""


@dataclass(frozen=True)
class Folders:
    """Folders with feature stores; none of them by default."""

    roots: tuple[Path, ...] = ()

    @classmethod
    def of(cls, folders: Iterable[Path]) -> Folders:
        return cls(tuple(dict.fromkeys(folder.expanduser().resolve() for folder in folders)))

    def store(self, name: str) -> Path:
        """The folder of a store, by a path or by its name below one of the roots.

        A path that leads out of the folders, also by a link, raises `OutsideFolders`, and so does a
        store with a file that is a link to somewhere else.
        """
        for root in self.roots if name and "\0" not in name else ():
            place = (root / name).resolve()  # an absolute path stays itself
            if self._is_store(place):
                self._refuse_links(place)
                return place
        raise OutsideFolders(
            f"{name!r:.200} is not a feature store in {self._said()}: expected one of"
            f" {', '.join(self.stores()) or 'none, there is no store there'}. Start `qsl mcp` with"
            " --folder FOLDER to open others"
        )

    def stores(self) -> list[str]:
        """The stores in the folders, by the names that `store` takes."""
        found: list[str] = []
        for root in self.roots:
            for place in _below(root, DEEPEST):
                if self._is_store(place):
                    name = place.relative_to(root).as_posix()
                    found.append(str(root) if name == "." else name)
        return list(dict.fromkeys(found))[:MOST]

    def _is_store(self, place: Path) -> bool:
        manifest = place / MANIFEST
        return self._holds(manifest.resolve()) and manifest.is_file()

    def _holds(self, place: Path) -> bool:
        return any(place.is_relative_to(root) for root in self.roots)

    def _refuse_links(self, store: Path) -> None:
        for path in store.rglob("*"):
            if path.is_symlink() and not self._holds(path.resolve()):
                raise OutsideFolders(
                    f"{path.relative_to(store)} of the store {store.name} is a link out of"
                    f" {self._said()}: nothing is read through it. Put the file itself there"
                )

    def _said(self) -> str:
        return ", ".join(root.name or str(root) for root in self.roots) or "no folder"


def _below(folder: Path, levels: int) -> Iterator[Path]:
    """A folder and the folders in it, in the order of their names; links are not followed."""
    yield folder
    if levels and folder.is_dir():
        for place in sorted(folder.iterdir()):
            if place.is_dir() and not place.is_symlink() and not place.name.startswith("."):
                yield from _below(place, levels - 1)
