"""Corpora: every format says the same, bad rows are named, nothing is changed silently."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_scope_lens.errors import BadCorpus
from qwen_scope_lens.stores import Document, corpus_formats, read_corpus
from qwen_scope_lens.stores.corpus import as_corpus, survey

ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "One, two\nthree", "lang": "en", "stars": 5},
    {"id": "b", "text": "你好\u2028世界 🙂", "lang": "zh", "stars": None},
    {"id": "c", "text": 'quo"ted\ttab', "lang": None, "stars": 2},
]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            out.writeheader()
            out.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.ndjson", "x.json", "x.csv", "x.tsv", "x.parquet", "dataset"]
)
def test_every_format_reads_the_same(tmp_path: Path, name: str) -> None:
    corpus = read_corpus(write(tmp_path, name))
    found = list(corpus)
    assert [d.key for d in found] == ["a", "b", "c"]
    assert [d.text for d in found] == [row["text"] for row in ROWS]
    if name[-3:] in ("csv", "tsv"):  # everything is text there
        assert found[1].labels == {"lang": "zh", "stars": ""}
    else:
        assert [d.labels for d in found] == [
            {"lang": row["lang"], "stars": row["stars"]} for row in ROWS
        ]
    assert list(corpus) == found  # again


def test_text_is_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffone\r\n\n  \nzwei\u2028drei\nvier".encode())
    assert [(d.key, d.text) for d in read_corpus(path)] == [
        ("0", "one"),
        ("1", "zwei\u2028drei"),
        ("2", "vier"),
    ]


def test_chats_and_columns(tmp_path: Path) -> None:
    rows = [{"chat": CHAT, "name": 7, "tone": "kind", "meta": {"a": [1]}, "x": 1.5, "ok": True}]
    for name in ("x.jsonl", "x.parquet"):
        path = write(tmp_path, name, rows)
        [document] = read_corpus(path, text="chat", key="name")
        assert document.messages == tuple(CHAT)
        assert (document.key, document.content) == ("7", CHAT)
        assert document.labels == {"tone": "kind", "x": 1.5, "ok": True}
        [document] = read_corpus(path, text="chat", labels=["meta"])
        assert json.loads(str(document.labels["meta"])) == {"a": [1]}
        assert document.key == "0"
    assert survey(read_corpus(path, text="chat"), "x").has_chats


def test_splits(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "d")
    assert len(list(read_corpus(tmp_path / "d", split="test"))) == 1
    for split in (None, "dev"):
        with pytest.raises(BadCorpus, match="splits train, test"):
            list(read_corpus(tmp_path / "d", split=split))


BAD = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1 is a list"),
    "number.jsonl": (b'{"text": 3}\n', "text is a int"),
    "empty.jsonl": (b'{"text": "a"}\n{"text": ""}\n', "line 2 is empty"),
    "null.jsonl": (b'{"text": null}\n', "line 1 is empty"),
    "column.jsonl": (b'{"body": "a"}\n', "no column 'text' or 'messages': it has body"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), "not UTF-8"),
    "latin.csv": ("text\né\n".encode("latin-1"), "UTF-8 CSV"),
    "fields.csv": (b"text,lang\na,en\nb,en,extra\n", "line 3 has a different number of fields"),
    "chat.jsonl": (b'{"messages": [{"role": "user"}]}\n', "needs a role and a content"),
    "object.json": (b'{"text": "a"}', "holds a dict"),
    "broken.parquet": (b"PAR1 no", "cannot be read as Parquet"),
    "what.docx": (b"x", ".docx is not a known format"),
    "none.jsonl": (b"\n\n", "has no documents"),
    "none.txt": (b"", "has no documents"),
    "keys.jsonl": (b'{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "the same key as another"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_corpora_are_named(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCorpus) as caught:
        survey(read_corpus(tmp_path / name), name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt", "c.csv"])
def test_a_file_without_an_end_of_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a sparse one of 200 GB: it is not read whole, line by line means that."""
    monkeypatch.setattr(corpus_formats, "MOST_IN_A_LINE", 1000)
    (tmp_path / name).write_text("text" + " " * 997)
    with pytest.raises(BadCorpus, match="a line of more than 1,000 characters"):
        list(read_corpus(tmp_path / name))


def test_bad_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", [*ROWS, {"text": "d", "doc": 1}])
    with pytest.raises(BadCorpus, match="does not exist"):
        read_corpus(tmp_path / "none.jsonl")
    with pytest.raises(BadCorpus, match="no column 'body': it has id, text, lang, stars"):
        list(read_corpus(path, text="body"))
    with pytest.raises(BadCorpus, match="no column 'tone'"):
        list(read_corpus(path, labels=["tone"]))
    with pytest.raises(BadCorpus, match="no key 'name'"):
        list(read_corpus(path, key="name"))
    with pytest.raises(BadCorpus, match="cannot be called 'text'"):
        list(read_corpus(path, labels=["text"], text="id"))
    with pytest.raises(BadCorpus, match="put a text into a list"):
        as_corpus("one text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadCorpus, match="save_to_disk"):
        list(read_corpus(tmp_path / "folder"))


def test_skipping_empty_documents(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", [{"text": "a"}, {"text": ""}, {"text": None}, {"text": "b"}])
    assert [d.key for d in read_corpus(path, skip_empty=True)] == ["0", "3"]


def test_given_in_python() -> None:
    mixed = ["a text", CHAT, {"text": "row", "lang": "en"}, Document("mine", "own")]
    found = list(as_corpus(mixed))
    assert [d.key for d in found] == ["0", "1", "2", "mine"]
    assert found[1].messages == tuple(CHAT)
    assert found[2].labels == {"lang": "en"}
    with pytest.raises(BadCorpus, match="document 1 is a int"):
        list(as_corpus(["a", 3]))


def test_a_survey_notices_every_change() -> None:
    base = survey(as_corpus(ROWS), "x")
    assert base.n_docs == 3
    assert base.labels == {"lang": "str", "stars": "int"}
    for changed in (
        ROWS[:2],
        [*ROWS[1:], ROWS[0]],
        [{**ROWS[0], "text": "One, two\nthree "}, *ROWS[1:]],
        [{**ROWS[0], "lang": "fr"}, *ROWS[1:]],
        [{**ROWS[0], "id": "A"}, *ROWS[1:]],
    ):
        assert survey(as_corpus(changed), "x").sha256 != base.sha256
    assert survey(as_corpus([{"text": "a", "x": 1}, {"text": "b", "x": 1.5}]), "x").labels == {
        "x": "float"
    }
    assert survey(as_corpus([{"text": "a", "x": 1}, {"text": "b", "x": "1"}]), "x").labels == {
        "x": "str"
    }
    assert survey(as_corpus([{"text": "a", "x": 2**70}]), "x").labels == {"x": "str"}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True))
def test_any_text_survives(tmp_path: Path, texts: list[str]) -> None:
    """Also line separators, controls and quotes; a lone surrogate becomes U+FFFD."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    clean = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
    assert [d.text for d in read_corpus(path)] == clean


def test_a_dataset_on_the_hub_may_name_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*names: Any, revision: str | None) -> dict[str, Any]:
        asked.append((*names, revision))
        return {"train": datasets.Dataset.from_list([{"text": "a"}]), "test": []}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [d.text for d in read_corpus("cais/mmlu:all", split="train")] == ["a"]
    assert [d.text for d in read_corpus("imdb", split="train", revision="v2")] == ["a"]
    assert asked == [("cais/mmlu", "all", None), ("imdb", None, "v2")]


def test_gzipped_lines_are_read_and_a_cut_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "whole.jsonl.gz").write_bytes(whole)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    assert [d.text for d in read_corpus(tmp_path / "whole.jsonl.gz")] == ["a", "b"]
    for name in ("cut", "plain"):
        with pytest.raises(BadCorpus, match="not a whole gzip file"):
            list(read_corpus(tmp_path / f"{name}.jsonl.gz"))


def test_whole_numbers_beyond_64_bits_are_kept_as_text() -> None:
    rows = [{"text": "a", "uid": 2**70}, {"text": "b", "uid": 5}]
    assert survey(as_corpus(rows), "rows").labels == {"uid": "str"}
