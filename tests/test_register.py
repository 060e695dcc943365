"""`install()` and `uninstall()`: what changes in SAELens, what does not, and what we rely on."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from forks import Fork, forget
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as upstream
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopKSAE

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import UnsupportedSAELens
from qwen_scope_lens.saes import ScopeLoader
from qwen_scope_lens.saes import saelens_plugin as register

RELEASE, SHORT = "qwen-scope-3-1.7b-base-w32k-l50", "qwen3-1.7b-base/w32k-l0-50"
REPO = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"


@pytest.fixture(autouse=True)
def _uninstalled() -> Any:
    qsl.uninstall()
    yield
    qsl.uninstall()


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One official layer in its real shape (in half precision, to be quick to write)."""
    folder = tmp_path / REPO.split("/")[-1]
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    row = torch.randn(2048, generator=rng, dtype=torch.float16)
    torch.save(
        {
            "W_enc": torch.randn(32768, 1, generator=rng, dtype=torch.float16) * row / 45,
            "W_dec": torch.zeros(2048, 32768, dtype=torch.float16),
            "b_enc": torch.zeros(32768),
            "b_dec": torch.randn(2048, generator=rng),
        },
        folder / "layer20.sae.pt",
    )
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(tmp_path))
    return folder


def snapshot() -> tuple[dict[str, Any], ...]:
    return (
        dict(upstream.NAMED_PRETRAINED_SAE_LOADERS),
        dict(upstream.NAMED_PRETRAINED_SAE_CONFIG_GETTERS),
        dict(get_pretrained_saes_directory()),
        dict(SAE_CLASS_REGISTRY),
    )


def test_importing_changes_nothing(tmp_path: Path) -> None:
    def import_again() -> None:
        qsl.uninstall()
        before = snapshot()
        forget("qwen_scope_lens")
        fresh = importlib.import_module("qwen_scope_lens")
        assert fresh is not qsl
        assert callable(fresh.load_sae)
        assert callable(fresh.install)
        assert callable(fresh.verify)
        assert snapshot() == before

    assert Fork(import_again, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()


def test_install_is_idempotent_and_uninstall_puts_everything_back() -> None:
    before = snapshot()
    qsl.install()
    qsl.install()
    assert qsl.is_installed()
    assert snapshot() != before
    qsl.uninstall()
    assert not qsl.is_installed()
    assert snapshot() == before
    qsl.uninstall()


def test_as_a_context_manager_it_undoes_only_what_it_did() -> None:
    before = snapshot()
    with qsl.install():
        assert qsl.is_installed()
    assert snapshot() == before
    qsl.install()
    with qsl.install():
        pass
    assert qsl.is_installed()


def test_every_other_release_is_left_alone() -> None:
    before = snapshot()
    with qsl.install():
        after = snapshot()
    assert after != before
    for old, new in zip(before, after, strict=True):
        assert old
        changed = {name for name in old if new[name] is not old[name]}
        assert changed <= {"qwen_scope"}


def test_someone_elses_later_change_survives_uninstall() -> None:
    qsl.install()
    mine = upstream.NAMED_PRETRAINED_SAE_LOADERS
    original, mine["qwen_scope"] = upstream.qwen_scope_sae_huggingface_loader, len
    qsl.uninstall()
    assert mine["qwen_scope"] is len
    mine["qwen_scope"] = original


@pytest.mark.filterwarnings("ignore:You are loading an SAE using")
@pytest.mark.parametrize(
    ("release", "sae_id"),
    [
        (RELEASE, "layer20"),
        (REPO, "layer20"),
        (REPO, "layer20.sae.pt"),
        (SHORT, "layer20"),
        (SHORT, "20"),
    ],
)
@pytest.mark.usefixtures("official")
def test_from_pretrained_by_every_name(release: str, sae_id: str) -> None:
    with qsl.install():
        sae = SAE.from_pretrained(release, sae_id, dtype="float16")
    assert isinstance(sae, qsl.ScopeSAE)
    assert isinstance(sae, SAE)
    assert sae.cfg.metadata.qwen_scope_ref == f"{SHORT}/20"
    assert sae.cfg.k == 50
    assert torch.equal(sae.b_dec, qsl.load_sae(f"{SHORT}/20", dtype="float16").b_dec)


@pytest.mark.usefixtures("official")
def test_as_a_converter_without_installing() -> None:
    sae = SAE.from_pretrained(RELEASE, "layer20", converter=ScopeLoader(), dtype="float16")
    assert type(sae) is TopKSAE
    assert sae.cfg.metadata.prepend_bos is False
    twin = qsl.load_sae(f"{SHORT}/20", dtype="float16")
    for name, tensor in twin.state_dict().items():
        assert torch.equal(getattr(sae, name), tensor)


@pytest.mark.filterwarnings("ignore:You are loading an SAE using")
@pytest.mark.usefixtures("home")
def test_all_544_configurations_load_without_a_download() -> None:
    with qsl.install():
        count = 0
        for group in qsl.GROUPS:
            for layer in group.layers:
                config = upstream.load_sae_config_from_huggingface(group.release, f"layer{layer}")
                assert (config["d_in"], config["d_sae"], config["k"]) == (
                    group.d_model,
                    group.d_sae,
                    group.k,
                )
                assert config["metadata"]["hook_name"] == group.hook_name(layer)
                count += group.origin == "official"
    assert count == 544


def test_pinned_revisions_reach_the_hub_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from qwen_scope_lens.errors import HubUnreachable

    asked: list[str | None] = []

    def refuse(*args: object, revision: str | None = None, **kwargs: object) -> str:
        asked.append(revision)
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with qsl.install(revisions={REPO: "abc"}), pytest.raises(HubUnreachable):
        SAE.from_pretrained(RELEASE, "layer20")
    with qsl.install(), pytest.raises(HubUnreachable):
        SAE.from_pretrained(RELEASE, "layer20")
    assert asked == ["abc", None]


def test_a_moved_extension_point_fails_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    monkeypatch.delattr(upstream, "NAMED_PRETRAINED_SAE_CONFIG_GETTERS")
    with pytest.raises(UnsupportedSAELens, match=r">=6\.54,<7") as caught:
        qsl.install()
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert snapshot() == before
    monkeypatch.delitem(upstream.NAMED_PRETRAINED_SAE_LOADERS, "qwen_scope")
    with pytest.raises(UnsupportedSAELens):
        qsl.install()


# Details of SAELens on which saelens_plugin.py, load.py and sae.py rely, though it promises none.


def test_contract_loader_tables() -> None:
    assert upstream.NAMED_PRETRAINED_SAE_LOADERS["qwen_scope"] is (
        upstream.qwen_scope_sae_huggingface_loader
    )
    assert upstream.NAMED_PRETRAINED_SAE_CONFIG_GETTERS["qwen_scope"] is (
        upstream.get_qwen_scope_config_from_hf
    )
    expected = ["repo_id", "folder_name", "device", "force_download", "cfg_overrides"]
    for function in (upstream.qwen_scope_sae_huggingface_loader, ScopeLoader().__call__):
        assert list(inspect.signature(function).parameters) == expected


def test_contract_directory_is_one_cached_dict() -> None:
    assert get_pretrained_saes_directory() is get_pretrained_saes_directory()
    fields = {
        "release",
        "repo_id",
        "model",
        "conversion_func",
        "saes_map",
        "expected_var_explained",
        "expected_l0",
        "neuronpedia_id",
        "norm_scaling_factor",
        "config_overrides",
    }
    assert set(PretrainedSAELookup.__dataclass_fields__) == fields


def test_contract_architecture_name_chooses_the_class() -> None:
    """`from_pretrained` looks the class up by the architecture in the configuration."""
    assert qsl.ScopeSAE is not TopKSAE
    with qsl.install():
        assert SAE_CLASS_REGISTRY["qwen_scope_topk"][0] is qsl.ScopeSAE
        assert SAE.get_sae_class_for_architecture("qwen_scope_topk") is qsl.ScopeSAE
    assert register.ARCHITECTURE == "qwen_scope_topk"


def test_contract_topk_sae_takes_views(home: Path) -> None:
    """The SAE is built on the meta device, and `load_state_dict(assign=True)` keeps the views."""
    sae = qsl.load_sae("local/mine/0")
    assert not sae.W_enc.is_contiguous()
    assert sae.W_enc.T.is_contiguous()
    assert torch.equal(sae.W_enc.T, planted.tensors(seed=0)["W_enc"])


def revisions_in_use() -> dict[str, str]:
    loader = upstream.NAMED_PRETRAINED_SAE_LOADERS["qwen_scope"]
    assert isinstance(loader, register.ScopeLoader)
    return dict(loader.revisions)


def test_an_inner_install_gives_back_the_outer_pins() -> None:
    qsl.install(revisions={REPO: "outer"})
    with qsl.install(revisions={RELEASE: "inner"}):
        assert revisions_in_use() == {SHORT: "inner"}
    assert qsl.is_installed()
    assert revisions_in_use() == {SHORT: "outer"}


def test_each_layer_is_listed_once() -> None:
    """The release lists each layer once. The other names list none, but find every layer."""
    with qsl.install():
        directory = get_pretrained_saes_directory()
        assert list(directory[RELEASE].saes_map) == [f"layer{n}" for n in range(28)]
        assert list(directory["qwen-scope-mini-qwen3-w1k-l16"].saes_map) != []
        for name in (REPO, SHORT):
            ids = directory[name].saes_map
            assert list(ids) == list(ids.items()) == []
            assert "layer20.sae.pt" in ids
            assert ids["20"] == ids["layer20"] == "layer20.sae.pt"
            assert "layer28" not in ids
            with pytest.raises(ValueError, match=r"layer28 not found.*'layer0', 'layer1'"):
                SAE.from_pretrained(name, "layer28")


def test_a_broad_pattern_of_the_evals_selects_each_layer_once() -> None:
    from sae_lens.evals import get_saes_from_regex

    qwen = r"(?i).*(qwen-?scope|qwen.?3|SAE-Res).*"
    before = get_saes_from_regex(qwen, r"layer20")
    with qsl.install():
        chosen = get_saes_from_regex(qwen, r"layer20")
        everything = get_saes_from_regex(r".*", r".*")
    ours = {g.release for g in qsl.GROUPS if 20 in g.layers}
    assert {row[0] for row in chosen} == {row[0] for row in before} | ours
    assert len(chosen) == len({row[:2] for row in chosen})
    releases = [row[:2] for row in everything if row[0] in {g.release for g in qsl.GROUPS}]
    assert len(releases) == len(set(releases)) == sum(len(g.layers) for g in qsl.GROUPS)
    assert not {row[0] for row in everything} & {g.short for g in qsl.GROUPS}


def test_every_entry_says_of_every_layer_whether_neuronpedia_has_it() -> None:
    """SAELens's own test of the directory makes a table of these maps, so none may be empty."""
    with qsl.install():
        for name, entry in get_pretrained_saes_directory().items():
            assert entry.neuronpedia_id, name
        entry = get_pretrained_saes_directory()[SHORT]
        assert set(entry.neuronpedia_id.values()) == {None}
        assert set(entry.expected_l0.values()) == {50.0}


def test_metadata_is_that_of_saelens_own_loader_but_for_the_bos() -> None:
    theirs = upstream.get_qwen_scope_config_from_hf(REPO, "layer20.sae.pt", "cpu")
    ours = ScopeLoader().config(REPO, "layer20.sae.pt")["metadata"]
    shared = {"context_size", "model_name", "hook_name", "hf_hook_name", "dataset_path"}
    assert {n: ours[n] for n in shared} == {n: theirs[n] for n in shared}
    assert (theirs["prepend_bos"], ours["prepend_bos"]) == (True, False)
