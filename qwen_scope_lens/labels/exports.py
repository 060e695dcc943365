"""Label exports of Neuronpedia: read as they are published, and verified before use.

An export has, for each source, batches of gzipped JSON lines:

    <model>/<layer>-<set>/{explanations,features,activations}/batch-<n>.jsonl.gz, source.jsonl

It does not say which k its SAE has. So the texts on which some features are said to fire are
encoded again, with every SAE that the source can be. Labels are accepted only if one of these SAEs
fires on the same tokens as strongly.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import BadFile, TooLittleData, UnknownName
from qwen_scope_lens.files import open_regular
from qwen_scope_lens.hosted import candidates
from qwen_scope_lens.labels.packs import Label, LabelPack

__all__ = ["Agreement", "Export", "Passage", "exports_in", "labels_of", "measure"]

MOST_LINE = 2**26
"""Bytes of a line; a row of activations has some thousand."""
MOST_FOLDERS = 100_000
BATCHES = 8
"""How many batches of activations are read for the sample: an export has hundreds."""
SAME_TOKEN, SAME_VALUES = 0.7, 0.8
"""From which share of equal peaks, and which correlation, an SAE counts as that of the labels."""

_BATCH = re.compile(r"batch-(\d+)\.jsonl(\.gz)?")


@dataclass(frozen=True)
class Passage:
    """A text on which a feature is said to fire, token by token."""

    feature: int
    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Agreement:
    """How an SAE agrees with the activations of an export."""

    ref: str
    passages: int
    same_token: float  # share of passages whose strongest token is the same
    correlation: float  # of all values, token by token
    ratio: float | None  # median of our largest value by theirs, where both fire

    @property
    def accepted(self) -> bool:
        return self.same_token >= SAME_TOKEN and self.correlation >= SAME_VALUES

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "accepted": self.accepted}


@dataclass(frozen=True)
class Export:
    """The folder of one source."""

    folder: Path
    model: str
    source: str
    said: Mapping[str, Any]  # the row of source.jsonl

    @property
    def id(self) -> str:
        return f"{self.model}/{self.source}"

    @property
    def candidates(self) -> list[LayerRef]:
        return candidates(self.model, self.source, self.said)

    def explanations(self) -> Iterator[dict[str, Any]]:
        """All rows; a source may have several folders of them, one for each describer."""
        for folder in sorted(self.folder.glob("explanations*")):
            for path in batches(folder):
                yield from self._rows(path, ("index", "description"))

    def passages(self, per_feature: int, features: int, seed: int = 0) -> list[Passage]:
        """The strongest passages of some features, drawn from some of the batches."""
        files = list(batches(self.folder / "activations"))
        if not files:
            raise TooLittleData(
                f"{self.folder} has no activations, which the check needs: download the folder"
                " activations too, or a part of its batches"
            )
        rng = random.Random(seed)
        chosen = sorted(rng.sample(files, min(BATCHES, len(files))))
        each = -(-features // len(chosen))
        found: list[Passage] = []
        for path in chosen:
            of: dict[int, list[Passage]] = {}
            for row in self._rows(path, ("index", "tokens", "values")):
                passage = _passage(row, path)
                if passage is not None:
                    of.setdefault(passage.feature, []).append(passage)
            some = rng.sample(sorted(of), min(each, len(of)))
            for feature in some:
                found += sorted(of[feature], key=lambda p: -max(p.values))[:per_feature]
        if not found:
            raise TooLittleData(
                f"{self.folder}: no feature fires in the activations that were read"
            )
        return found

    def _rows(self, path: Path, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(_lines(path), start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadFile(f"{path}, line {number}: {error}. Expected JSON lines") from error
            if not isinstance(row, dict) or any(name not in row for name in needed):
                raise BadFile(f"{path}, line {number}: expected {', '.join(needed)}")
            place = (row.get("modelId", self.model), row.get("layer", self.source))
            if place != (self.model, self.source):
                raise BadFile(
                    f"{path}, line {number}: a row of {'/'.join(map(str, place)):.80}, expected"
                    f" {self.id}: the files of two sources are mixed"
                )
            yield row


def exports_in(path: str | Path) -> list[Export]:
    """Every source below a folder that has explanations, in the order of their names."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise BadFile(f"{root} is not a folder: expected a download of Neuronpedia's exports")
    found = []
    for number, folder in enumerate((root, *sorted(p for p in root.rglob("*") if p.is_dir()))):
        if number > MOST_FOLDERS:
            raise BadFile(f"{root} has more than {MOST_FOLDERS:,} folders: name one model's")
        if any(next(batches(place), None) for place in folder.glob("explanations*")):
            found.append(_export(folder))
    if not found:
        raise BadFile(
            f"{root} has no explanations/batch-*.jsonl.gz below it: expected a folder such as"
            " v1/MODEL/SOURCE of Neuronpedia's exports"
        )
    return found


def _export(folder: Path) -> Export:
    said: dict[str, Any] = {}
    path = folder / "source.jsonl"
    if path.is_file():
        try:
            said = json.loads(next(iter(_lines(path)), "{}"))
        except (ValueError, RecursionError) as error:
            raise BadFile(f"{path}: {error}. Expected one JSON object") from error
        if not isinstance(said, dict):
            raise BadFile(f"{path}: expected one JSON object")
    absolute = folder.absolute()
    model, source = said.get("modelId", absolute.parent.name), said.get("id", absolute.name)
    if not isinstance(model, str) or not isinstance(source, str):
        raise BadFile(f"{path}: modelId and id are not texts")
    return Export(folder, model, source, said)


def labels_of(export: Export, sae: LayerRef, facts: Mapping[str, Any] | None = None) -> LabelPack:
    """The newest explanation of every feature, as labels of an SAE.

    `facts` go into the provenance: how the agreement was. Raises for a feature that the SAE lacks.
    """
    newest: dict[int, tuple[str, str, str, str]] = {}
    for row in export.explanations():
        index, text = _number(row["index"], export), row["description"]
        if not isinstance(text, str) or not text.strip():
            continue
        when = str(row.get("createdAt", ""))
        if index not in newest or when > newest[index][0]:
            newest[index] = (
                when,
                text,
                str(row.get("explanationModelName") or ""),
                str(row.get("typeName") or ""),
            )
    if not newest:
        raise TooLittleData(f"{export.folder} has no explanation with a text")
    given = dict(facts or {})
    return LabelPack(
        Label(
            sae.feature(index),
            text,
            None,
            {
                "source": "neuronpedia",
                "id": f"{export.id}/{index}",
                "describer": describer,
                "method": method,
                **given,
            },
        )
        for index, (_, text, describer, method) in newest.items()
    )


def measure(
    passages: Sequence[Passage], found: Mapping[int, Sequence[float]], ref: LayerRef
) -> Agreement:
    """Compare an SAE's values with those of the export.

    `found` has, for the number of a passage, our value of its feature on each of its tokens.
    Passages that our tokenizer cuts otherwise are left out.
    """
    if not found:
        raise TooLittleData(
            "no passage has the same tokens with our tokenizer: the export was made with another"
        )
    theirs = np.concatenate([passages[i].values for i in found])
    mine = np.concatenate([np.asarray(values, float) for values in found.values()])
    peaks = [
        bool(max(values) > 0 and int(np.argmax(values)) == int(np.argmax(passages[i].values)))
        for i, values in found.items()
    ]
    ratios = [
        max(values) / max(passages[i].values) for i, values in found.items() if max(values) > 0
    ]
    flat = mine.std() == 0 or theirs.std() == 0
    correlation = 0.0 if flat else float(np.corrcoef(mine, theirs)[0, 1])
    return Agreement(
        ref=str(ref),
        passages=len(found),
        same_token=float(np.mean(peaks)),
        correlation=correlation,
        ratio=float(np.median(ratios)) if ratios else None,
    )


def batches(folder: Path) -> Iterator[Path]:
    """The batch files of a folder, by number."""
    named = ((_BATCH.fullmatch(path.name), path) for path in folder.glob("batch-*.jsonl*"))
    yield from (path for _, path in sorted((int(m[1]), path) for m, path in named if m))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open_regular(path) as raw:
            file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            while line := file.readline(MOST_LINE):
                if len(line) == MOST_LINE:
                    raise BadFile(f"{path} has a line of more than {MOST_LINE:,} bytes")
                if line.strip():
                    yield line
    except (OSError, EOFError, zlib.error) as error:
        raise BadFile(f"{path} cannot be read ({error}): download it again") from error


def _number(index: Any, export: Export) -> int:
    text = str(index)
    if not text.isdecimal() or len(text) > 9:
        raise BadFile(f"{export.folder}: the index {text!r:.40} is not the number of a feature")
    return int(text)


def _passage(row: Mapping[str, Any], path: Path) -> Passage | None:
    """A row of activations; None where the feature does not fire on it."""
    tokens, values = row["tokens"], row["values"]
    try:
        numbers = tuple(map(float, values))
        feature = int(row["index"])
    except (TypeError, ValueError) as error:
        raise BadFile(f"{path}: values or index are not numbers ({error})") from error
    texts: Iterable[Any] = tokens if isinstance(tokens, list) else ()
    words = tuple(texts)
    if len(words) != len(numbers) or not all(isinstance(word, str) for word in words):
        raise BadFile(f"{path}: {len(words)} tokens and {len(numbers)} values in one row")
    if not numbers or not np.isfinite(numbers).all() or max(numbers) <= 0:
        return None
    return Passage(feature, words, numbers)


def require_candidates(export: Export) -> list[LayerRef]:
    """The SAEs that the source can be; raises where there is none."""
    found = export.candidates
    if not found:
        raise UnknownName(
            f"{export.id} is not an SAE that this package knows: expected a source such as"
            " qwen3.5-2b-pt/11-qwenscope-res-32k. `qsl list` shows the groups"
        )
    return found
