"""`qsl mcp`: the tools of an agent, through the protocol's own client, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from feature_stores import build_store
from mcp import Client

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.cli.verbs import main
from qwen_scope_lens.errors import OutsideFolders
from qwen_scope_lens.labels import Label, LabelPack
from qwen_scope_lens.mcp import Folders, Toolbox, make_server
from qwen_scope_lens.stores import FeatureStore

GROUP = "mini-qwen3/w1k-l0-16"
CHINESE = f"{GROUP}/6/423"
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    documents = [[{5: 2.0}, {5: 1.0, 7: 3.0}], [{9: 1.5}]]
    return build_store(tmp_path_factory.mktemp("folder") / "store", documents)


@pytest.fixture(scope="module")
def toolbox(planted_store: FeatureStore) -> Toolbox:
    labels = LabelPack([Label(FeatureRef.parse(CHINESE), "Chinese: programs and files")])
    group = find_group(GROUP)
    folders = Folders.of([planted_store.path.parent])
    return Toolbox(group, (6,), group.backbone.model_id, labels, folders)


@pytest.fixture(scope="module")
def ask(toolbox: Toolbox) -> Ask:
    """Call a tool through the protocol: its answer, or `{"error": message}`."""

    def call(name: str, **arguments: Any) -> dict[str, Any]:
        async def once() -> Any:
            async with Client(make_server(toolbox)) as client:
                return await client.call_tool(name, arguments)

        result = asyncio.run(once())
        if result.is_error:
            return {"error": result.content[0].text}
        found: dict[str, Any] = result.structured_content
        return found

    return call


def test_tools_are_told_with_their_arguments(toolbox: Toolbox) -> None:
    async def listed() -> Any:
        async with Client(make_server(toolbox)) as client:
            return (await client.list_tools()).tools, client.instructions

    tools, instructions = asyncio.run(listed())
    by_name = {tool.name: tool for tool in tools}
    assert set(by_name) == {"about", "read", "feature", "search", "steer", "query"}
    assert "Call `about` first" in instructions
    assert by_name["steer"].input_schema["required"] == ["prompt", "edits"]
    assert "at most 512" in by_name["steer"].description
    assert all(tool.annotations.read_only_hint for tool in tools)


def test_about_names_what_can_be_asked(ask: Ask, planted_store: FeatureStore) -> None:
    found = ask("about")
    assert found["group"] == GROUP
    assert found["layers"] == [6]
    assert found["stores"] == [planted_store.path.name]


def test_read_is_that_of_the_command_line(ask: Ask) -> None:
    found = ask("read", text="内核读取文件。", top=2)
    [text] = found["texts"]
    assert found["format"] == "qwen-scope-reading"
    assert [row["feature"] for row in text["features"]] == [CHINESE, f"{GROUP}/6/404"]
    assert text["features"][0]["label"] == "Chinese: programs and files"
    assert ask("read", text=" ")["error"].endswith(
        "BadText: there is no text to read: give some words"
    )
    assert "layer" in ask("read", text="a", layers=[8])["error"]
    assert "expected 1 to 50" in ask("read", text="a b", top=0)["error"]
    assert "expected at most 200,000" in ask("read", text="a" * 200_001)["error"]


def test_a_feature_is_what_the_sae_says(ask: Ask, toolbox: Toolbox) -> None:
    import qwen_scope_lens as qsl

    found = ask("feature", address=CHINESE)
    assert "软件包" in [token for token, _ in found["promoted"]]
    assert found["label"]["text"] == "Chinese: programs and files"
    sae = qsl.load_sae(f"{GROUP}/6")
    rows = sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True)
    cosines = rows @ rows[423]
    cosines[423] = -2
    near, cosine, _ = found["nearest"][0]
    assert near == f"{GROUP}/6/{int(cosines.argmax())}"
    assert cosine == pytest.approx(float(cosines.max()), abs=1e-5)
    assert len(found["nearest"]) == 10
    other = "mini-qwen3.5/w1k-l0-16/6/1"
    assert "belongs to other SAEs" in ask("feature", address=other)["error"]
    assert "UnknownName" in ask("feature", address="6/423")["error"]


def test_search_finds_by_address_label_and_token(ask: Ask) -> None:
    def found(query: str) -> list[tuple[str, str]]:
        return [(row["feature"], row["why"]) for row in ask("search", query=query)["features"]]

    assert found("423")[0] == (CHINESE, "address")
    assert found(CHINESE) == [(CHINESE, "address")]
    assert found("FILES chinese")[0] == (CHINESE, "label")
    by_token = ask("search", query="软件包", limit=5)["features"]
    assert len(by_token) == 5
    assert {row["why"] for row in by_token} == {"token"}
    best = ask("feature", address=by_token[0]["feature"])
    assert by_token[0]["score"] == pytest.approx(dict(best["promoted"])["软件包"], rel=1e-3)


def test_steer_writes_both_and_leaves_the_model_as_it_was(ask: Ask) -> None:
    edit = f"{GROUP}/6/423:add:+2typical"
    found = ask("steer", prompt="The package manager", edits=[edit], new_tokens=8)
    assert found["fired"] is True
    assert found["steered"] != found["unsteered"]
    assert found["edits"][0]["fired on"] > 0
    again = ask("steer", prompt="The package manager", edits=[f"{CHINESE}:add:0"], new_tokens=8)
    assert again["unsteered"] == again["steered"] == found["unsteered"]
    assert "BadPlan" in ask("steer", prompt="a", edits=[])["error"]
    assert "BadPlan" in ask("steer", prompt="a", edits=["nonsense"])["error"]
    assert "expected 1 to 512" in ask("steer", prompt="a", edits=[edit], new_tokens=513)["error"]


def test_a_store_answers_and_cannot_be_changed(ask: Ask, planted_store: FeatureStore) -> None:
    name = planted_store.path.name
    count = "select count(*) n, current_date as day from documents"
    found = ask("query", store=name, sql=count)
    assert found["rows"][0]["n"] == planted_store.n_docs
    assert isinstance(found["rows"][0]["day"], str)
    found = ask("query", store=str(planted_store.path), sql="from features select value", limit=3)
    assert len(found["rows"]) == 3
    assert found["more"] == 1
    assert "BadQuery" in ask("query", store=name, sql="drop view features")["error"]
    assert "BadQuery" in ask("query", store=name, sql="from read_text('/etc/hostname')")["error"]


def test_a_query_that_takes_long_is_ended(
    ask: Ask, planted_store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_scope_lens.mcp.toolbox.MOST_SECONDS", 0.2)
    endless = (
        "select count(*) from range(10000000) a, range(10000000) b where a.range % 7 = b.range"
    )
    assert "ended after 0.2 s" in ask("query", store=planted_store.path.name, sql=endless)["error"]
    assert planted_store.sql("select 1 a", most_seconds=60)["a"].to_pylist() == [1]


def test_paths_outside_the_folders_are_refused(
    ask: Ask, planted_store: FeatureStore, tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    outside = planted_store.path
    (inside / "link").symlink_to(outside)
    copy = inside / "copy"
    copy.mkdir()
    for path in outside.iterdir():
        (copy / path.name).symlink_to(path)
    folders = Folders.of([inside])
    assert folders.stores() == []
    for name in ("link", "copy", str(outside), "../inside/link", "", ".", "a\0b", "/", "~"):
        with pytest.raises(OutsideFolders):
            folders.store(name)
    with pytest.raises(OutsideFolders, match="no folder"):
        Folders().store(str(outside))
    assert "OutsideFolders" in ask("query", store="../..", sql="from documents")["error"]


def test_what_goes_wrong_inside_is_not_told(toolbox: Toolbox, monkeypatch: Any) -> None:
    def broken(address: str) -> dict[str, Any]:
        """Fails."""
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(toolbox, "feature", broken)

    async def once() -> Any:
        async with Client(make_server(toolbox)) as client:
            return await client.call_tool("feature", {"address": CHINESE})

    result = asyncio.run(once())
    assert result.is_error
    assert "secret" not in result.content[0].text


def test_wrong_folders_are_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mcp", "--folder", str(tmp_path / "none")]) == 1
    assert "there is no folder" in capsys.readouterr().err
