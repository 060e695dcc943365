"""The table of groups agrees with what SAELens registers; addresses are parsed and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.catalog import (
    BACKBONES,
    GROUPS,
    NOT_TOPK,
    Group,
    find_group,
    local_groups,
)
from qwen_scope_lens.errors import LayerOutOfRange, UnknownName, UnsupportedSAE, WrongSettings

OFFICIAL = [group for group in GROUPS if group.origin == "official"]


def test_official_groups_are_those_that_saelens_registers() -> None:
    upstream = {n: r for n, r in get_pretrained_saes_directory().items() if "qwen-scope" in n}
    assert {group.release for group in OFFICIAL} == upstream.keys()
    assert len(OFFICIAL) == 14
    assert sum(len(group.layers) for group in OFFICIAL) == 544
    for group in OFFICIAL:
        row = upstream[group.release]
        assert (row.repo_id, row.model) == (group.repo_id, group.backbone.model_id)
        assert row.saes_map == {f"layer{n}": group.file_name(n) for n in group.layers}


def test_official_sizes_are_those_that_saelens_parses() -> None:
    from sae_lens.loading.pretrained_sae_loaders import get_qwen_scope_config_from_hf

    for group in OFFICIAL:
        theirs = get_qwen_scope_config_from_hf(group.repo_id, group.file_name(0), "cpu")
        assert theirs["d_in"] == group.d_model
        assert theirs["d_sae"] == group.d_sae
        assert theirs["activation_fn_kwargs"]["k"] == group.k
        assert theirs["hook_name"] == group.hook_name(0)


def test_only_the_27b_is_an_instruct_model() -> None:
    assert [b.model_id for b in BACKBONES if b.tuning == "instruct"] == ["Qwen/Qwen3.5-27B"]


def test_third_party_group() -> None:
    group = find_group("caiovicentino1/qwen36-27b-sae-papergrade")
    assert group.layers == (11, 31, 55)
    assert (group.d_model, group.d_sae, group.k) == (5120, 65536, 128)
    assert group.file_name(31) == "sae_L31_latest.safetensors"
    assert group.subtracts_b_dec is None
    assert LayerRef.parse(f"{group.repo_id}/sae_L55_latest.safetensors").layer == 55
    with pytest.raises(LayerOutOfRange, match="11, 31, 55"):
        group.check_layer(12)


def test_the_stack_of_eleven_layers_stands_beside_it() -> None:
    group = find_group("qwen3.6-27b/w40k-l0-128")
    other = find_group("qwen3.6-27b/w64k-l0-128")
    assert group.repo_id == "caiovicentino1/qwen36-27b-sae-fullstack"
    assert group.backbone is other.backbone
    assert not set(group.layers) & set(other.layers)
    # Every fourth layer of this hybrid has full attention. Together the groups have all from 11 on.
    assert sorted(group.layers + other.layers) == list(range(11, 64, 4))
    assert (group.d_sae, group.k) == (40960, 128)


@pytest.mark.parametrize("name", NOT_TOPK)
def test_saelens_release_for_qwen2_5_is_refused_by_name(name: str) -> None:
    """The release is for a model that `load_model` takes, but it does not encode with TopK."""
    [(release, row)] = [
        (n, r) for n, r in get_pretrained_saes_directory().items() if "qwen2.5" in n.lower()
    ]
    assert name.lower() in (release, row.repo_id)
    assert row.model == "Qwen/Qwen2.5-7B-Instruct"
    with pytest.raises(UnsupportedSAE, match=r"not a group of TopK SAEs.*SAE\.from_pretrained"):
        find_group(name)


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.short)
def test_every_name_resolves_to_one_row(group: Group) -> None:
    assert group.short in group.names
    for name in group.names:
        assert find_group(name) is group
        assert find_group(name.upper()) is group


def test_names_are_unique() -> None:
    names = [name.lower() for group in GROUPS for name in set(group.names)]
    assert len(names) == len(set(names))


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UnknownName, match="qwen3-8b-base/w64k-l0-50"):
        find_group("qwen3-8b-base/w32k-l0-50")


@pytest.mark.parametrize("layer", ["20", "layer20", "layer20.sae.pt"])
@pytest.mark.parametrize("name", find_group("qwen3-8b-base/w64k-l0-50").names)
def test_layer_addresses(name: str, layer: str) -> None:
    ref = LayerRef.parse(f"{name}/{layer}")
    assert str(ref) == "qwen3-8b-base/w64k-l0-50/20"
    assert LayerRef.parse(str(ref)) == ref


def test_feature_address_round_trip() -> None:
    text = "qwen3-8b-base/w64k-l0-50/20/6159"
    ref = FeatureRef.parse(text)
    assert str(ref) == text
    assert (ref.group, ref.layer, ref.feature) == ("qwen3-8b-base/w64k-l0-50", 20, 6159)
    assert ref.sae.feature(6159) == ref
    assert FeatureRef.parse(ref) is ref
    assert len({ref, FeatureRef.parse(text)}) == 1


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("qwen3-8b-base/w64k-l0-50/36/0", LayerOutOfRange),  # layers are 0..35
        ("qwen3-8b-base/w64k-l0-50/20/65536", LayerOutOfRange),
        ("qwen3-1.7b-base/w32k-l0-50/20/36398", LayerOutOfRange),  # a feature of another width
        ("qwen3-30b-a3b-base/w32k-l0-100/20/1", UnknownName),  # width and k of two groups
        ("qwen3-8b-base/w64k-l0-50/20", UnknownName),  # without a feature
        ("qwen3-8b-base/w64k-l0-50/20/-1", UnknownName),
        ("6159", UnknownName),
        ("", UnknownName),
    ],
)
def test_bad_feature_addresses_raise(address: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        FeatureRef.parse(address)


def test_hook_names() -> None:
    group = find_group("qwen3.5-9b-base/w64k-l0-50")
    assert group.hook_name(12) == "blocks.12.hook_resid_post"
    assert group.hf_hook_name(12) == "model.layers.12"
    assert group.hf_hook_name(12, multimodal=True) == "model.language_model.layers.12"


def test_bytes_per_layer() -> None:
    assert round(find_group("qwen3-8b-base/w64k-l0-50").bytes_per_layer / 1e9, 3) == 2.148
    assert round(find_group("qwen3.5-27b/w80k-l0-50").bytes_per_layer / 1e9, 3) == 3.356


@pytest.mark.usefixtures("home")
def test_ones_own_saes_are_a_group() -> None:
    group = find_group("local/mine")
    assert (group.short, group.origin, group.k) == ("local/mine", "local", 4)
    assert local_groups() == (group,)
    assert str(FeatureRef.parse("local/mine/2/159")) == "local/mine/2/159"
    with pytest.raises(LayerOutOfRange):
        LayerRef.parse("local/mine/3")
    with pytest.raises(UnknownName):
        find_group("local/../mine")


def test_damaged_settings_of_ones_own(home: Path) -> None:
    (home / "mine" / "config.json").write_text('{"model_type": "topk_sae"}')
    with pytest.raises(WrongSettings, match="num_layers"):
        find_group("local/mine")
