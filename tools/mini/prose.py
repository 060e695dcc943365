"""Pages and source files become clean documents of one language each.

HTML in, `(page, [document, ...])` out: navigation and listings dropped, untranslated paragraphs
dropped (by script, or by a vote of function words), repeated paragraphs dropped. What is held out
is decided in `corpus.py`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from tools.mini.sources import CODE_PACKAGE, Source

__all__ = ["code_documents", "pages", "sentences", "speaks"]

MAX_BYTES = 640  # of a document, in UTF-8: about one row of the models' training context
MIN_BYTES = 90

_DROP = re.compile(
    r"(?is)<(script|style|head|pre|nav|header|aside|table|footer)\b.*?</\1\s*>|<!--.*?-->"
)
_BLOCK = re.compile(r"(?i)</?(p|div|li|ul|ol|h\d|td|tr|dt|dd|dl|br|section|blockquote)\b[^>]*>")
_TAG = re.compile(r"<[^>]+>")
_SPACE = re.compile(r"[ \t\r\n\u00a0\u200b]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")

_WORDS = {
    "en": "the of and to in is that for it with as be on you are this or by from not can if will",
    "de": "der die das und zu in ist den von mit sie nicht ein eine auf für wird werden sich im dem"
    " oder als wenn auch kann",
    "fr": "le la les de des et à un une est en que pour dans vous du ne pas sur par ce avec qui au"
    " ou cette si",
    "es": "el la los las de que y en un una es para se con no por del al como su este o si puede"
    " más esta lo",
}
STOPWORDS = {lang: frozenset(words.split()) for lang, words in _WORDS.items()}

_SCRIPTS = {
    "ru": re.compile(r"[\u0400-\u04ff]"),
    "zh": re.compile(r"[\u4e00-\u9fff]"),
    "ja": re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]"),
    "ko": re.compile(r"[\uac00-\ud7af]"),
}
_KANA = re.compile(r"[\u3040-\u30ff]")
_OTHER_SCRIPT = re.compile(r"[\u0400-\u04ff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]")


def speaks(text: str, lang: str) -> bool:
    """Whether a paragraph is written in the language that its package promises."""
    letters = sum(character.isalpha() for character in text)
    if not letters:
        return False
    if lang in _SCRIPTS:
        share = len(_SCRIPTS[lang].findall(text)) / letters
        kana = len(_KANA.findall(text))
        return share > 0.55 and (kana > 1 if lang == "ja" else kana == 0)
    if len(_OTHER_SCRIPT.findall(text)) > 0.02 * letters:
        return False
    words = re.findall(r"[^\W\d_]+", text.lower())
    votes = {name: sum(word in stop for word in words) for name, stop in STOPWORDS.items()}
    mine = votes.pop(lang)
    return mine >= 2 and mine > max(votes.values()) and mine > 0.12 * len(words)


def _paragraphs(page: str) -> list[str]:
    start = page.find('id="DisplayArea"')  # LibreOffice's pages: the text proper
    page = _DROP.sub("\n", page[start + 17 :] if start > 0 else page)
    page = _TAG.sub("", _BLOCK.sub("\x00", page))
    parts = (_SPACE.sub(" ", html.unescape(part)).strip() for part in page.split("\x00"))
    return [part for part in parts if len(part.encode()) >= 40]


def _cut(paragraph: str) -> Iterator[str]:
    """A long paragraph as runs of sentences, none longer than a document."""
    run = ""
    for sentence in _SENTENCE_END.split(paragraph):
        joined = f"{run} {sentence}".strip() if run and run[-1].isascii() else run + sentence
        if run and len(joined.encode()) > MAX_BYTES:
            yield run
            run = sentence
        else:
            run = joined
    if run:
        yield run


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph of any of the languages."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def pages(source: Source, root: Path, seen: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Every page of a package as `(key, documents)`; `seen` drops paragraphs met before.

    The key is the same for translations of one page, so that it is held out everywhere.
    """
    base = root / source.folder
    for path in sorted(base.rglob("*.html")):
        stem = re.sub(r"\.(en|de|fr|es|ru|zh-cn|ja|ko)$", "", path.stem)
        documents: list[str] = []
        current = ""
        for paragraph in _paragraphs(path.read_text("utf-8", errors="replace")):
            if paragraph in seen or not speaks(paragraph, source.lang):
                continue
            seen.add(paragraph)
            for piece in _cut(paragraph):
                joined = f"{current}\n{piece}" if current else piece
                if current and len(joined.encode()) > MAX_BYTES:
                    documents.append(current)
                    current = piece
                else:
                    current = joined
        documents.append(current)
        kept = [text for text in documents if MIN_BYTES <= len(text.encode()) <= 2 * MAX_BYTES]
        if kept:
            yield f"{source.family}/{stem}", kept


def code_documents(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Python modules cut at top-level definitions and blank lines: `(key, documents)`."""
    base = root / CODE_PACKAGE.folder
    for path in sorted(base.rglob("*.py")):
        if not path.is_file() or any(
            part in {"test", "lib2to3", "pydoc_data", "encodings"} for part in path.parts
        ):
            continue
        documents: list[str] = []
        current = ""
        for block in re.split(r"\n\s*\n", path.read_text("utf-8", errors="replace")):
            joined = f"{current}\n\n{block}" if current else block
            if current and (len(joined) > MAX_BYTES or not block.startswith((" ", "\t"))):
                documents.append(current)
                current = block
            else:
                current = joined
        documents.append(current)
        kept = [
            text.strip("\n")[: 2 * MAX_BYTES]
            for text in documents
            if len(text) >= MIN_BYTES and text.isascii() and text.count("#") < 12
        ]
        if kept:
            yield f"stdlib/{path.relative_to(base)}", kept
