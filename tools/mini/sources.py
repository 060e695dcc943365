"""The texts behind the corpus: Debian packages as a table of facts, fetched and unpacked.

One row per package: language, licence as its copyright file states it, and where its pages lie.
Cleaning, splitting and everything generated is elsewhere (`prose.py`, `generated.py`).
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CODE_PACKAGE", "LANGUAGES", "SOURCES", "Source", "fetch"]

LANGUAGES = ("en", "de", "fr", "es", "ru", "zh", "ja", "ko")
"""Eight languages in five scripts (Latin, Cyrillic, Han, Kana, Hangul)."""


FAMILIES = (
    "aptitude-doc",
    "debian-reference",
    "developers-reference",
    "libreoffice-help",
    "maint-guide",
)


@dataclass(frozen=True)
class Source:
    """A Debian package that holds prose of one language."""

    package: str
    lang: str
    folder: str  # inside the package; its HTML pages are read
    license: str

    @property
    def family(self) -> str:
        """Translations of one work share a family, so that a page is held out in all languages."""
        for family in FAMILIES:
            if self.package.startswith(family):
                return family
        return self.package


def _rows(base: str, license: str, folder: str, names: dict[str, str]) -> list[Source]:
    """One row per language; `{s}` in the folder is the suffix that the package has for it."""
    rows = []
    for lang, suffix in names.items():
        package = f"{base}-{suffix}" if suffix else base
        rows.append(Source(package, lang, folder.format(p=package, s=suffix), license))
    return rows


_HANDBOOK = {
    "en": "en-US",
    "de": "de-DE",
    "fr": "fr-FR",
    "es": "es-ES",
    "ru": "ru-RU",
    "zh": "zh-CN",
    "ja": "ja-JP",
    "ko": "ko-KR",
}
_GUIDE = {
    "en": "en",
    "de": "de",
    "fr": "fr",
    "es": "es",
    "ru": "ru",
    "zh": "zh_CN",
    "ja": "ja",
    "ko": "ko",
}
_HELP = {
    "en": "en-us",
    "de": "de",
    "fr": "fr",
    "es": "es",
    "ru": "ru",
    "zh": "zh-cn",
    "ja": "ja",
    "ko": "ko",
}

SOURCES: tuple[Source, ...] = (
    *(
        Source(
            "debian-handbook",
            lang,
            f"usr/share/doc/debian-handbook/html/{name}",
            "GPL-2.0-or-later or CC-BY-SA-3.0",
        )
        for lang, name in _HANDBOOK.items()
    ),
    *(
        Source(
            "installation-guide-amd64",
            lang,
            f"usr/share/doc/installation-guide-amd64/{name}",
            "GPL-2.0",
        )
        for lang, name in _GUIDE.items()
    ),
    *_rows(
        "debian-reference",
        "GPL-2.0-or-later",
        "usr/share/debian-reference",
        {"en": "en", "de": "de", "fr": "fr", "es": "es", "ja": "ja", "zh": "zh-cn"},
    ),
    *_rows(
        "maint-guide",
        "GPL-2.0-or-later",
        "usr/share/doc/{p}",
        {"en": "", "es": "es", "ru": "ru", "zh": "zh-cn"},
    ),
    *_rows(
        "developers-reference",
        "GPL-2.0-or-later",
        "usr/share/developers-reference",
        {"en": "", "de": "de", "fr": "fr", "ja": "ja", "ru": "ru"},
    ),
    *_rows(
        "aptitude-doc",
        "GPL-2.0-or-later",
        "usr/share/doc/aptitude",
        {"en": "en", "es": "es", "fr": "fr", "ja": "ja", "ru": "ru"},
    ),
    *_rows("libreoffice-help", "MPL-2.0", "usr/share/libreoffice/help", _HELP),
)

CODE_PACKAGE = Source("libpython3.11-stdlib", "python", "usr/lib/python3.11", "PSF-2.0")
"""The standard library of Python as Debian packages it: the corpus's code."""


def fetch(package: str, cache: Path) -> Path:
    """The folder with the unpacked package, downloaded by apt on the first call."""
    target = cache / package
    if target.is_dir():
        return target
    downloads = cache / "deb"
    downloads.mkdir(parents=True, exist_ok=True)
    found = sorted(downloads.glob(f"{package}_*.deb"))
    if not found:
        subprocess.run(["apt-get", "download", "-q", package], cwd=downloads, check=True)
        found = sorted(downloads.glob(f"{package}_*.deb"))
    partial = cache / f".{package}.partial"
    partial.mkdir(exist_ok=True)
    subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(partial)], check=True)
    partial.rename(target)
    return target
