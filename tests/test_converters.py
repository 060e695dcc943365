"""Converters are exact to the bit, use bounded memory, can go on, and write whole files only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import time
from pathlib import Path

import planted
import pytest
import torch
from forks import Fork, command
from sae_lens import SAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import load_file, save_file

import qwen_scope_lens as qsl
from qwen_scope_lens.cli import main
from qwen_scope_lens.converters import (
    official_to_saelens,
    openinterp_to_saelens,
    saelens_to_official,
)
from qwen_scope_lens.errors import (
    CannotWrite,
    CheckpointError,
    LayerOutOfRange,
    NotFinite,
    UnknownName,
    UnsupportedSAE,
    WrongSettings,
    WrongShape,
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.usefixtures("home")
def test_official_to_saelens_is_bit_exact_and_loads_without_us(out: Path) -> None:
    folders = official_to_saelens.convert("local/mine", out, progress=False)
    assert [folder.name for folder in folders] == ["layer0", "layer1", "layer2"]
    for layer, folder in enumerate(folders):
        weights = planted.tensors(seed=layer)
        sae = SAE.load_from_disk(folder)
        assert type(sae) is TopKSAE
        assert torch.equal(sae.W_enc, weights["W_enc"].T)
        assert torch.equal(sae.W_dec, weights["W_dec"].T)
        assert torch.equal(sae.b_enc, weights["b_enc"])
        assert torch.equal(sae.b_dec, weights["b_dec"])
        assert sae.cfg.k == planted.K
        assert sae.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"


def test_hashes_and_provenance(home: Path, out: Path) -> None:
    (folder,) = official_to_saelens.convert("local/mine", out, layers=[1], progress=False)
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    source = (home / "mine" / "layer1.sae.pt").read_bytes()
    assert metadata["source_sha256"] == hashlib.sha256(source).hexdigest()
    assert metadata["qwen_scope_ref"] == "local/mine/1"


def test_converted_files_are_found_and_preferred(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official_to_saelens.convert("local/mine", home, layers=[1], progress=False)
    sae = qsl.load_sae("local/mine/1")
    assert isinstance(sae, qsl.ScopeSAE)
    assert sae.W_dec.is_contiguous()  # row-major directions: the converted file
    assert not qsl.load_sae("local/mine/0").W_dec.is_contiguous()
    x = torch.randn(4, planted.D_MODEL)
    plain = planted.saelens_sae(planted.tensors(seed=1))
    torch.testing.assert_close(sae.encode(x), plain.encode(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.usefixtures("home")
def test_half_precision_is_rounded_once(out: Path, dtype: str) -> None:
    (folder,) = official_to_saelens.convert(
        "local/mine",
        out,
        layers=[0],
        dtype=dtype,
        progress=False,
    )
    stored = load_file(folder / "sae_weights.safetensors")
    weights = planted.tensors(seed=0)
    assert torch.equal(stored["W_dec"], weights["W_dec"].T.to(getattr(torch, dtype)))
    assert torch.equal(stored["W_enc"], weights["W_enc"].T.to(getattr(torch, dtype)))


def test_tiles_of_every_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that are smaller than a tile, equal to one, and not a multiple of one."""
    from qwen_scope_lens.converters import saelens_folder

    monkeypatch.setattr(saelens_folder, "FLUSH", 1)
    shapes = [(5, 7, 3, 3), (6, 9, 2, 3), (4, 4, 4, 4), (1, 8, 16, 16), (5, 7, 3, 9), (5, 7, 9, 2)]
    for number, (d_model, d_sae, rows, columns) in enumerate(shapes):
        monkeypatch.setattr(saelens_folder, "ROWS", rows)
        monkeypatch.setattr(saelens_folder, "COLUMNS", columns)
        home = tmp_path / str(number)
        folder = planted.write_group(home / "g", range(0), d_model=d_model, d_sae=d_sae, k=1)
        weights = {
            "W_enc": torch.randn(d_sae, d_model),
            "W_dec": torch.randn(d_model, d_sae),
            "b_enc": torch.randn(d_sae),
            "b_dec": torch.randn(d_model),
        }
        torch.save(weights, folder / "layer0.sae.pt")
        monkeypatch.setenv("QWEN_SCOPE_HOME", str(home))
        (done,) = official_to_saelens.convert(
            "local/g", tmp_path / f"out{number}", layers=[0], progress=False
        )
        stored = load_file(done / "sae_weights.safetensors")
        assert torch.equal(stored["W_enc"], weights["W_enc"].T)
        assert torch.equal(stored["W_dec"], weights["W_dec"].T)


@pytest.mark.usefixtures("home")
def test_a_disk_that_fails_on_the_way_is_noticed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed write is told to one flush only, which may be one before the last."""
    from qwen_scope_lens.converters import saelens_folder

    told = iter([OSError(errno.EIO, os.strerror(errno.EIO))])

    def flush(fd: int) -> None:
        for error in told:
            raise error

    monkeypatch.setattr(saelens_folder, "FLUSH", 1)
    monkeypatch.setattr(os, "fdatasync", flush)
    with pytest.raises(CannotWrite, match="Input/output error"):
        official_to_saelens.convert("local/mine", out, layers=[1], progress=False)
    assert list((out / "mine").glob("layer*")) == []


@pytest.mark.usefixtures("home")
def test_finished_layers_are_left_alone(out: Path) -> None:
    (first,) = official_to_saelens.convert("local/mine", out, layers=[0], progress=False)
    stamp = (first / "cfg.json").stat().st_mtime_ns
    official_to_saelens.convert("local/mine", out, progress=False)
    assert (first / "cfg.json").stat().st_mtime_ns == stamp
    with pytest.raises(CannotWrite, match="--overwrite"):
        official_to_saelens.convert("local/mine", out, dtype="bfloat16", progress=False)
    official_to_saelens.convert("local/mine", out, dtype="bfloat16", overwrite=True, progress=False)
    assert SAE.load_from_disk(first).W_dec.dtype == torch.bfloat16


def test_killed_in_the_middle_nothing_half_is_visible_and_it_goes_on(
    tmp_path: Path, out: Path
) -> None:
    """A real process is killed with SIGKILL while it writes the second layer."""
    home = tmp_path / "big"
    folder = planted.write_group(home / "big", range(0), d_model=512, d_sae=8192, k=8)
    layers = [planted.tensors(seed=layer, d_model=512, d_sae=8192) for layer in range(3)]
    for layer, weights in enumerate(layers):
        torch.save(weights, folder / f"layer{layer}.sae.pt")
    words = ["convert", "official-to-saelens", "local/big", "--out", str(out)]
    environment = {"QWEN_SCOPE_HOME": str(home)}
    fork = command(words, env=environment)
    root = out / "big"
    while not (root / ".layer1.partial" / "sae_weights.safetensors").exists():
        assert fork.process.is_alive(), "it finished before it could be killed"
        time.sleep(0.001)
    fork.kill()
    assert fork.wait() == -signal.SIGKILL
    assert sorted(path.name for path in root.glob("layer*")) == ["layer0"]
    stamp = (root / "layer0" / "cfg.json").stat().st_mtime_ns
    assert command(words, env=environment).wait() == 0
    assert sorted(path.name for path in root.iterdir()) == [
        ".lock",
        "config.json",
        "layer0",
        "layer1",
        "layer2",
    ]
    assert (root / "layer0" / "cfg.json").stat().st_mtime_ns == stamp
    for layer, weights in enumerate(layers):
        stored = load_file(root / f"layer{layer}" / "sae_weights.safetensors")
        assert torch.equal(stored["W_dec"], weights["W_dec"].T)


@pytest.mark.usefixtures("home")
def test_full_disk_leaves_nothing_and_says_so(out: Path, tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, as it does on a full disk."""

    def with_small_files() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return main(["convert", "official-to-saelens", "local/mine", "--out", str(out)])

    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000
    log = tmp_path / "log"
    assert Fork(with_small_files, log).wait() == 1
    assert "cannot write" in log.read_text()
    assert "make room" in log.read_text()
    assert [path.name for path in (out / "mine").iterdir()] == [".lock"]


@pytest.mark.usefixtures("home")
def test_unwritable_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotWrite, match="cannot write"):
        official_to_saelens.convert("local/mine", tmp_path / "file", progress=False)


@pytest.mark.usefixtures("home")
def test_two_writers(out: Path) -> None:
    from qwen_scope_lens.files import exclusive

    with exclusive(out / "mine"), pytest.raises(CannotWrite, match="another process"):
        official_to_saelens.convert("local/mine", out, progress=False)


def test_damaged_source_leaves_no_folder(home: Path, out: Path) -> None:
    torch.save(planted.tensors(d_sae=8), home / "mine" / "layer1.sae.pt")
    with pytest.raises(WrongShape):
        official_to_saelens.convert("local/mine", out, progress=False)
    assert sorted(path.name for path in (out / "mine").glob("layer*")) == ["layer0"]
    with pytest.raises(LayerOutOfRange):
        official_to_saelens.convert("local/mine", out, layers=[3], progress=False)


def test_openinterp_to_saelens(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real file names and axes, in a smaller group instead of 2.7 GB of weights."""
    from dataclasses import replace

    from qwen_scope_lens import catalog

    small = replace(
        catalog.THIRD_PARTY_GROUPS[0],
        backbone=replace(catalog.THIRD_PARTY_GROUPS[0].backbone, d_model=planted.D_MODEL),
        d_sae=1024,
        k=8,
    )
    for name in small.names:
        monkeypatch.setitem(catalog._BY_NAME, name.lower(), small)
    monkeypatch.setattr(openinterp_to_saelens, "GROUP", small)
    weights = planted.tensors(d_sae=1024)
    theirs = {
        "W_enc": weights["W_enc"].T.contiguous(),
        "W_dec": weights["W_dec"].T.contiguous(),
        "b_enc": weights["b_enc"],
        "b_dec": weights["b_dec"],
    }
    save_file(theirs, tmp_path / "sae_L31_latest.safetensors")
    (folder,) = openinterp_to_saelens.convert(out, layers=[31], folder=tmp_path, progress=False)
    sae = SAE.load_from_disk(folder)
    for name, tensor in theirs.items():
        assert torch.equal(getattr(sae, name), tensor)
    assert sae.cfg.apply_b_dec_to_input is False
    (folder,) = openinterp_to_saelens.convert(
        out, layers=[31], folder=tmp_path, subtract_b_dec=True, overwrite=True, progress=False
    )
    assert SAE.load_from_disk(folder).cfg.apply_b_dec_to_input is True


def test_openinterp_takes_the_publishers_other_group_and_no_others(out: Path) -> None:
    with pytest.raises(LayerOutOfRange, match=r"layer 31 is not in qwen3\.6-27b/w40k"):
        openinterp_to_saelens.convert(out, group="qwen3.6-27b/w40k-l0-128", layers=[31])
    with pytest.raises(UnknownName, match="not a group of this publisher"):
        openinterp_to_saelens.convert(out, group="qwen3-8b-base/w64k-l0-50")


@pytest.mark.usefixtures("home")
def test_round_trip_official_saelens_official_is_bit_exact(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in official_to_saelens.convert("local/mine", out, progress=False):
        saelens_to_official.convert(folder, out / "back", num_layers=planted.NUM_LAYERS)
    for layer in range(planted.NUM_LAYERS):
        again = torch.load(out / "back" / f"layer{layer}.sae.pt", weights_only=True)
        assert again.keys() == planted.tensors(seed=layer).keys()
        for name, tensor in planted.tensors(seed=layer).items():
            assert torch.equal(again[name], tensor)
            assert again[name].is_contiguous()
    assert json.loads((out / "back" / "config.json").read_text()) == planted.settings()
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(out))
    assert torch.equal(qsl.load_sae("local/back/2").b_dec, planted.tensors(seed=2)["b_dec"])


def test_saelens_to_official_keeps_one_group_a_folder(out: Path) -> None:
    sae = planted.saelens_sae(planted.tensors())
    path = saelens_to_official.convert(sae, out, num_layers=3)
    assert path.name == "layer1.sae.pt"  # from its hook name
    with pytest.raises(CannotWrite, match="other SAEs"):
        saelens_to_official.convert(planted.saelens_sae(planted.tensors(), k=2), out, num_layers=3)


@pytest.mark.parametrize("option", ["apply_b_dec_to_input", "rescale_acts_by_decoder_norm"])
def test_what_the_layout_cannot_say_is_refused_or_folded(out: Path, option: str) -> None:
    weights = planted.tensors()
    weights["W_dec"] = weights["W_dec"] * torch.linspace(0.5, 2, planted.D_SAE)
    sae = planted.saelens_sae(weights, **{option: True})
    with pytest.raises(UnsupportedSAE, match="--fold"):
        saelens_to_official.convert(sae, out, num_layers=3)
    before = sae.W_enc.clone()
    path = saelens_to_official.convert(sae, out, num_layers=3, fold=True)
    assert torch.equal(sae.W_enc, before)  # the caller's SAE is not touched
    x = torch.randn(32, planted.D_MODEL)
    published = planted.saelens_sae(torch.load(path, weights_only=True))
    torch.testing.assert_close(published(x), sae(x), atol=1e-4, rtol=1e-4)


def test_other_saes_are_refused(out: Path) -> None:
    standard = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16))
    with pytest.raises(UnsupportedSAE, match="StandardSAE"):
        saelens_to_official.convert(standard, out, num_layers=3)
    normalised = planted.saelens_sae(planted.tensors(), normalize_activations="layer_norm")
    with pytest.raises(UnsupportedSAE, match="normalize_activations"):
        saelens_to_official.convert(normalised, out, num_layers=3)
    sae = planted.saelens_sae(planted.tensors())
    sae.cfg.metadata.hook_name = "blocks.1.hook_mlp_out"
    with pytest.raises(UnsupportedSAE, match="give layer"):
        saelens_to_official.convert(sae, out, num_layers=3)
    with pytest.raises(UnsupportedSAE, match="3 layers"):
        saelens_to_official.convert(sae, out, num_layers=3, layer=3)


def test_the_converted_convention_is_used(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the catalog does not know, the converted folder decides, also in `load_sae`."""
    from dataclasses import replace

    from qwen_scope_lens import catalog

    monkeypatch.setenv("QWEN_SCOPE_HOME", str(out))
    planted.write_group(out / "mine")
    unknown = replace(catalog.find_group("local/mine"), subtracts_b_dec=None, origin="third-party")
    monkeypatch.setitem(catalog._BY_NAME, "local/mine", unknown)
    monkeypatch.setitem(catalog._BY_NAME, unknown.short, unknown)
    for subtracts in (True, False):
        official_to_saelens.convert(
            unknown, out, layers=[0], apply_b_dec_to_input=subtracts, overwrite=True, progress=False
        )
        assert qsl.load_sae(f"{unknown.short}/0").cfg.apply_b_dec_to_input is subtracts


def test_a_converted_folder_of_something_else(home: Path) -> None:
    (folder,) = official_to_saelens.convert("local/mine", home, layers=[0], progress=False)
    config = json.loads((folder / "cfg.json").read_text())
    for name, value in [
        ("apply_b_dec_to_input", True),
        ("rescale_acts_by_decoder_norm", True),
        ("k", 99),
    ]:
        (folder / "cfg.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(WrongSettings, match=name):
            qsl.load_sae("local/mine/0")
    other = config["metadata"] | {"hook_name": "blocks.2.hook_resid_post"}
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": other}))
    with pytest.raises(WrongSettings, match="hook_name"):
        qsl.load_sae("local/mine/0")
    (folder / "cfg.json").write_text("{}")
    with pytest.raises(WrongSettings, match="architecture"):
        qsl.load_sae("local/mine/0")


@pytest.mark.usefixtures("home")
def test_a_layer_without_its_weights_is_not_done(out: Path) -> None:
    (folder,) = official_to_saelens.convert("local/mine", out, layers=[0], progress=False)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(CannotWrite, match="not a converted layer"):
        official_to_saelens.convert("local/mine", out, layers=[0], progress=False)
    official_to_saelens.convert("local/mine", out, layers=[0], overwrite=True, progress=False)
    assert (folder / "sae_weights.safetensors").exists()


def test_rounded_weights_are_not_passed_off_as_float32(home: Path) -> None:
    official_to_saelens.convert("local/mine", home, layers=[0], dtype="bfloat16", progress=False)
    with pytest.warns(UserWarning, match="does not bring back"):
        qsl.load_sae("local/mine/0")


@pytest.mark.parametrize("where", ["published", "converted"])
def test_directions_straight_from_the_file(home: Path, where: str) -> None:
    if where == "converted":
        official_to_saelens.convert("local/mine", home, layers=[1], progress=False)
    decoder = planted.tensors(seed=1)["W_dec"]
    assert torch.equal(qsl.load_directions("local/mine/1", [7, 0, 159]), decoder.T[[7, 0, 159]])
    assert torch.equal(qsl.load_directions("local/mine/1/7"), decoder[:, 7])
    assert qsl.load_directions("local/mine/1", []).shape == (0, planted.D_MODEL)
    with pytest.raises(LayerOutOfRange):
        qsl.load_directions("local/mine/1", [160])


@pytest.mark.usefixtures("home")
def test_a_link_in_the_way(tmp_path: Path, out: Path) -> None:
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "layer0").symlink_to(tmp_path)
    with pytest.raises(CannotWrite, match="link"):
        official_to_saelens.convert("local/mine", out, layers=[0], overwrite=True, progress=False)


@pytest.mark.parametrize("damage", ["missing", "file", "cfg", "weights"])
def test_saelens_to_official_on_something_else(tmp_path: Path, out: Path, damage: str) -> None:
    folder = tmp_path / "sae"
    if damage == "file":
        folder.write_text("")
    elif damage != "missing":
        planted.saelens_sae(planted.tensors()).save_model(folder)
        name = "cfg.json" if damage == "cfg" else "sae_weights.safetensors"
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(CheckpointError):
        saelens_to_official.convert(folder, out, num_layers=3)


def test_nan_is_not_published(out: Path) -> None:
    weights = planted.tensors()
    weights["b_dec"][0] = torch.nan
    with pytest.raises(NotFinite, match="b_dec"):
        saelens_to_official.convert(planted.saelens_sae(weights), out, num_layers=3)
    assert not out.exists()
