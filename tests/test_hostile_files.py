"""Files and folders from somebody else: links, FIFOs, numbers out of bounds, code, full disks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_stores import GROUP, build_store, random_documents
from tiny_models import make_model, make_tokenizer

import qwen_scope_lens as qsl
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import (
    BadCorpus,
    BadFile,
    BadQuery,
    BadText,
    CannotWrite,
    NotACheckpoint,
    StoreDamaged,
    StoreMismatch,
    UnsafeCheckpoint,
    WrongModel,
    WrongTokenizer,
)
from qwen_scope_lens.files import exclusive, file_sha256, read_json, whole_file, whole_folder
from qwen_scope_lens.labels import LabelPack
from qwen_scope_lens.models import load_model
from qwen_scope_lens.models.tokenize import encode
from qwen_scope_lens.stores import FeatureStore, Manifest, extract, merge
from qwen_scope_lens.stores.corpus import as_corpus, survey
from qwen_scope_lens.stores.fingerprints import fingerprint, is_sample, sampled_fingerprint
from qwen_scope_lens.stores.merge import check
from qwen_scope_lens.stores.shard_files import NAME as SHARD

PRECIOUS = b"precious\n" * 100


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file that must not change, whatever links to it."""
    path = tmp_path / "victim"
    path.write_bytes(PRECIOUS)
    yield path
    assert path.read_bytes() == PRECIOUS


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("planted") / "store"
    labels = {"toxic": [bool(n % 2) for n in range(6)]}
    return build_store(out, random_documents(6), labels).path


@pytest.fixture
def store(planted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planted, tmp_path / "store"))


# Links.


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(CannotWrite, match="is a link"), exclusive(folder):
        pass
    (folder / ".lock").unlink()
    os.link(
        victim, folder / ".lock"
    )  # a second name of the same file: it is locked, but never emptied
    with exclusive(folder):
        pass
    (folder / ".lock").unlink()
    os.mkfifo(folder / ".lock")
    with pytest.raises(CannotWrite, match="is a FIFO"), exclusive(folder):
        pass


def test_a_partial_name_is_not_written_through(tmp_path: Path, victim: Path) -> None:
    (tmp_path / ".plan.json.partial").symlink_to(victim)
    with whole_file(tmp_path / "plan.json") as partial:
        partial.write_text("new")
    assert (tmp_path / "plan.json").read_text() == "new"
    (tmp_path / ".out.partial").symlink_to(tmp_path)
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/null", p)])
def test_a_target_that_is_no_file_stays(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "plan.json"
    make(target)
    before = target.lstat()
    said = pytest.raises(CannotWrite, match=r"plan\.json is a (FIFO|folder|link)")
    with said, whole_file(target) as partial:
        partial.write_text("new")
    assert target.lstat().st_ino == before.st_ino
    with pytest.raises(SystemExit):
        main(["label", "merge", "x.jsonl", "--out", str(target)])


@pytest.mark.parametrize(
    "name", [".lock", ".shards.lock", ".manifest/.lock", ".manifest", ".ranks", "shards"]
)
def test_extract_refuses_links_inside_its_folder(
    name: str, tmp_path: Path, victim: Path, minis: Any
) -> None:
    out, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = out / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if name.endswith("lock") else elsewhere)
    with pytest.raises(CannotWrite, match="is a link"):
        extract(["A text."], model=minis, group=GROUP, layers=[6], out=out, progress=False)
    assert not list(elsewhere.iterdir())


@pytest.fixture(scope="module")
def minis() -> Any:
    return load_model("mini-qwen3", up_to_layer=6)


# FIFOs and devices where files are read.


def test_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a FIFO would wait until somebody writes to it."""
    fifo = tmp_path / "home" / "mine" / "config.json"
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(tmp_path / "home"))
    assert main(["list"]) == 0
    with pytest.raises(BadFile, match="is a FIFO"):
        read_json(fifo, "any", 1, "qsl")
    with pytest.raises(BadFile, match="is a FIFO"):
        LabelPack.read(fifo)
    with pytest.raises(NotACheckpoint, match="neither a file nor a folder"):
        load_model(fifo.parent)
    os.mkfifo(tmp_path / "corpus.jsonl")
    with pytest.raises(BadCorpus, match="a pipe or a device"):
        qsl.read_corpus(tmp_path / "corpus.jsonl")


# Full disks.


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def short_write(*args: Any, **options: Any) -> None:
    raise OSError("4096 requested and 10 written")  # numpy raises this without an errno


@pytest.mark.parametrize("fails", [full, short_write])
def test_a_full_disk_is_named_and_leaves_nothing(
    fails: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "save", fails)
    with pytest.raises(CannotWrite, match=r"No space left|requested and 10 written"):
        build_store(tmp_path / "store", random_documents(2))
    assert not list((tmp_path / "store" / "shards").iterdir())


def test_a_full_disk_in_the_words_of_other_libraries(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="os error 28"), whole_file(tmp_path / "x"):
        raise RuntimeError("Error while serializing: I/O error (os error 28)")
    with pytest.raises(RuntimeError, match="a bug"), whole_file(tmp_path / "x"):
        raise RuntimeError("a bug")
    assert not list(tmp_path.iterdir())


# Stores.


def refreshed(shard: Path) -> None:
    """Make the checksums anew, as somebody would who wants to hide the damage."""
    facts = json.loads((shard / SHARD).read_text())
    for name in facts["files"]:
        path = shard / name
        facts["files"][name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    (shard / SHARD).write_text(json.dumps(facts))


def flip(shard: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    array = np.load(shard / name)
    change(array)
    np.save(shard / name, array)


def beyond(array: np.ndarray) -> None:
    array[3, 1] = 60_000


def not_a_number(array: np.ndarray) -> None:
    array[3, 1] = np.nan


def unmatched_infinity(array: np.ndarray) -> None:
    array[3, 0] = np.inf


def backwards(array: np.ndarray) -> None:
    array[1] = 10_000


def twice(array: np.ndarray) -> None:
    array[2, 1] = array[2, 0]


READ = {
    "layer6/indices.npy": (beyond, "feature 60000 .* 0..1023"),
    "layer6/values.npy": (not_a_number, "not finite"),
    "offsets.npy": (backwards, r"offsets\.npy"),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("anew", [False, True])
def test_numbers_out_of_bounds_are_refused_and_found(
    name: str, anew: bool, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SciPy's compiled code writes where a column number points: before, this ended in SIGSEGV."""
    change, words = READ[name]
    shard = store / "shards" / "00000"
    flip(shard, name, change)
    if anew:
        refreshed(shard)
    assert len(check(store)) == 1
    found = FeatureStore.open(store)
    with pytest.raises(StoreDamaged, match=words):
        list(found.iter_blocks(6))
    with pytest.raises(StoreDamaged, match=words):
        [found.by_token(doc) for doc in range(6)]
    out = str(store / "clf.json")
    for command in (
        ["classify", "fit", str(store), "--label", "toxic", "--out", out],
        ["compare", "drift", str(store), str(store)],
    ):
        assert main(command) == 1
        assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "change"), [("layer6/values.npy", unmatched_infinity), ("layer6/indices.npy", twice)]
)
def test_what_cannot_be_so_is_found_whatever_the_checksums_say(
    name: str, change: Callable[[np.ndarray], None], store: Path
) -> None:
    assert check(store) == []
    flip(store / "shards" / "00000", name, change)
    refreshed(store / "shards" / "00000")
    assert len(check(store)) == 1


@pytest.mark.parametrize("name", ["layer6/features.parquet", "documents.parquet", "tokens.parquet"])
def test_views_that_contradict_each_other_are_found(name: str, store: Path, tmp_path: Path) -> None:
    other = build_store(tmp_path / "other", random_documents(6, n_tokens=11, seed=1))
    shard = store / "shards" / "00000"
    shutil.copy(other.path / "shards" / "00000" / name, shard / name)
    refreshed(shard)
    [problem] = check(store)
    assert Path(name).name in problem or "layer6" in problem


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 200, None),
        (b"\x93NUMPY\x01\x00", None),
        (b"", None),
        (b"\x80\x04K\x01.", None),
        (None, 10),
    ],
)
def test_damaged_headers_of_arrays(header: bytes | None, size: int | None, store: Path) -> None:
    for name in ("offsets.npy", "layer6/values.npy"):
        path = store / "shards" / "00000" / name
        content = path.read_bytes()
        path.write_bytes(content[:size] if header is None else header)
        with pytest.raises(StoreDamaged, match="cannot be read"):
            list(FeatureStore.open(store).iter_blocks(6))
        assert main(["store", "check", str(store)]) == 1
        path.write_bytes(content)


def wrong_facts() -> dict[str, tuple[list[str], Any]]:
    return {
        "no width": (["saes", "6", "d_sae"], 0),
        "a huge width": (["saes", "6", "d_sae"], 2**40),
        "text for a number": (["model", "d_model"], "128"),
        "true for a number": (["saes", "6", "k"], True),
        "shards of no document": (["corpora", "0", "shard_docs"], 0),
        "corpora out of order": (["corpora", "0", "first_doc"], 5),
        "more than any store has": (["corpora", "0", "n_docs"], 10**18),
        "a label of no type": (["labels", "toxic"], "pickle"),
        "a list of facts": (["settings"], []),
    }


@pytest.mark.parametrize("case", wrong_facts())
def test_manifests_that_cannot_be(case: str, store: Path) -> None:
    keys, value = wrong_facts()[case]
    content = json.loads((store / "manifest.json").read_text())
    place: Any = content
    for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    place[keys[-1]] = value
    (store / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BadFile, match=r"manifest\.json"):
        FeatureStore.open(store)


# Which model made it.


def test_a_fingerprint_sees_every_weight() -> None:
    model = make_model()
    before, sample = fingerprint(model, 2), sampled_fingerprint(model, 2)
    assert not is_sample(before)
    assert is_sample(sample)
    assert fingerprint(make_model(), 2) == before
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 0.25
        assert fingerprint(model, 2) != before
        assert sampled_fingerprint(model, 2) == sample  # what older versions could not see
        assert fingerprint(model, 0) == fingerprint(make_model(), 0)
        model.model.layers[3].mlp.down_proj.weight[3, 5] += 0.25  # behind the last layer read
    assert fingerprint(model, 2) != fingerprint(model, 3)


def test_a_fingerprint_of_offloaded_weights_is_theirs() -> None:
    from accelerate import cpu_offload

    model = make_model()
    before = fingerprint(model, 2)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert fingerprint(model, 2) == before
    with pytest.raises(WrongModel, match=r"cannot be read \(it is on the meta device"):
        fingerprint(make_model().to("meta"), 2)


def test_append_refuses_a_model_that_differs_in_one_row(
    tmp_path: Path, minis: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job: dict[str, Any] = {"group": GROUP, "layers": [6], "out": tmp_path / "s"}
    made = extract(["A text."], model=minis, progress=False, **job)
    changed = load_model("mini-qwen3", up_to_layer=6)
    row = changed.tokenizer("Another").input_ids[0]
    with torch.no_grad():
        changed.original_model.embed_tokens.weight[row] += 1
    with pytest.raises(StoreMismatch, match="another model"):
        extract(["Another."], model=changed, append=True, **job)
    # A store that an older version began: read, appended to with a remark, not joined with a new.
    content = json.loads((made.path / "manifest.json").read_text())
    content["model"]["fingerprint"] = sampled_fingerprint(minis, 6)
    shutil.copytree(made.path, tmp_path / "old")
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(content))
    extract(["Another."], model=minis, append=True, **job | {"out": tmp_path / "old"})
    assert "a sample of the model's weights" in capsys.readouterr().err
    assert is_sample(Manifest.read(tmp_path / "old").model.fingerprint)
    with pytest.raises(StoreMismatch, match="made by an older version"):
        merge([tmp_path / "s", tmp_path / "old"], tmp_path / "both")


# Models with code, and models that are damaged.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["evil", "qwen3"])
@pytest.mark.parametrize("up_to", [None, 1])
def test_code_of_a_model_is_never_run_and_nobody_is_asked(
    kind: str, up_to: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    edit(folder / "config.json", model_type=kind, auto_map={"AutoConfig": "evil.C"})

    def asked(*args: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(UnsafeCheckpoint, match="nothing of it was run"):
        load_model(folder, up_to_layer=up_to)
    assert not ran.exists()


def test_a_tokenizer_with_code_is_refused(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit\n")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.C"]})
    with pytest.raises(UnsafeCheckpoint, match="nothing of it was run"):
        load_model(folder, up_to_layer=1)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut weights": lambda f: os.truncate(f / "model.safetensors", 5000),
    "no weights": lambda f: os.truncate(f / "model.safetensors", 0),
    "another width": lambda f: edit(f / "config.json", hidden_size=64),
    "width as text": lambda f: edit(f / "config.json", hidden_size="wide"),
    "no layers": lambda f: edit(f / "config.json", num_hidden_layers=-1),
    "a cut config": lambda f: os.truncate(f / "config.json", 40),
    "a config that is a list": lambda f: (f / "config.json").write_text("[]"),
    "a digit too many": lambda f: (f / "config.json").write_text('{"a": ' + "9" * 5000 + "}"),
    "a cut tokenizer": lambda f: os.truncate(f / "tokenizer.json", 100),
    "an index of elsewhere": lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.embed_tokens.weight": "../../x.safetensors"}}'
    ),
    "an index that is a list": lambda f: (f / "model.safetensors.index.json").write_text("[1]"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("up_to", [None, 1])
def test_damaged_model_folders_have_a_named_error(
    case: str, up_to: int | None, folder: Path
) -> None:
    if case.startswith("an index") and up_to is None:
        pytest.skip("transformers prefers the single file")
    DAMAGE[case](folder)
    with pytest.raises((qsl.errors.CheckpointError, WrongTokenizer, WrongModel)) as raised:
        load_model(folder, up_to_layer=up_to)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only users') }}",
        "{% for",
        "{{ messages.x.y }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}{{ messages[0].__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_chat_templates_that_fail_have_a_named_error(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    chat = [{"role": "judge", "content": "x"}]
    with pytest.raises(BadText, match="roles 'judge'"):
        encode([chat], tokenizer, limit=10, enable_thinking=False)


@pytest.mark.parametrize("given", [b"x", bytearray(b"x"), [True, False], torch.tensor([True])])
def test_bytes_and_booleans_are_no_token_ids(given: Any) -> None:
    with pytest.raises(BadText, match="expected a text, a list of chat messages"):
        encode([given], None, limit=10)


def test_half_a_character_is_refused_by_name() -> None:
    with pytest.raises(BadText, match="half of a surrogate pair at character 1"):
        encode(["a\ud800b"], make_tokenizer(), limit=10)


# Labels.


def test_labels_that_differ_only_in_case(tmp_path: Path) -> None:
    for row in ({"text": "a", "lang": "x", "Lang": "y"}, {"text": "a", "Doc": 7}):
        with pytest.raises(BadCorpus, match="differ only in case"):
            survey(as_corpus([row]), "corpus")
    mixed = build_store(
        tmp_path / "store", random_documents(2), {"lang": ["a", "b"], "Lang": ["c", "d"]}
    )
    with pytest.raises(BadQuery, match="'lang' and 'Lang' differ only in case"):
        mixed.sql("select lang from documents")
    assert mixed.sql("select count(*) n from features").to_pylist()[0]["n"] > 0
    assert mixed.labels("Lang").tolist() == ["c", "d"]


def test_provenance_that_is_no_json_is_refused(tmp_path: Path) -> None:
    address = f"{GROUP}/6/1"
    for value in ("NaN", "-Infinity", "1e999"):
        path = tmp_path / "labels.jsonl"
        path.write_text(f'{{"address": "{address}", "text": "x", "provenance": {{"a": {value}}}}}')
        with pytest.raises(BadFile, match="line 1: the provenance"):
            LabelPack.read(path)
    row = {"address": address, "text": "x", "provenance": {"a": "\ud800"}}
    path.write_text(json.dumps(row))
    pack = LabelPack.read(path)
    assert LabelPack.read(pack.write(tmp_path / "clean.jsonl")) == pack
