"""A folder of benchmarks: one feature store per benchmark, with its prompt format beside it.

`extract_suite` fills the folder and `open_suite` opens it. `read_footprint` makes the matrix from
which the rest of this room computes its figures. The layer and the token position are chosen at
that point, because a store holds all tokens of the prompts and any number of layers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.bench.footprint import Footprint, footprint
from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.errors import BadCorpus, BadFile, LayerOutOfRange, StoreMismatch, UnknownName
from qwen_scope_lens.features.pool import pool
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.stores.corpus import Document
from qwen_scope_lens.stores.manifest import Manifest
from qwen_scope_lens.stores.store import FeatureStore

if TYPE_CHECKING:
    from qwen_scope_lens.models.architecture import Model

__all__ = [
    "Benchmark",
    "Suite",
    "extract_suite",
    "open_benchmark",
    "open_suite",
    "read_footprint",
    "suite_layers",
]

FORMAT, VERSION = "qwen-scope-lens/benchmark", 1
MADE_BY = "qsl bench extract"
ONLY_LAST = (
    "{}: only the last token of each prompt was stored, so position {} cannot be read. Extract it"
    " into another folder without --last-token"
)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a suite."""

    name: str
    store: FeatureStore
    facts: Mapping[str, Any]  # source and prompt format

    def footprint(self, layer: int | None = None, position: str = "last") -> Footprint:
        """Read which features each item activates at a layer (by default the last stored one).

        `position` is "last", "-2", "-3" and so on, counted from the end, or "any".
        """
        return read_footprint(self.store, layer, position, self.name)


@dataclass(frozen=True)
class Suite:
    """Benchmarks that were read with the same model and the same SAEs."""

    folder: Path
    benchmarks: tuple[Benchmark, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(benchmark.name for benchmark in self.benchmarks)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are stored for every benchmark."""
        common = set.intersection(*(set(b.store.layers) for b in self.benchmarks))
        return tuple(sorted(common))

    def __getitem__(self, name: str) -> Benchmark:
        for benchmark in self.benchmarks:
            if benchmark.name == name:
                return benchmark
        raise UnknownName(
            f"{self.folder} has no benchmark {name!r}: it has {', '.join(self.names)}"
        )

    def keys(self) -> dict[str, list[str]]:
        """The ids of the items of every benchmark."""
        return {b.name: b.store.documents(["key"])["key"].to_pylist() for b in self.benchmarks}

    def footprints(self, layer: int | None = None, position: str = "last") -> list[Footprint]:
        chosen = self.layers[-1] if layer is None else layer
        return [benchmark.footprint(chosen, position) for benchmark in self.benchmarks]


def suite_layers(group: str, layers: str | Sequence[int]) -> list[int]:
    """The layers of a group: all of them for `"all"`, or the given numbers after a check."""
    row = find_group(group)
    if isinstance(layers, str):
        if layers != "all":
            raise LayerOutOfRange(f"layers {layers!r}: expected numbers, or 'all'")
        return list(row.layers)
    return sorted({row.check_layer(layer) for layer in layers})


def extract_suite(
    benchmarks: Mapping[str, Sequence[Document]],
    model: str | Path | Model,
    group: str,
    layers: str | Sequence[int],
    out: str | os.PathLike[str],
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Suite:
    """Extract one store per benchmark into the folder `out`; finished stores are kept.

    Prompts longer than the model's context are refused, because the last token of a truncated
    prompt is not where the answer begins. `options` are those of `stores.extract`.
    """
    folder = Path(out).expanduser()
    wanted = suite_layers(group, layers)
    for name, documents in benchmarks.items():
        _check_name(name)
        if not documents:
            raise BadCorpus(f"benchmark {name} has no items")
    from qwen_scope_lens.stores.extract import extract

    if isinstance(model, (str, Path)):
        from qwen_scope_lens.models.open import open_model

        model = open_model(model, up_to_layer=wanted[-1], device=options.get("device"))
    for name, documents in benchmarks.items():
        say(f"{name}: {len(documents):,} items")
        try:
            extract(
                _unique(documents),
                model=model,
                group=group,
                layers=wanted,
                out=folder / name,
                **{"truncate": False, **options},
            )
        except StoreMismatch as error:
            raise StoreMismatch(
                f"{folder / name} was extracted with other prompts or settings than benchmark"
                f" {name} has now ({error}). Remove it, choose another folder, or give the"
                " benchmark another name"
            ) from error
        known = dict((facts or {}).get(name, {}))
        write_json(_facts_file(folder, name), FORMAT, VERSION, {"name": name, **known})
    return open_suite(folder)


def open_suite(folder: str | os.PathLike[str]) -> Suite:
    """Open the finished benchmarks of a folder, sorted by name."""
    place = Path(folder).expanduser()
    found = []
    for path in sorted(place.glob("*.benchmark.json")) if place.is_dir() else ():
        facts = read_json(path, FORMAT, VERSION, MADE_BY)
        found.append(_opened(place, str(facts["name"]), facts))
    if not found:
        raise BadFile(
            f"{place} does not hold benchmarks: make them with `{MADE_BY} FILE... --out {place}`"
        )
    first = found[0].store.manifest
    for benchmark in found[1:]:
        mine = benchmark.store.manifest
        for what, a, b in (
            ("models", _model(first), _model(mine)),
            ("tokenizers", first.tokenizer.sha256, mine.tokenizer.sha256),
            *(("SAEs", first.saes[n], mine.saes[n]) for n in set(first.saes) & set(mine.saes)),
        ):
            if a != b:
                raise StoreMismatch(
                    f"{found[0].name} and {benchmark.name} in {place} were read with different"
                    f" {what}: extract both with the same {what}"
                )
    suite = Suite(place, tuple(found))
    if not suite.layers:
        raise StoreMismatch(f"the benchmarks in {place} have no layer in common")
    return suite


def open_benchmark(path: str | os.PathLike[str]) -> Benchmark:
    """Open one benchmark of a suite, such as `bench/gsm8k`."""
    place = Path(path).expanduser()
    if not _facts_file(place.parent, place.name).is_file():
        raise BadFile(
            f"{place} is not a benchmark: make one with `{MADE_BY} ... --out {place.parent}`"
        )
    facts = read_json(_facts_file(place.parent, place.name), FORMAT, VERSION, MADE_BY)
    return _opened(place.parent, place.name, facts)


def read_footprint(
    store: FeatureStore, layer: int | None = None, position: str = "last", name: str = ""
) -> Footprint:
    """Read which features each document activates at one layer (default: the last stored one).

    `position` is "last" (as in the paper), "-2", "-3", ... counted from the end, or "any": all
    tokens except the first and those of extreme norm.
    """
    chosen = store.layers[-1] if layer is None else layer
    facts = store.sae(chosen)
    if not store.is_complete:
        raise StoreMismatch(f"{store.path} is not finished: run the same `{MADE_BY}` again")
    documents = store.documents(["key", "n_tokens", "truncated"])
    label = name or store.path.name
    only_last = store.manifest.settings.last_token
    if position == "any":
        if only_last:
            raise StoreMismatch(ONLY_LAST.format(label, position))
        matrix = pool(store, chosen, how="any")
    else:
        back = 1 if position == "last" else _steps_back(position)
        lengths = documents["n_tokens"].to_numpy()
        if back > 1 and only_last:
            raise StoreMismatch(ONLY_LAST.format(label, position))
        cut = int(np.count_nonzero(documents["truncated"].to_numpy()))
        if cut:
            raise BadCorpus(
                f"{label}: {cut} prompts were truncated, so their last token is not where the"
                ' answer begins. Extract them without truncation, or read position "any"'
            )
        if int(lengths.min()) < back:
            raise BadCorpus(
                f"{label}: a prompt of {int(lengths.min())} tokens has no token {position}"
            )
        matrix = store.matrix_at(chosen, range(len(lengths)), (lengths - back).tolist())
    return footprint(label, matrix, documents["key"].to_pylist(), facts.ref, position)


def _steps_back(position: str) -> int:
    if not re.fullmatch(r"-[1-9][0-9]{0,11}", position):
        raise UnknownName(f"position {position[:40]!r}: expected last, -2, -3, ... or any")
    return -int(position)


def _opened(folder: Path, name: str, facts: Mapping[str, Any]) -> Benchmark:
    return Benchmark(name, FeatureStore.open(folder / name), facts)


def _model(manifest: Manifest) -> tuple[str | None, ...]:
    """What identifies the model, whichever layers of it were run."""
    return manifest.model.id, manifest.model.revision, manifest.model.dtype


def _facts_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.benchmark.json"


def _check_name(name: str) -> None:
    size = len(name.encode("utf-8", "surrogatepass"))
    halves = any("\ud800" <= letter <= "\udfff" for letter in name)
    if not name or name.startswith(".") or set(name) & set("/\\\0") or halves or size > 150:
        raise BadCorpus(
            f"{name!r} cannot be the name of a benchmark, because its folder gets this name: give"
            " another one as NAME=FILE"
        )


def _unique(documents: Sequence[Document]) -> list[Document]:
    """The same documents with unique keys: a repeated key gets the item's number."""
    seen: set[str] = set()
    found = []
    for number, document in enumerate(documents):
        key = document.key if document.key not in seen else f"{document.key}#{number}"
        seen.add(key)
        found.append(Document(key, document.text, document.messages, document.labels))
    return found
