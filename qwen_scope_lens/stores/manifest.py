"""The facts with which a feature store can be made again, or refused: `manifest.json`.

It says which model, tokenizer and SAEs made the store, with which settings and versions, and from
which corpora. `facts.py` finds these facts out; `shard_files.py` writes the codes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.errors import (
    BadFile,
    BadPlan,
    LayerOutOfRange,
    StoreDamaged,
    StoreMismatch,
    UnknownName,
)
from qwen_scope_lens.files import json_text, parse_json, read_json, write_json

__all__ = [
    "FORMAT",
    "LABEL_TYPES",
    "RESERVED",
    "CorpusFacts",
    "Manifest",
    "ModelFacts",
    "SAEFacts",
    "Settings",
    "TokenizerFacts",
    "is_stored",
    "join_label_types",
    "model_and_group",
]

FORMAT = "qwen-scope-store"
VERSION = 1
NAME = "manifest.json"

LABEL_TYPES = ("bool", "int", "float", "str")

RESERVED = ("doc", "key", "text", "n_tokens", "truncated")
"""The columns of `documents` that are not labels."""

MOST_FEATURES = 1 << 24
"""The indices of codes have three bytes each."""
MOST_DOCS = 1 << 31
"""The column `doc` of the files has four bytes per entry."""


@dataclass(frozen=True)
class ModelFacts:
    """The model whose residual streams were encoded."""

    id: str
    revision: str | None
    dtype: str
    d_model: int
    fingerprint: str  # of the weights that take part: see `fingerprints.py`
    quantised: bool = False


@dataclass(frozen=True)
class TokenizerFacts:
    name: str
    size: int
    sha256: str
    chat_template_sha256: str | None = None


@dataclass(frozen=True)
class SAEFacts:
    """The SAE of one layer."""

    ref: str  # "qwen3-8b-base/w64k-l0-50/20"
    d_sae: int
    k: int
    sha256: str  # of its file
    revision: str | None = None
    subtracts_b_dec: bool = False
    dtype: str = "float32"


@dataclass(frozen=True)
class Settings:
    """How documents became tokens, and how tokens became codes."""

    max_tokens: int | None = None
    truncate: bool = True
    enable_thinking: bool | None = None
    add_generation_prompt: bool = False
    extreme_norm_ratio: float = 10.0
    last_token: bool = False  # only the last token of each document is stored


@dataclass(frozen=True)
class CorpusFacts:
    """The documents of one run. Appending to a store adds another corpus."""

    name: str
    n_docs: int
    sha256: str  # over keys, contents and labels of all documents
    first_doc: int = 0
    first_shard: int = 0
    shard_docs: int = 512
    token_budget: int = 4096
    size: int | None = None  # bytes of the file
    labels: tuple[str, ...] = ()  # their types are in the manifest

    @property
    def n_shards(self) -> int:
        return -(-self.n_docs // self.shard_docs)

    def span(self, shard: int) -> tuple[int, int]:
        """The first document of a shard, and the first one after it, by number in the store."""
        start = (shard - self.first_shard) * self.shard_docs
        end = min(start + self.shard_docs, self.n_docs)
        return self.first_doc + start, self.first_doc + end


@dataclass(frozen=True)
class Manifest:
    model: ModelFacts
    tokenizer: TokenizerFacts
    saes: dict[int, SAEFacts]
    settings: Settings
    labels: dict[str, str]  # name -> one of LABEL_TYPES
    corpora: tuple[CorpusFacts, ...]
    versions: dict[str, str]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.saes))

    @property
    def n_docs(self) -> int:
        """The number of documents once all corpora are finished."""
        return sum(corpus.n_docs for corpus in self.corpora)

    @property
    def n_shards(self) -> int:
        return sum(corpus.n_shards for corpus in self.corpora)

    def corpus_of(self, shard: int) -> CorpusFacts:
        for corpus in self.corpora:
            if corpus.first_shard <= shard < corpus.first_shard + corpus.n_shards:
                return corpus
        raise StoreDamaged(f"shard {shard} belongs to no corpus of the manifest")

    def require_same(self, other: Manifest, mine: str, theirs: str) -> None:
        """Raise where the codes of both must not stand in one store."""
        for what in ("saes", "settings", "tokenizer", "model"):
            left, right = getattr(self, what), getattr(other, what)
            if left == right:
                continue
            if what == "model" and ":" in left.fingerprint + right.fingerprint:
                _require_same_kind(left, right, mine, theirs)
            if what == "saes":
                left, right = _different_saes(left, right)
            raise StoreMismatch(
                f"{mine} and {theirs} were made with another {_singular(what)}:"
                f" {_difference(left, right)}. Make a new store, or use the same {_singular(what)}"
            )

    def with_corpus(self, corpus: CorpusFacts, labels: dict[str, str]) -> Manifest:
        """The manifest of the same store with one more corpus after the others."""
        corpus = replace(
            corpus, first_doc=self.n_docs, first_shard=self.n_shards, labels=tuple(labels)
        )
        names = {**self.labels}
        for name, kind in labels.items():
            names[name] = join_label_types(names[name], kind) if name in names else kind
            if name in self.labels and names[name] != self.labels[name]:
                raise StoreMismatch(
                    f"label {name!r} is {kind} in {corpus.name} and {self.labels[name]} in the"
                    " store: rename it in the new corpus, or give its values the same type"
                )
        return replace(self, corpora=(*self.corpora, corpus), labels=names)

    def write(self, folder: Path) -> None:
        write_json(folder / NAME, FORMAT, VERSION, self._content())

    def text(self) -> str:
        """What `write` writes."""
        return json_text(FORMAT, VERSION, self._content())

    def _content(self) -> dict[str, Any]:
        content = asdict(self)
        content["saes"] = {str(layer): asdict(self.saes[layer]) for layer in self.layers}
        content["corpora"] = [asdict(corpus) for corpus in self.corpora]
        return content

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / NAME
        return cls._of(read_json(path, FORMAT, VERSION, "qsl extract"), path)

    @classmethod
    def parse(cls, text: str, place: str) -> Manifest:
        """The manifest that a text holds; messages call it `place`."""
        return cls._of(parse_json(text, place, FORMAT, VERSION, "qsl extract"), place)

    @classmethod
    def _of(cls, content: dict[str, Any], path: Path | str) -> Manifest:
        try:
            found = cls(
                model=_typed(ModelFacts, content["model"]),
                tokenizer=_typed(TokenizerFacts, content["tokenizer"]),
                saes={int(n): _typed(SAEFacts, facts) for n, facts in content["saes"].items()},
                settings=_typed(Settings, content["settings"]),
                labels=dict(content["labels"]),
                corpora=tuple(
                    _typed(CorpusFacts, {**facts, "labels": tuple(facts.get("labels", ()))})
                    for facts in content["corpora"]
                ),
                versions=dict(content["versions"]),
            )
            _check_numbers(found)
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadFile(f"{path} lacks or mistypes a fact ({error}): it was edited") from error

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / NAME).is_file()

    @classmethod
    def open(cls, folder: Path) -> Manifest:
        """The manifest of a feature store; raises where the folder is not one."""
        if not cls.exists(folder):
            found = "it has no manifest.json" if folder.is_dir() else "it does not exist"
            if folder.is_file():
                found = "it is a file; a store is a folder with a manifest.json"
            raise BadFile(
                f"{folder} is not a feature store ({found}): `qsl extract CORPUS --out FOLDER`"
                " makes one"
            )
        return cls.read(folder)

    def sae(self, layer: int, folder: Path | str) -> SAEFacts:
        """The SAE of a layer of the store in `folder`; raises for a layer that was not stored."""
        if layer not in self.saes:
            raise LayerOutOfRange(
                f"layer {layer} is not in {folder}: it has {', '.join(map(str, self.layers))}."
                " `qsl extract --layers` says which are stored"
            )
        return self.saes[layer]

    def check_label(self, name: str) -> None:
        """Raise where the documents have no such label."""
        if name not in self.labels:
            have = ", ".join(self.labels) or "none at all"
            raise UnknownName(
                f"the documents of this store have no label {name!r}: they have {have}"
            )


def is_stored(data: str | Path, model: str | None, group: str | None) -> bool:
    """Whether `data` is a feature store. Raises where it is a corpus that cannot be extracted,
    because no model and group are named."""
    path = Path(data).expanduser()
    if path.is_dir() and Manifest.exists(path):
        return True
    if model is None or group is None:
        raise BadPlan(
            f"{data} is not a feature store. To read it as a corpus, pass --sae, such as --sae"
            " mini-qwen3/w1k-l0-16, and --model for another model than theirs"
        )
    return False


def model_and_group(
    model: str | None, group: str | None, *stores: str | Path | None
) -> tuple[str | None, str | None]:
    """The names as given, else those of the first of these folders that is a store. Of a group
    alone, the model is the one that its SAEs were trained on."""
    for place in stores:
        if None in (model, group) and place and Manifest.exists(path := Path(place).expanduser()):
            manifest = Manifest.open(path)
            there = LayerRef.parse(next(iter(manifest.saes.values())).ref).group
            if model is None and group in (None, there):
                model = manifest.model.id
            group = there if group is None else group
    if model is None and group is not None:
        model = find_group(group).backbone.model_id
    return model, group


def _typed(kind: type[Any], content: Any) -> Any:
    """Make a dataclass of facts; raise TypeError for a fact of another type than declared."""
    found = kind(**content)
    for name, hint in get_type_hints(kind).items():
        value = getattr(found, name)
        if hint == tuple[str, ...]:
            good = isinstance(value, tuple) and all(isinstance(each, str) for each in value)
        else:
            good = isinstance(value, hint | int if hint is float else hint)
            good &= isinstance(value, bool) <= (hint in (bool, bool | None))
        if not good:
            raise TypeError(f"{name} is {value!r:.60}")
    return found


def _check_numbers(manifest: Manifest) -> None:
    """Raise ValueError for sizes that cannot be those of a store."""
    docs = shards = 0
    for corpus in manifest.corpora:
        if min(corpus.n_docs, corpus.shard_docs, corpus.token_budget) < 1:
            raise ValueError(f"the corpus {corpus.name!r:.60} has a size below 1")
        if (corpus.first_doc, corpus.first_shard) != (docs, shards):
            raise ValueError(f"the corpus {corpus.name!r:.60} does not follow the one before")
        if unknown := set(corpus.labels) - set(manifest.labels):
            raise ValueError(f"label {min(unknown)!r:.60} has no type")
        docs, shards = docs + corpus.n_docs, shards + corpus.n_shards
    for layer, sae in manifest.saes.items():
        if layer < 0 or not 1 <= sae.k <= sae.d_sae <= MOST_FEATURES:
            raise ValueError(f"layer {layer} with k {sae.k} of {sae.d_sae} features")
    for name, kind in manifest.labels.items():
        if kind not in LABEL_TYPES:
            raise ValueError(f"label {name!r:.60} is of type {kind!r:.60}")
    if not manifest.saes or docs > MOST_DOCS or manifest.model.d_model < 1:
        raise ValueError(f"{len(manifest.saes)} SAEs, {docs} documents")


def join_label_types(one: str, other: str) -> str:
    """The type that can hold the values of both: int and float give float, all else gives str."""
    if one == other:
        return one
    return "float" if {one, other} == {"int", "float"} else "str"


def _different_saes(
    left: dict[int, SAEFacts], right: dict[int, SAEFacts]
) -> tuple[SAEFacts | str, SAEFacts | str]:
    for layer in sorted({*left, *right}):
        if left.get(layer) != right.get(layer):
            return (
                left.get(layer, f"no SAE of layer {layer}"),
                right.get(layer, f"no SAE of layer {layer}"),
            )
    raise AssertionError("the same SAEs")


def _require_same_kind(left: ModelFacts, right: ModelFacts, mine: str, theirs: str) -> None:
    """Raise where one fingerprint is of all weights and the other, of an older version, is not.

    A fingerprint of all weights begins with a word and a colon.
    """
    for facts, name in ((left, mine), (right, theirs)):
        if ":" not in facts.fingerprint:
            raise StoreMismatch(
                f"{name} was made by an older version, whose fingerprint of the model is a sample"
                " of its weights: it cannot be compared with one of all weights. Extract its"
                " documents again"
            )


def _difference(left: Any, right: Any) -> str:
    if isinstance(left, str) or isinstance(right, str):
        return f"{_named(left)} against {_named(right)}"
    one, other = asdict(left), asdict(right)
    facts = [
        f"{name} {_short(one[name])} against {_short(other[name])}"
        for name in one
        if one[name] != other[name]
    ]
    name = one.get("ref") or one.get("id") or one.get("name")
    other_name = other.get("ref") or other.get("id") or other.get("name")
    head = f"{name} against {other_name}, " if name and name != other_name else ""
    head = head or (f"{name}: " if name else "")
    return head + ", ".join(f for f in facts if not f.startswith(("ref ", "id ", "name ")))


def _named(facts: SAEFacts | str) -> str:
    return facts if isinstance(facts, str) else facts.ref


def _short(value: Any) -> str:
    text = str(value)
    text = text.removeprefix("all-weights:")
    return text[:12] + ".." if len(text) == 64 else text


def _singular(what: str) -> str:
    return {"saes": "SAE", "settings": "setting"}.get(what, what)
