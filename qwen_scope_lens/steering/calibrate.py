"""Typical activations, which give strengths a unit: `+2sigma` is twice the typical activation.

The typical activation of a feature is its mean over the tokens where it fires. First tokens and
tokens of extreme norm are left out. It is measured on texts that a model reads, or read from a
feature store; both go through `Activity`, so the word means one number in the whole project.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadFile, BadPlan, ScopeError, StoreMismatch, TooLittleData
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.residuals import iter_captures
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.saes.load import load_sae
from qwen_scope_lens.steering.readers import SAEs, by_address
from qwen_scope_lens.stores.facts import model_facts, versions

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = [
    "Activity",
    "Calibration",
    "Typical",
    "activity_in_store",
    "calibrate",
    "calibrate_from_store",
    "split_refs",
]

FORMAT, VERSION = "qsl-calibration", 1


@dataclass(frozen=True)
class Typical:
    """One feature over the calibration texts."""

    mean: float  # over the tokens where the feature fires: its typical activation
    largest: float
    fired: int  # the number of tokens where it fires
    rate: float  # their share of all tokens


@dataclass(frozen=True)
class Calibration(Mapping[str, float]):
    """Address -> typical activation, for `Plan.calibrated`; `facts` has the rest."""

    facts: dict[str, Typical]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, ref: FeatureRef | str) -> float:
        return self.facts[str(ref)].mean

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)

    def save(self, path: str | Path) -> None:
        rows = {ref: asdict(found) for ref, found in self.facts.items()}
        write_json(Path(path), FORMAT, VERSION, {"provenance": self.provenance, "features": rows})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        content = read_json(Path(path), FORMAT, VERSION, "qsl calibrate")
        try:
            rows = {
                str(FeatureRef.parse(ref)): Typical(**row)
                for ref, row in content["features"].items()
            }
            return cls(rows, dict(content["provenance"]))
        except (KeyError, TypeError, ValueError, AttributeError, ScopeError) as error:
            raise BadFile(
                f"{path} is damaged ({error!r:.200}): make it with `qsl calibrate`"
            ) from error


def calibrate(
    model: Any,
    refs: Iterable[FeatureRef | LayerRef | str],
    texts: Iterable[Content],
    saes: SAEs = None,
    *,
    allow_other_model: bool = False,
    **options: Any,
) -> Calibration:
    """Run texts through a model and count how features fire.

    `refs` are features, or SAEs, which stand for all of their features that fire. `options` are
    those of `iter_captures`.
    """
    wanted = split_refs(refs)
    for row in dict.fromkeys(sae.row for sae in wanted):
        check_backbone(model, row, allow_other_model=allow_other_model)
    known = by_address(saes)
    layers: dict[int, list[LayerRef]] = {}
    for sae in wanted:
        layers.setdefault(sae.layer, []).append(sae)
        if str(sae) not in known:
            known[str(sae)] = load_sae(sae)
    sums = {sae: Activity(sae.row.d_sae) for sae in wanted}
    documents = 0
    for read in iter_captures(model, texts, layers, **options):
        documents += len(read)
        for layer, members in layers.items():
            x = read.residuals[layer][read.keep(layer)]
            for sae in members:
                own = known[str(sae)]
                sums[sae].add(own.encode_sparse(x.to(own.W_dec.device)))
    facts = asdict(model_facts(model, layers))
    return _result(wanted, sums, {"model": facts, "documents": documents})


def calibrate_from_store(
    store: FeatureStore, refs: Iterable[FeatureRef | LayerRef | str]
) -> Calibration:
    """The same as `calibrate`, from the codes of a feature store; no model is run."""
    wanted = split_refs(refs)
    sums = {}
    for sae in wanted:
        stored = str(store.sae(sae.layer).ref)
        if stored != str(sae):
            raise StoreMismatch(
                f"the store holds codes of {stored} at layer {sae.layer}, not of {sae}: extract"
                f" with {sae}, or calibrate features of {stored}"
            )
        sums[sae] = activity_in_store(store, sae.layer)
    facts = asdict(store.manifest.model)
    return _result(wanted, sums, {"model": facts, "documents": store.n_docs})


def split_refs(
    refs: Iterable[FeatureRef | LayerRef | str],
) -> dict[LayerRef, Sequence[int] | None]:
    """SAE -> the features asked for, None for all of them."""
    found: dict[LayerRef, list[int] | None] = {}
    for ref in refs:
        one = _parse(ref)
        if isinstance(one, LayerRef):
            found[one] = None
        elif (listed := found.setdefault(one.sae, [])) is not None:
            listed.append(one.feature)
    if not found:
        raise BadPlan("there is nothing to calibrate: name at least one feature or SAE")
    return found  # type: ignore[return-value]


def _parse(ref: FeatureRef | LayerRef | str) -> FeatureRef | LayerRef:
    if not isinstance(ref, str):
        return ref
    try:
        return FeatureRef.parse(ref)
    except ScopeError:
        return LayerRef.parse(ref)


class Activity:
    """How all features of one SAE fire on some tokens. Every attribute is `[d_sae]` float64."""

    def __init__(self, d_sae: int) -> None:
        self.tokens = 0
        self.sum = torch.zeros(d_sae, dtype=torch.float64)
        self.count = torch.zeros(d_sae, dtype=torch.float64)
        self.largest = torch.zeros(d_sae, dtype=torch.float64)

    def add(self, codes: SparseCodes) -> None:
        """Count the codes `[.., k]` of more tokens."""
        flat = codes.flatten().detach()
        self.tokens += len(flat)
        index = flat.indices[flat.active].long().cpu()
        values: Tensor = flat.values[flat.active].double().cpu()
        self.sum.index_add_(0, index, values)
        self.count.index_add_(0, index, torch.ones_like(values))
        self.largest.scatter_reduce_(0, index, values, "amax")

    @property
    def typical(self) -> Tensor:
        """The typical activation: the mean over the tokens where the feature fires, else 0."""
        return self.sum / self.count.clamp(min=1)


def activity_in_store(store: FeatureStore, layer: int) -> Activity:
    """How the features of a layer fire in a store, without first and extreme-norm tokens."""
    found = Activity(store.sae(layer).d_sae)
    for block in store.iter_blocks(layer, keep=True):
        found.add(block.codes)
    return found


def _result(
    wanted: Mapping[LayerRef, Sequence[int] | None],
    sums: Mapping[LayerRef, Activity],
    provenance: dict[str, Any],
) -> Calibration:
    tokens = max(one.tokens for one in sums.values())
    if not tokens:
        raise TooLittleData(
            "the texts have no token that counts: every token is the first of its text or has an"
            " extreme norm. Give longer texts"
        )
    facts = {}
    for sae, features in wanted.items():
        own = sums[sae]
        typical = own.typical
        listed = own.count.nonzero().flatten().tolist() if features is None else sorted(features)
        for feature in listed:
            fired = int(own.count[feature])
            if fired:
                facts[str(sae.feature(feature))] = Typical(
                    mean=float(typical[feature]),
                    largest=float(own.largest[feature]),
                    fired=fired,
                    rate=fired / own.tokens,
                )
    made_with = {"saes": [str(sae) for sae in wanted], "versions": versions()}
    return Calibration(facts, {**provenance, "tokens": tokens, **made_with})
