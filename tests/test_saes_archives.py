"""`.pt` files that other programs have packed are read right, or refused with a named error."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch

import qwen_scope_lens as qsl
from qwen_scope_lens import errors
from qwen_scope_lens.converters import official_to_saelens, saelens_to_official
from qwen_scope_lens.saes.checkpoint import read_activations

Change = Callable[[zipfile.ZipInfo, bytes], bytes]


@pytest.fixture
def layer(home: Path) -> Path:
    return home / "mine" / "layer1.sae.pt"


def repack(layer: Path, change: Change = lambda entry, data: data) -> None:
    """Unpack a checkpoint and pack it again, as a zip program may do."""
    with zipfile.ZipFile(layer) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(layer, "w") as archive:
        for old, data in entries:
            entry = zipfile.ZipInfo(old.filename)
            archive.writestr(entry, change(entry, data))


def readers(tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Whatever opens a published layer."""
    return {
        "load": lambda: qsl.load_sae("local/mine/1"),
        "directions": lambda: qsl.load_directions("local/mine/1", [3, 111]),
        "convert": lambda: official_to_saelens.convert(
            "local/mine", tmp_path / "out", layers=[1], progress=False
        ),
    }


def test_packed_again_by_another_writer(layer: Path, tmp_path: Path) -> None:
    torch.save(planted.tensors(seed=1), layer)
    weights = torch.load(layer, weights_only=True)
    repack(layer)
    places = [zipfile.ZipFile(layer).getinfo(name) for name in zipfile.ZipFile(layer).namelist()]
    assert any(entry.header_offset % 4 for entry in places)  # some floats are not aligned
    sae = qsl.load_sae("local/mine/1")
    for name in ("W_enc", "W_dec"):
        assert torch.equal(getattr(sae, name), weights[name].T)
        assert getattr(sae, name).data_ptr() % 4 == 0
    assert torch.equal(sae.b_enc, weights["b_enc"])
    found = readers(tmp_path)
    assert torch.equal(found["directions"](), weights["W_dec"].T[[3, 111]])
    found["convert"]()
    again = qsl.load_sae("local/mine/1", folder=tmp_path / "out")
    assert torch.equal(again.W_enc, sae.W_enc)
    assert torch.equal(again.W_dec, sae.W_dec)


def deflated(entry: zipfile.ZipInfo, data: bytes) -> bytes:
    if entry.filename.endswith("data/1"):
        entry.compress_type = zipfile.ZIP_DEFLATED
    return data


def big_endian(entry: zipfile.ZipInfo, data: bytes) -> bytes:
    if entry.filename.endswith("byteorder"):
        return b"big"
    return (
        np.frombuffer(data, np.float32).byteswap().tobytes() if "/data/" in entry.filename else data
    )


def short(entry: zipfile.ZipInfo, data: bytes) -> bytes:
    """One record is half as long as data.pkl says. The rest would be bytes of the next record."""
    return data[: len(data) // 2] if entry.filename.endswith("data/0") else data


def renamed(entry: zipfile.ZipInfo, data: bytes) -> bytes:
    entry.filename = entry.filename.replace("data/2", "data/22")
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deflated, r"data/1 is compressed.*torch\.load"),
        (big_endian, r"byte order b'big'"),
        (short, r"data/0 has 20,480 bytes, but data\.pkl says 10240 numbers"),
        (renamed, r"data/2 is missing"),
    ],
)
@pytest.mark.parametrize("reader", ["load", "directions", "convert"])
def test_records_that_cannot_be_taken_as_they_are(
    layer: Path, tmp_path: Path, change: Change, message: str, reader: str
) -> None:
    repack(layer, change)
    with pytest.raises(errors.NotACheckpoint, match=message):
        readers(tmp_path)[reader]()
    assert not list(tmp_path.glob("out/*/layer*"))


def test_two_records_of_one_name(layer: Path) -> None:
    with zipfile.ZipFile(layer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(n for n in archive.namelist() if n.endswith("data/0")), b"")
    with pytest.raises(errors.NotACheckpoint, match="two records"):
        qsl.load_sae("local/mine/1")


@pytest.mark.parametrize("reader", ["load", "directions", "convert"])
def test_one_number_that_stands_for_many(home: Path, tmp_path: Path, reader: str) -> None:
    """Two kilobytes that claim 2^20 x 2^14 numbers, four times over."""
    d_sae, d_model = 2**20, 2**14
    planted.write_group(home / "mine", range(0), d_sae=d_sae, d_model=d_model)
    one, shapes = torch.zeros(1), {"W_enc": (d_sae, d_model), "W_dec": (d_model, d_sae)}
    shapes |= {"b_enc": (d_sae,), "b_dec": (d_model,)}  # type: ignore[dict-item]
    tensors = {name: one.expand(shape) for name, shape in shapes.items()}
    torch.save(tensors, home / "mine" / "layer1.sae.pt")
    with pytest.raises(errors.WrongShape, match=r"claims .* the file holds 1 for it"):
        readers(tmp_path)[reader]()


@pytest.mark.parametrize(
    "view",
    [
        lambda w: torch.zeros(planted.D_SAE).expand(planted.D_MODEL, -1).T,
        lambda w: torch.zeros(2 * planted.D_SAE).as_strided(
            (planted.D_SAE, planted.D_MODEL), (1, 1)
        ),
    ],
    ids=["stride 0", "overlapping"],
)
def test_repeated_numbers(layer: Path, view: Callable[[object], torch.Tensor]) -> None:
    weights = planted.tensors(seed=1)
    torch.save(weights | {"W_enc": view(weights)}, layer)
    with pytest.raises(errors.WrongShape, match="stands for many"):
        qsl.load_sae("local/mine/1")


def test_parameters_and_views_are_read_as_torch_reads_them(layer: Path) -> None:
    weights = planted.tensors(seed=1)
    wide = torch.cat([torch.ones(3, planted.D_MODEL), weights["W_enc"]])
    odd = {"W_enc": wide[3:], "W_dec": torch.nn.Parameter(weights["W_dec"])}
    torch.save(weights | odd, layer)
    sae = qsl.load_sae("local/mine/1")
    assert torch.equal(sae.W_enc, weights["W_enc"].T)
    assert torch.equal(sae.W_dec, weights["W_dec"].T)
    assert torch.equal(qsl.load_directions("local/mine/1", 3), weights["W_dec"][:, 3])


@pytest.mark.parametrize("content", [b"(2**40,)", b"('a',)", b"(1e9,)", b"__import__('os')"])
def test_damaged_headers_of_arrays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((3, 4), np.float32))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"(3, 4)", content.ljust(6)))
    with pytest.raises(errors.NotACheckpoint, match="not a plain array"):
        read_activations(path)
    torch.save(torch.zeros(1).expand(2**40), tmp_path / "x.pt")
    with pytest.raises(errors.WrongShape, match="stands for many"):
        read_activations(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["meta", "quantised", "torch.sparse_coo"])
def test_tensors_that_are_no_plain_numbers(kind: str, tmp_path: Path) -> None:
    plain = torch.zeros(20, 4)
    odd = {
        "meta": plain.to("meta"),
        "quantised": torch.quantize_per_tensor(plain, 1.0, 0, torch.qint8),
        "torch.sparse_coo": plain.to_sparse(),
    }[kind]
    torch.save(odd, tmp_path / "x.pt")
    with pytest.raises(errors.NotACheckpoint, match=f"of the kind {kind}: expected plain numbers"):
        read_activations(tmp_path / "x.pt")


# config.json


def test_only_files_are_opened(home: Path, layer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen_scope_lens.cli import main

    (home / "pipe").mkdir()
    os.mkfifo(home / "pipe" / "config.json")
    assert main(["list"]) == 0
    assert "local/mine" in capsys.readouterr().out
    with pytest.raises(errors.UnknownName):
        qsl.find_group("local/pipe")
    layer.unlink()
    os.mkfifo(layer)
    with pytest.raises(errors.CheckpointMissing):
        qsl.load_sae("local/mine/1")
    converted = home / "mine" / "layer2"
    converted.mkdir()
    os.mkfifo(converted / "cfg.json")
    (converted / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(errors.WrongSettings, match="FIFO"):
        qsl.load_sae("local/mine/2")
    (converted / "cfg.json").unlink()
    (converted / "cfg.json").write_text(json.dumps({"architecture": "topk", "metadata": []}))
    (converted / "sae_weights.safetensors").unlink()
    os.mkfifo(converted / "sae_weights.safetensors")
    with pytest.raises(errors.NotACheckpoint):
        saelens_to_official.convert(converted, home / "out", num_layers=3)


@pytest.mark.parametrize(
    "text",
    ['{"a": ' * 10**5, '{"k": ' + "9" * 5000 + "}", '{"k": ' + "9" * 4000 + "}", '{"k": 1e400}'],
    ids=["deep", "5000 digits", "4000 digits", "infinite"],
)
def test_absurd_settings(home: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen_scope_lens.cli import main

    whole = text.replace('{"k"', json.dumps(planted.settings())[:-1] + ', "k"')
    (home / "mine" / "config.json").write_text(whole)
    with pytest.raises(errors.ScopeError) as caught:
        qsl.load_sae("local/mine/1")
    assert len(str(caught.value)) < 400
    assert main(["list"]) == 0
    group = qsl.find_group("mini-qwen3/w1k-l0-16")
    folder = home / group.repo_name
    planted.write_group(folder, range(1))
    (folder / "config.json").write_text(whole)
    with pytest.raises(errors.WrongSettings) as caught:
        qsl.load_sae(f"{group.short}/0", folder=folder)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["\ud800", "a\x1b[2J", "a\nb"])
def test_names_that_no_terminal_should_see(
    home: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen_scope_lens.cli import main

    planted.write_group(home / "odd", range(0), base_model=name)
    with pytest.raises(errors.WrongSettings, match="base_model"):
        qsl.find_group("local/odd")
    assert main(["list"]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
