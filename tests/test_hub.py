"""A hub out of reach is noticed in seconds, once; what is in the cache is found all the same."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

import qwen_scope_lens as qsl
from qwen_scope_lens import hub
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import CheckpointMissing, HubUnreachable

SAE = "qwen3-8b-base/w64k-l0-50/20"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """A process that may ask the hub, where no name resolves. The tries are listed."""
    tries: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], timeout: float) -> socket.socket:
        tries.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("QWEN_SCOPE_HOME", raising=False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hub, "answers", {})
    return tries


def test_without_a_network_the_way_out_comes_soon(
    online: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HubUnreachable) as caught:
        qsl.load_sae(SAE)
    said = str(caught.value)
    for part in (SAE, "FOLDER/SAE-Res-Qwen3-8B-Base-W64K-L0_50/layer20.sae.pt", "mini-qwen3"):
        assert part in said
    assert "Name or service not known" in said
    assert "HF_HUB_OFFLINE=1" in said
    with pytest.raises(CheckpointMissing, match="load_model") as missing:
        qsl.load_model("Qwen/Qwen3-8B-Base")
    assert "Name or service not known" in str(missing.value)
    assert main(["read", "some words", "--sae", SAE]) == 1
    assert "QWEN_SCOPE_HOME=FOLDER" in capsys.readouterr().err
    assert online == [("huggingface.co", 443)] * 3  # three tries, for all of these together


def test_a_hub_that_answered_is_left_to_its_client(
    online: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.undo()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(hub, "getproxies", dict)
        monkeypatch.setattr(hub, "answers", {})
        assert hub.out_of_reach() is None
    assert hub.out_of_reach() is None  # not asked again: the client repeats what fails now
    monkeypatch.setattr(hub, "answers", {})
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    assert "127.0.0.1" in str(hub.out_of_reach())
    monkeypatch.setattr(hub, "answers", {})
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": "http://proxy:1"})
    monkeypatch.setattr(hub, "proxy_bypass", lambda host: False)
    assert hub.out_of_reach() is None  # the proxy has to know
    assert hub.only_cache(True)


def test_a_folder_that_is_not_there_asks_no_hub(online: list[tuple[str, int]]) -> None:
    with pytest.raises(CheckpointMissing, match="is not a folder"):
        qsl.load_model("/nowhere/at/all")
    assert not online
