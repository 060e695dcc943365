"""Each way in which a file can be wrong has its own error, which says what to do."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
import torch
from safetensors.torch import save_file

import qwen_scope_lens as qsl
from qwen_scope_lens import errors
from qwen_scope_lens.files import gunzip


@pytest.fixture
def layer(home: Path) -> Path:
    return home / "mine" / "layer1.sae.pt"


def save_with(
    layer: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    torch.save(change(planted.tensors(seed=1)), layer)


def load(layer: Path) -> qsl.ScopeSAE:
    return qsl.load_sae("local/mine/1")


def test_missing_file(layer: Path) -> None:
    layer.unlink()
    with pytest.raises(errors.CheckpointMissing, match=r"layer1\.sae\.pt"):
        load(layer)
    with pytest.raises(FileNotFoundError):  # the error is one of Python's, too
        load(layer)


@pytest.mark.parametrize("share", [0.99, 0.5, 0.01])
def test_truncated_file(layer: Path, share: float) -> None:
    data = layer.read_bytes()
    layer.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(errors.TruncatedCheckpoint, match="fetch it again"):
        load(layer)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x04K\x01."])
def test_not_a_zip(layer: Path, content: bytes) -> None:
    layer.write_bytes(content)
    with pytest.raises(errors.NotACheckpoint, match="not a torch zip checkpoint"):
        load(layer)


def test_a_zip_of_something_else(layer: Path) -> None:
    import zipfile

    with zipfile.ZipFile(layer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(errors.NotACheckpoint):
        load(layer)


def test_git_lfs_pointer(layer: Path) -> None:
    layer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(errors.NotACheckpoint, match="git lfs pull"):
        load(layer)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_a_pickle_with_code_is_never_executed(
    layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"W_enc": Bomb()}, layer)
    with pytest.raises(errors.UnsafeCheckpoint, match="nothing was executed"):
        load(layer)
    layer.write_bytes(pickle.dumps(Bomb()))  # the old format, without a zip around it
    with pytest.raises(errors.NotACheckpoint):
        load(layer)
    assert not (tmp_path / "executed").exists()


def test_missing_and_extra_keys(layer: Path) -> None:
    save_with(layer, lambda w: {name: w[name] for name in ("W_enc", "W_dec", "b_enc")})
    with pytest.raises(errors.WrongKeys, match="b_dec"):
        load(layer)
    save_with(layer, lambda w: w | {"threshold": torch.zeros(1)})
    with pytest.raises(errors.WrongKeys, match="threshold"):
        load(layer)
    torch.save([torch.zeros(1)], layer)
    with pytest.raises(errors.WrongKeys, match="a list"):
        load(layer)


def test_transposed_matrix(layer: Path) -> None:
    save_with(layer, lambda w: w | {"W_enc": w["W_enc"].T.contiguous()})
    with pytest.raises(errors.WrongShape, match="It is transposed"):
        load(layer)


def test_wrong_width_and_wrong_d_model(layer: Path) -> None:
    torch.save(planted.tensors(d_sae=planted.D_SAE * 2), layer)
    with pytest.raises(errors.WrongShape, match="another group"):
        load(layer)
    torch.save(planted.tensors(d_model=planted.D_MODEL * 2), layer)
    with pytest.raises(errors.WrongShape, match="d_model 64"):
        load(layer)


def test_wrong_dtype(layer: Path) -> None:
    save_with(layer, lambda w: w | {"W_enc": w["W_enc"].to(torch.int8)})
    with pytest.raises(errors.WrongShape, match="int8"):
        load(layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["b_enc", "b_dec"])
def test_nan_and_inf(layer: Path, name: str, value: float) -> None:
    weights = planted.tensors(seed=1)
    weights[name][5] = value
    torch.save(weights, layer)
    with pytest.raises(errors.NotFinite, match=f"{name} has 1 values.*at 5"):
        load(layer)


def test_layer_out_of_range(layer: Path) -> None:
    with pytest.raises(errors.LayerOutOfRange, match="counted from 0"):
        qsl.load_sae("local/mine/3")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 99),
        ("d_sae", 5),
        ("d_model", 5),
        ("num_layers", 24),
        ("hook_point", "mlp_out"),
        ("base_model", "Qwen/Qwen3.5-2B-Base"),  # of the same shape
    ],
)
def test_config_json_disagrees_with_the_named_group(
    tmp_path: Path, name: str, value: object
) -> None:
    group = qsl.find_group("qwen3-1.7b-base/w32k-l0-50")
    settings = planted.settings(
        d_model=group.d_model,
        d_sae=group.d_sae,
        k=group.k,
        num_layers=28,
        base_model="Qwen/Qwen3-1.7B-Base",
    )
    (tmp_path / "config.json").write_text(json.dumps(settings | {name: value}))
    (tmp_path / "layer0.sae.pt").write_bytes(b"never read: the settings come first")
    with pytest.raises(errors.WrongSettings, match=f"{name} = {value!r}"):
        qsl.load_sae(f"{group.short}/0", folder=tmp_path)


def test_folder_name_disagrees_with_the_named_group(tmp_path: Path) -> None:
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_100"
    folder.mkdir()
    torch.save(planted.tensors(), folder / "layer0.sae.pt")
    with pytest.raises(errors.WrongSettings, match="k = 100"):
        qsl.load_sae("qwen3-1.7b-base/w32k-l0-50/0", folder=folder)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_config_json_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "layer0.sae.pt").write_bytes(b"never read: the settings come first")
    with pytest.raises(errors.WrongSettings, match=r"config\.json"):
        qsl.load_sae("qwen3-1.7b-base/w32k-l0-50/0", folder=tmp_path)


def test_unknown_release() -> None:
    with pytest.raises(errors.UnknownName, match="qsl list"):
        qsl.load_sae("qwen-scope-9-8b/w1k-l0-1/0")


def test_third_party_safetensors_damaged(tmp_path: Path) -> None:
    path = tmp_path / "sae_L11_latest.safetensors"
    save_file({"W_enc": torch.zeros(4, 4)}, path)
    with pytest.raises(errors.WrongKeys, match="OpenInterpretability"):
        qsl.load_sae("qwen3.6-27b/w64k-l0-128/11", folder=tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(errors.TruncatedCheckpoint):
        qsl.load_sae("qwen3.6-27b/w64k-l0-128/11", folder=tmp_path)
    path.write_bytes(b"\0")
    with pytest.raises(errors.NotACheckpoint):
        qsl.load_sae("qwen3.6-27b/w64k-l0-128/11", folder=tmp_path)


def test_another_models_folder_of_the_same_shape(tmp_path: Path) -> None:
    folder = tmp_path / "SAE-Res-Qwen3.5-2B-Base-W32K-L0_50"
    folder.mkdir()
    (folder / "layer0.sae.pt").write_bytes(b"never read: the name comes first")
    with pytest.raises(errors.WrongSettings, match=r"Qwen3\.5-2B-Base"):
        qsl.load_sae("qwen3-1.7b-base/w32k-l0-50/0", folder=folder)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_never_give_a_raw_error(layer: Path, seed: int) -> None:
    """An archive with damaged headers loads, or raises a named error."""
    import random

    rng = random.Random(seed)
    data = layer.read_bytes()
    places = [*range(700), *range(len(data) - 1200, len(data))]
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.sample(places, 3):
            damaged[place] ^= 1 << rng.randrange(8)
        layer.write_bytes(damaged)
        try:
            load(layer)
        except errors.CheckpointError:
            refused += 1
    assert refused > 0


def test_sparse_tensors(layer: Path) -> None:
    save_with(layer, lambda w: w | {"b_enc": w["b_enc"].to_sparse()})
    with pytest.raises(errors.NotACheckpoint, match=r"sparse_coo.*to_dense"):
        load(layer)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_layers": 0},
        {"num_layers": 10**12},
        {"d_model": "64"},
        {"k": 4.5},
        {"k": 1000},
        {"base_model": None},
    ],
)
def test_impossible_descriptions_of_ones_own(
    home: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen_scope_lens.cli import main

    planted.write_group(home / "odd", range(0), **settings)
    with pytest.raises(errors.WrongSettings, match="does not describe a group"):
        qsl.find_group("local/odd")
    assert main(["list"]) == 0  # the others are still shown
    captured = capsys.readouterr()
    assert "544 official files" in captured.err
    assert "does not describe a group" in captured.err


def test_a_model_folder_is_no_group(home: Path) -> None:
    (home / "model").mkdir()
    (home / "model" / "config.json").write_text('{"model_type": "qwen3", "architectures": []}')
    assert [group.short for group in qsl.catalog.local_groups()] == ["local/mine"]
    for name in ("local/", "local/.", "local/..", "local/model"):
        with pytest.raises(errors.UnknownName):
            qsl.find_group(name)


def test_unknown_dtype(layer: Path) -> None:
    with pytest.raises(errors.WrongSettings, match="float32, bfloat16, float16"):
        qsl.load_sae("local/mine/1", dtype="int8")  # type: ignore[arg-type]
    assert qsl.load_sae("local/mine/1", dtype=torch.bfloat16).cfg.dtype == "bfloat16"


def test_float16_overflow(layer: Path) -> None:
    save_with(layer, lambda w: w | {"b_enc": w["b_enc"] + 1e6})
    with pytest.raises(errors.NotFinite, match="overflows float16"):
        qsl.load_sae("local/mine/1", dtype="float16")


def test_a_revision_of_a_local_file_is_not_known(layer: Path) -> None:
    with pytest.raises(errors.WrongSettings, match="revision"):
        qsl.load_sae("local/mine/1", revision="deadbeef")


@pytest.mark.parametrize("name", [None, 5, "qwen3-8b-base/w64k-l0-50"])
def test_names_that_name_no_layer(name: object) -> None:
    with pytest.raises(errors.UnknownName):
        qsl.load_sae(name)  # type: ignore[arg-type]


def test_a_gzipped_file_is_unpacked_up_to_a_limit() -> None:
    whole = gzip.compress(b"a" * 5000)
    assert gunzip(whole + whole) == b"a" * 10_000
    with pytest.raises(ValueError, match="unpacks to more"):
        gunzip(whole, most=4999)
    with pytest.raises(EOFError):
        gunzip(whole[:-3])
    with pytest.raises(zlib.error):
        gunzip(b"no gzip")
