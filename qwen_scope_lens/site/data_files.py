"""The data files of a site: how they are written, and how they are read again.

    data/site.js                    which layers there are
    data/<layer>/index.js           one line per feature: what is searched and sorted
    data/<layer>/block-0000.js      the pages of the first features, and so on
    data/documents-<id>/0000.js     the full texts of the first documents, and so on

A page opened from disk may load scripts and nothing else, so every data file is a call
`QSL.deliver(name, text)`. The text is base64 of gzipped JSON: small, and no character of a corpus
can end up in a script.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.files import gunzip, open_regular

__all__ = [
    "FORMAT",
    "MARKS",
    "VERSION",
    "collect",
    "deliver",
    "folder_of",
    "is_site",
    "require_site",
]

FORMAT, VERSION = "qwen-scope-site", 2

_CALL = re.compile(rb'QSL\.deliver\("[\w./-]+","([A-Za-z0-9+/=]*)"\);\s*')


MARKS = ("data/site.js", "index.html")
"""The files by which a folder is known as a site."""


def is_site(folder: Path) -> bool:
    return all((folder / mark).is_file() for mark in MARKS)


def require_site(folder: Path) -> None:
    """Raise where a folder is not a site."""
    if not is_site(folder):
        raise BadFile(
            f"{folder} is not a site of features: `qsl dash build STORE --out {folder}` makes one"
        )


def folder_of(ref: str) -> str:
    """The name of a layer's folder: its address, in characters that every file system allows."""
    return re.sub(r"[^\w.-]", "_", ref)


def deliver(data: Path, name: str, content: Any) -> None:
    """Write one data file."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    path = data / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'QSL.deliver("{name}","{packed}");\n', encoding="ascii")


def collect(data: Path, name: str) -> Any:
    """Read what `deliver` wrote."""
    path = data / f"{name}.js"
    try:
        with open_regular(path) as file:
            call = _CALL.fullmatch(file.read())
        if call is None:
            raise ValueError("it is not one call of QSL.deliver")
        return json.loads(gunzip(base64.b64decode(call[1])))
    except (OSError, ValueError, EOFError, RecursionError, zlib.error) as error:
        raise BadFile(
            f"{path} is not a data file of a site ({error}): build all layers again, with --replace"
        ) from error
