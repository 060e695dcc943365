"""LabelPack: what features mean, as text, each with a score and its provenance.

Descriptions come from a person or from `qsl synth describe`; dashboards, classification and
synthesis show them. A pack has one label per address. Its file has one label per line, as JSON, and
a person can write it in an editor:

    {"address": "qwen3-8b-base/w64k-l0-50/20/6159", "text": "Chinese", "score": 0.93,
     "provenance": {"source": "describer", "model": "..."}}

`score` and `provenance` may be left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadFile, BadText, ScopeError, UnknownName
from qwen_scope_lens.files import read_text, whole_file

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["Label", "LabelPack", "Prefer"]

Prefer = Literal["first", "last", "score"]
"""Which label `LabelPack.merge` keeps where two packs name the same feature."""

LARGEST = sys.float_info.max

_FIELDS = {"address", "text", "score", "provenance"}


@dataclass(frozen=True)
class Label:
    """What one feature means, according to `provenance`."""

    ref: FeatureRef
    text: str
    score: float | None = None  # how well the text predicts the feature; None: never tested
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise BadText(f"the label of {self.ref} has no text: expected some words")
        # Half of a surrogate pair cannot be written to any file.
        clean = self.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        object.__setattr__(self, "text", " ".join(clean.split()))
        object.__setattr__(self, "provenance", _writable(self.provenance, self.ref))
        if self.score is None:
            return
        number = isinstance(self.score, (int, float)) and not isinstance(self.score, bool)
        if not number or not abs(self.score) < LARGEST:  # NaN, too
            raise BadText(
                f"the score of {self.ref} is {self.score!r:.60}: expected a finite number"
            )
        object.__setattr__(self, "score", float(self.score))

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"address": str(self.ref), "text": self.text, "score": self.score}
        return row | {"provenance": dict(self.provenance)}

    @classmethod
    def from_row(cls, row: Any) -> Label:
        """Read what `to_row` wrote. A misspelt field raises, so that it is not lost."""
        if not isinstance(row, Mapping):
            raise BadText(f"expected an object with address and text, found {row!r:.60}")
        if unknown := sorted(set(row) - _FIELDS):
            raise BadText(f"unknown field {unknown[0]!r}: a label has {', '.join(sorted(_FIELDS))}")
        if "address" not in row or "text" not in row:
            raise BadText(f"needs address and text, has {', '.join(sorted(row)) or 'nothing'}")
        provenance = row.get("provenance") or {}
        if not isinstance(provenance, Mapping):
            raise BadText(f"provenance is {provenance!r:.60}: expected an object")
        return cls(FeatureRef.parse(row["address"]), row["text"], row.get("score"), provenance)


class LabelPack(Mapping[FeatureRef, Label]):
    """Labels by address, in the order of addresses. A pack does not change."""

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        found: dict[FeatureRef, Label] = {}
        for label in labels:
            before = found.setdefault(label.ref, label)
            if before != label:
                raise BadText(
                    f"two labels for {label.ref}: {before.text!r:.60} and {label.text!r:.60}."
                    " A pack has one: keep one, or put them into two files and `qsl label merge`"
                )
        self._labels = dict(sorted(found.items()))

    def __getitem__(self, ref: FeatureRef | str) -> Label:
        return self._labels[FeatureRef.parse(ref)]

    def __contains__(self, ref: object) -> bool:
        try:
            return FeatureRef.parse(ref) in self._labels  # type: ignore[arg-type]
        except ScopeError:
            return False

    def __iter__(self) -> Iterator[FeatureRef]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __repr__(self) -> str:
        return f"LabelPack({len(self)} labels of {', '.join(map(str, self.saes)) or 'nothing'})"

    def text(self, ref: FeatureRef | str, default: str = "") -> str:
        """The words for a feature, or `default` where it has none."""
        return self[ref].text if ref in self else default

    @property
    def saes(self) -> tuple[LayerRef, ...]:
        """The SAEs whose features have labels here."""
        return tuple(sorted({ref.sae for ref in self}))

    def of_sae(self, sae: LayerRef | str) -> dict[int, Label]:
        """Feature number -> label, for one SAE."""
        wanted = LayerRef.parse(sae)
        return {ref.feature: label for ref, label in self.items() if ref.sae == wanted}

    def search(self, match: str = "", least_score: float | None = None) -> LabelPack:
        """Labels whose text matches a regular expression; with `least_score` only tested ones."""
        try:
            pattern = re.compile(match, re.IGNORECASE)
        except re.error as error:
            raise BadText(f"{match!r} is not a regular expression: {error}") from error
        return LabelPack(
            label
            for label in self.values()
            if pattern.search(label.text)
            and (least_score is None or (label.score is not None and label.score >= least_score))
        )

    def silent_in(self, store: FeatureStore) -> dict[str, int]:
        """For each of the pack's SAEs that the store has: how many labelled features never fire."""
        from qwen_scope_lens.features.pool import pool

        found = {}
        for sae in self.saes:
            if sae.layer in store.layers and store.sae(sae.layer).ref == str(sae):
                fires = set(pool(store, sae.layer, keep=False).indices.tolist())
                found[str(sae)] = sum(feature not in fires for feature in self.of_sae(sae))
        return found

    @classmethod
    def merge(cls, packs: Iterable[LabelPack], prefer: Prefer = "first") -> LabelPack:
        """Merge packs into one. `prefer` chooses where several label the same feature.

        It is "first", "last" or "score". With "score" the label with the higher score wins, a label
        without a score loses, and the earlier pack wins a tie. Raises `UnknownName` for another.
        """
        if prefer not in ("first", "last", "score"):
            raise UnknownName(f"prefer={prefer!r}: expected first, last or score")
        kept: dict[FeatureRef, Label] = {}
        for pack in packs:
            for ref, label in pack.items():
                old = kept.get(ref)
                if old is None or prefer == "last" or (prefer == "score" and _beats(label, old)):
                    kept[ref] = label
        return cls(kept.values())

    @classmethod
    def read(cls, path: str | Path) -> LabelPack:
        """From a file of JSON lines; an error names the line."""
        path = Path(path)
        try:
            lines = read_text(path, "utf-8-sig").split("\n")
        except FileNotFoundError as error:
            raise BadFile(
                f"{path} does not exist: expected JSON lines with address and text,"
                " which `qsl synth describe` writes"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise BadFile(f"{path} cannot be read as UTF-8 text ({error})") from error
        labels: dict[FeatureRef, tuple[int, Label]] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                label = Label.from_row(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise BadFile(
                    f'{path}, line {number}: {error}. Expected {{"address": "GROUP/LAYER/FEATURE",'
                    ' "text": "..."}, and score and provenance if there are any'
                ) from error
            before = labels.setdefault(label.ref, (number, label))
            if before[1] != label:
                raise BadFile(
                    f"{path}: lines {before[0]} and {number} both label {label.ref}: keep one, or"
                    " put them into two files and choose with `qsl label merge --prefer`"
                )
        if not labels:
            raise BadFile(f"{path} holds no label: expected one JSON object per line")
        return cls(label for _, label in labels.values())

    def write(self, path: str | Path) -> Path:
        """Write the pack. The file is written as a whole or not at all."""
        rows = (json.dumps(label.to_row(), ensure_ascii=False) for label in self.values())
        with whole_file(Path(path)) as partial:
            partial.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        return Path(path)


def _writable(provenance: Mapping[str, Any], ref: FeatureRef) -> dict[str, Any]:
    """The provenance as JSON; raises for anything that no other program could read back."""
    try:
        text = json.dumps(dict(provenance), ensure_ascii=False, allow_nan=False)
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found: dict[str, Any] = json.loads(clean)
        return found
    except (TypeError, ValueError, RecursionError) as error:
        raise BadText(
            f"the provenance of {ref} cannot be written as JSON ({error}): expected texts, finite"
            " numbers, lists and objects"
        ) from error


def _beats(new: Label, old: Label) -> bool:
    return new.score is not None and (old.score is None or new.score > old.score)
