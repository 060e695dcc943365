"""Prompt templates: files that a user can edit. They are read, checked and filled here.

The package's own templates are in `prompts/`. `qsl synth templates --out DIR` copies them, and a
file of the same name in the user's folder replaces the package's. A template consists of parts that
begin with a line `[system]`, `[user]` or `[text]` (a text that a base model continues), and has
names in the form `$description`, which callers fill.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_scope_lens.errors import BadFile, UnknownName
from qwen_scope_lens.files import read_text, whole_file
from qwen_scope_lens.writers.generator import Messages

__all__ = ["HOME", "NAMES", "Template", "Templates"]

HOME = Path(__file__).parent / "prompts"

_FEATURE = ("description", "examples", "language", "task")
NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt_harmful": _FEATURE,
    "prompt_benign": _FEATURE,
    "steered_harmful": _FEATURE,
    "steered_benign": _FEATURE,
    "fac": _FEATURE,
    "fac_pair": (*_FEATURE, "positive", "negative"),
    "text": (*_FEATURE, "opening"),
    "opening": (*_FEATURE, "opening"),
    "adversarial": ("prompt", "style"),
    "reply_harmful": ("prompt", "task"),
    "reply_benign": ("prompt", "task"),
    "reply_task": ("prompt", "task"),
    "judge_relevance": ("description", "examples", "task"),
    "judge_kind": ("description", "examples", "task"),
    "judge_rewrite": ("prompt", "rewrite"),
    "describe": ("examples",),
    "detect": ("description", "examples"),
    "fuzz": ("description", "examples"),
    "intruder": ("examples",),
    "output": ("description", "examples"),
    "concept": ("words", "count"),
}
"""Every template and the names that it may use."""

FAMILIES = {"prompt_": _FEATURE, "steered_": _FEATURE, "reply_": ("prompt", "task")}
"""A recipe with its own kind needs its own templates, `prompt_KIND` and `reply_KIND`."""

_LISTS = ("styles", "refusals")
_PART = re.compile(r"^\[(system|user|assistant|text)\][ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Template:
    """One parsed file. Its `sha256` goes into the provenance of texts written with it."""

    name: str
    parts: Messages  # (role, text with names)
    sha256: str

    @property
    def raw(self) -> bool:
        """Whether it is a text to be continued instead of a chat."""
        return self.parts[0][0] == "text"

    def fill(self, **values: str) -> Messages:
        filled = ((role, string.Template(text).substitute(values)) for role, text in self.parts)
        return tuple(filled)


class Templates:
    """All templates and lists; the user's replace the package's. A broken one raises at once."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise BadFile(f"{folder} is not a folder: `qsl synth templates --out DIR` makes one")
        self._folder = folder
        own = sorted(path.stem for path in folder.glob("*.txt")) if folder else []
        names = dict.fromkeys((*NAMES, *(name for name in own if name not in _LISTS)))
        self._templates = {name: self._parse(name) for name in names}
        self.styles = self._styles()
        self.refusals = tuple(line.casefold() for line in self._lines("refusals"))

    def __getitem__(self, name: str) -> Template:
        if name not in self._templates:
            raise UnknownName(
                f"no template is named {name!r}: there are {', '.join(self._templates)}. A recipe"
                f" with its own kind needs {name}.txt in the folder of --templates"
            )
        return self._templates[name]

    def __contains__(self, name: str) -> bool:
        return name in self._templates

    @property
    def sha256(self) -> dict[str, str]:
        return {name: template.sha256 for name, template in self._templates.items()}

    @staticmethod
    def copy(folder: Path) -> list[Path]:
        """Write the package's own templates into a folder; existing files stay as they are."""
        written = []
        for name in (*NAMES, *_LISTS):
            path = folder / f"{name}.txt"
            if not path.exists():
                with whole_file(path) as partial:
                    partial.write_bytes((HOME / path.name).read_bytes())
                written.append(path)
        return written

    def _read(self, name: str) -> tuple[Path, str]:
        own = self._folder / f"{name}.txt" if self._folder else None
        path = own if own is not None and own.exists() else HOME / f"{name}.txt"
        try:
            return path, read_text(path, "utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BadFile(f"{path} cannot be read as UTF-8 text ({error})") from error

    def _parse(self, name: str) -> Template:
        path, content = self._read(name)
        allowed = _names_of(name, path)
        before, *pieces = _PART.split(content)
        roles, texts = pieces[::2], [text.strip("\n") for text in pieces[1::2]]
        if before.strip() or not roles:
            raise BadFile(
                f"{path}: expected a first line [system], [user] or [text], found"
                f" {content.strip()[:40]!r}"
            )
        if "text" in roles and len(roles) > 1:
            raise BadFile(f"{path}: [text] has to be the only part, since it is continued as it is")
        for text in texts:
            template = string.Template(text)
            if not template.is_valid():
                raise BadFile(f"{path}: a $ is followed by no name; write $$ for the sign itself")
            unknown = sorted(set(template.get_identifiers()) - set(allowed))
            if unknown:
                known = ", ".join(f"${one}" for one in allowed)
                raise BadFile(
                    f"{path}: ${unknown[0]} is unknown here: this template can use {known}"
                )
        digest = hashlib.sha256(content.encode()).hexdigest()
        return Template(name, tuple(zip(roles, texts, strict=True)), digest)

    def _lines(self, name: str) -> list[str]:
        path, content = self._read(name)
        lines = [line.strip() for line in content.splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise BadFile(f"{path} is empty: expected one entry per line")
        return found

    def _styles(self) -> dict[str, str]:
        styles = {}
        for line in self._lines("styles"):
            name, colon, what = line.partition(":")
            if not colon or not name.strip() or not what.strip():
                raise BadFile(f"styles.txt: {line!r} is not of the form `name: description`")
            styles[name.strip()] = what.strip()
        return styles


def _names_of(name: str, path: Path) -> tuple[str, ...]:
    if name in NAMES:
        return NAMES[name]
    for family, names in FAMILIES.items():
        if name.startswith(family):
            return names
    known = ", ".join(f"{one}.txt" for one in (*NAMES, *_LISTS))
    raise BadFile(
        f"{path} is not a template of this package: expected one of {known}, or prompt_KIND.txt and"
        " reply_KIND.txt for your own kind"
    )
