"""The one address of an SAE and of a feature, as an object and as a string.

Labels, plans, stores, pages and reports all use it. An unknown or out-of-range address raises.
The groups themselves are listed in `catalog.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qwen_scope_lens.catalog import Group, find_group, is_known
from qwen_scope_lens.errors import LayerOutOfRange, UnknownName

__all__ = ["FeatureRef", "LayerRef", "saes_named"]


@dataclass(frozen=True, order=True)
class LayerRef:
    """The address of one SAE: `qwen3-8b-base/w64k-l0-50/20`."""

    group: str  # the short form
    layer: int

    def __post_init__(self) -> None:
        row = find_group(self.group)
        object.__setattr__(self, "group", row.short)
        row.check_layer(_whole(self.layer, "layer"))

    @classmethod
    def parse(cls, text: str | LayerRef) -> LayerRef:
        """Read `GROUP/LAYER`, with any name of the group and any id of the layer."""
        if isinstance(text, LayerRef):
            return text
        group, slash, layer = str(text).rpartition("/")
        if not slash or not isinstance(text, str):
            raise UnknownName(
                f"{text!r:.80} is not an SAE address: expected GROUP/LAYER, {EXAMPLE_LAYER}"
            )
        if is_known(text):
            raise UnknownName(f"{text!r:.80} names a whole group: add a layer, such as {text}/0")
        row = find_group(group)
        return cls(row.short, row.layer_of(layer))

    @property
    def row(self) -> Group:
        """The group's row in the catalog."""
        return find_group(self.group)

    def feature(self, feature: int) -> FeatureRef:
        """The address of one feature of this SAE. Raises when it is out of range."""
        return FeatureRef(self.group, self.layer, feature)

    def __str__(self) -> str:
        return f"{self.group}/{self.layer}"


@dataclass(frozen=True, order=True)
class FeatureRef:
    """The one address of a feature: `qwen3-8b-base/w64k-l0-50/20/6159`."""

    group: str  # the short form
    layer: int
    feature: int

    def __post_init__(self) -> None:
        sae = LayerRef(self.group, self.layer)
        object.__setattr__(self, "group", sae.group)
        _whole(self.feature, "feature")
        if not 0 <= self.feature < sae.row.d_sae:
            raise LayerOutOfRange(
                f"feature {self.feature} is not in {sae}: it has 0..{sae.row.d_sae - 1}"
            )

    @classmethod
    def parse(cls, text: str | FeatureRef) -> FeatureRef:
        """Read `GROUP/LAYER/FEATURE`. An address that is parsed already is returned as it is."""
        if isinstance(text, FeatureRef):
            return text
        sae, slash, feature = str(text).rpartition("/")
        if not slash or not feature.isdecimal() or len(feature) > 18 or "/" not in sae:
            raise UnknownName(
                f"{text!r:.80} is not a feature address: expected GROUP/LAYER/FEATURE,"
                f" {EXAMPLE_LAYER}/6159"
            )
        layer = LayerRef.parse(sae)
        return cls(layer.group, layer.layer, int(feature))

    @property
    def sae(self) -> LayerRef:
        """The SAE that the feature belongs to."""
        return LayerRef(self.group, self.layer)

    def __str__(self) -> str:
        return f"{self.group}/{self.layer}/{self.feature}"


def saes_named(
    name: str | LayerRef, layers: Iterable[int] | int | None = None
) -> tuple[LayerRef, ...]:
    """The SAEs that a group's name and some layers stand for, or the address of one SAE.

    Without layers, a group stands for its middle layer.
    """
    chosen = [layers] if isinstance(layers, int) else None if layers is None else list(layers)
    try:
        row = find_group(str(name))
    except UnknownName:
        if not isinstance(name, LayerRef) and not str(name).rpartition("/")[2].isdecimal():
            raise
        ref = LayerRef.parse(name)
        if chosen not in (None, [ref.layer]):
            raise LayerOutOfRange(
                f"{ref} is the SAE of layer {ref.layer}, and layers {chosen} were asked for: give"
                f" the group, {ref.group}, with these layers"
            ) from None
        return (ref,)
    if chosen is None:
        chosen = [row.layers[len(row.layers) // 2]]
    if not chosen:
        raise UnknownName("no layer is chosen: choose one or more")
    return tuple(LayerRef(row.short, layer) for layer in sorted(set(chosen)))


def _whole(number: object, what: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool):
        raise UnknownName(f"{what} {number!r} is not a whole number")
    return number


EXAMPLE_LAYER = "for example qwen3-8b-base/w64k-l0-50/20"
