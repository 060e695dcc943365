"""`find` and `discover`: evidence against slow references, and plants that have to come out."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from endpoint_server import Server, answer
from feature_stores import build_store, random_codes, store_of_dense
from scipy.sparse import csr_matrix
from scipy.stats import binomtest
from scripted_writer import Scripted
from transformer_lens.tools.analysis import JacobianLens

import qwen_scope_lens as qsl
from qwen_scope_lens.cli import main
from qwen_scope_lens.concepts import (
    Concept,
    Discovery,
    discover,
    discover_pairs,
    find,
    pairs_of,
    write_examples,
)
from qwen_scope_lens.concepts.concept import CARRIERS, neutral_texts, read_examples
from qwen_scope_lens.concepts.discover import sign_test
from qwen_scope_lens.concepts.evidence import lifts, read_groups, readout, says, shares
from qwen_scope_lens.concepts.find import layers_of
from qwen_scope_lens.concepts.fusion import WEIGHTS, combined
from qwen_scope_lens.errors import (
    BadCorpus,
    BadFile,
    BadText,
    GeneratorFailed,
    LayerOutOfRange,
    StoreMismatch,
    TooLittleData,
    UnknownName,
    WrongModel,
)
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.models import fit_lens, read_lens, read_unembedding
from qwen_scope_lens.models.tokenize import find_tokenizer
from qwen_scope_lens.writers import Ledger

GROUP, LAYERS = "mini-qwen3/w1k-l0-16", [3, 6]
CHINESE = [row["text"][:100] for row in heldout("prose", "zh")]
ENGLISH = [row["text"][:100] for row in heldout("prose", "en")]


@pytest.fixture(scope="module")
def mini() -> Any:
    return qsl.load_model("mini-qwen3")


# --- find ----------------------------------------------------------------------------------------


def test_find_puts_the_features_of_the_examples_first(mini: Any) -> None:
    found = find(
        "Chinese", GROUP, examples=CHINESE[:5], model=mini, layers=LAYERS, top=5, promoted=2
    )
    assert found.columns == ("examples", "words", "says")
    assert found.searched == 2 * 1024
    assert [row.score for row in found.rows] == sorted((r.score for r in found.rows), reverse=True)
    first = found.refs[0]
    read = qsl.read_all([CHINESE[7], ENGLISH[7]], GROUP, model=mini, layers=[first.layer])
    on_chinese, on_english = (max(reading.track(first)) for reading in read)
    assert on_chinese > 0
    assert on_english == 0
    row = found.rows[0]
    assert row.on_examples is not None
    assert row.elsewhere is not None
    assert row.examples == pytest.approx(row.on_examples - row.elsewhere)
    weights: dict[str, float] = {str(name): weight for name, weight in WEIGHTS.items()}
    assert row.score == pytest.approx(
        sum(weights[name] * 11 / (10 + place) for name, place in row.places.items())
    )
    assert len(row.promotes) == 2
    table = found.table(3)
    assert table.columns == ("feature", "score", "examples", "words", "says", "promotes")
    assert len(table.rows) == 3


def test_shares_and_says_are_what_they_say(mini: Any) -> None:
    """Against a slow and plain computation, in float64."""
    concept = Concept("Chinese", tuple(CHINESE[:2]), tuple(ENGLISH[:3]))
    tokenizer = find_tokenizer(mini)
    captures, groups = read_groups(mini, concept, [6], tokenizer)
    sae = qsl.load_sae(f"{GROUP}/6")
    found = shares(sae, 6, captures, groups)
    assert set(found.share) == {"words", "fillers", "examples", "neutral"}
    total = np.zeros(1024)
    for text in ENGLISH[:3]:
        read = qsl.capture(mini, [text], [6], max_tokens=64, truncate=True)
        kept = read.residuals[6][read.keep(6)]
        total += sae.encode_sparse(kept).to_dense().double().numpy().mean(0)
    np.testing.assert_allclose(found.share["neutral"], total / total.sum(), atol=1e-6)

    end = read_unembedding("mini-qwen3")
    wanted = readout(concept, tokenizer, end)
    rows = sae.W_dec.detach().double()
    unit = rows / rows.norm(dim=-1, keepdim=True)
    scores = (unit * end.scale.double()) @ wanted.direction.double()
    plain = (scores - scores.mean()) / scores.std()
    np.testing.assert_allclose(says(sae, 6, wanted, end), plain.numpy(), atol=1e-4)
    half = torch.eye(128) / 2
    lens = type("Lens", (), {"pull": lambda self, layer, vector: vector @ half})()
    np.testing.assert_allclose(says(sae, 6, wanted, end, lens), plain.numpy(), atol=1e-4)
    sae.W_dec.data = sae.W_dec.data.contiguous()  # as after a conversion
    np.testing.assert_allclose(says(sae, 6, wanted, end), plain.numpy(), atol=1e-4)


def test_the_readout_prefers_tokens_that_only_the_examples_have(mini: Any) -> None:
    end = read_unembedding("mini-qwen3")
    tokenizer: Any = find_tokenizer(mini)
    words = readout(Concept("Chinese"), tokenizer, end)
    both = readout(Concept("Chinese", tuple(CHINESE[:4])), tokenizer, end)
    assert words.tokens == both.tokens
    weight = end.weight.float()
    own = weight[list(words.tokens)].mean(0) - weight.mean(0)
    torch.testing.assert_close(words.direction, own, rtol=1e-3, atol=1e-5)
    seen = {t for text in neutral_texts() for t in tokenizer.encode(text)[:64]}
    fresh = [t for text in CHINESE[:4] for t in {*tokenizer.encode(text)[:64]} - seen]
    assert len(fresh) > 10
    shown = weight[fresh].mean(0) - weight.mean(0)
    torch.testing.assert_close(both.direction, (own + shown) / 2, rtol=1e-3, atol=1e-5)


def test_one_order_joins_the_columns() -> None:
    columns = {
        "examples": np.array([0.0, 3.0, 2.0, -1.0], np.float32),
        "says": np.array([5.0, 0.0, 9.0, -2.0], np.float32),
    }
    score, places = combined(columns)  # type: ignore[arg-type]
    assert places["examples"].tolist() == [0, 1, 2, 0]
    assert places["says"].tolist() == [2, 0, 1, 0]
    expected = [11 / 12, 3.0, 3 * 11 / 12 + 1, 0.0]
    np.testing.assert_allclose(score, expected)


def test_labels_and_stores_take_part(mini: Any, small_store: qsl.FeatureStore) -> None:
    refs = [qsl.FeatureRef(GROUP, 6, n) for n in (7, 8)]
    labels = qsl.LabelPack([qsl.Label(refs[0], "Chinese text"), qsl.Label(refs[1], "a sum")])
    found = find("chinese", GROUP, labels=labels, columns=["labels"], layers=[6], promoted=0)
    assert found.refs == (refs[0],)  # nothing else has evidence
    assert found.rows[0].label == "Chinese text"
    beside = find(
        "Chinese",
        GROUP,
        examples=CHINESE[:3],
        store=small_store,
        model=mini,
        layers=[6],
        columns=["examples"],
        top=2,
    )
    assert beside.settings["compared_with"] == "store"
    with pytest.raises(StoreMismatch, match=r"the store has codes of mini-qwen3/w1k-l0-16/6"):
        find("x", "mini-qwen3.5/w1k-l0-16", store=small_store, layers=[6], model="mini-qwen3.5")


def test_all_layers_that_are_here(home: Path) -> None:
    assert len(layers_of(GROUP)) == 8
    assert [ref.layer for ref in layers_of("qwen3-8b-base/w64k-l0-50")] == [18]  # none is here
    (home / "mine" / "layer1.sae.pt").unlink()
    assert 1 not in {ref.layer for ref in layers_of("local/mine")}
    assert len(layers_of("local/mine")) > 1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"words": "  "}, BadText, "needs some words"),
        ({"words": "x" * 301}, BadText, "name it in a few words"),
        ({"against": ["a text"]}, BadText, "no examples"),
        ({"examples": ["a", "b"], "against": ["b", "a"]}, BadText, "are the same"),
        ({"examples": "one text"}, BadText, "put it into a list"),
        ({"examples": [""]}, BadText, "one is empty"),
        ({"columns": ["labels"]}, TooLittleData, "needs labels"),
        ({"columns": ["nonsense"]}, UnknownName, "expected some of examples, labels"),
        ({"columns": []}, TooLittleData, "no column"),
        ({"layers": [99]}, LayerOutOfRange, "layer 99"),
    ],
)
def test_what_cannot_be_found_is_refused(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = dict(given)
    words, examples = given.pop("words", "a concept"), given.pop("examples", ())
    if isinstance(examples, str):
        with pytest.raises(error, match=message):
            Concept(words, examples)  # type: ignore[arg-type]
        return
    with pytest.raises(error, match=message):
        find(words, GROUP, examples=examples, **given)


def test_the_verb_writes_what_it_prints(tmp_path: Path, capsys: Any) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(line.replace("\n", " ") for line in CHINESE[:3]))
    assert len(read_examples(texts)) == 3
    out = tmp_path / "found.json"
    command = ["find", "Chinese", "--examples", str(texts), "--layers", "6", "--top", "2"]
    assert main([*command, "--json", "--out", str(out), "--promoted", "0"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["format"] == "qwen-scope-find"
    assert printed == json.loads(out.read_text())
    assert len(printed["rows"]) == 2
    for wrong, message in (
        (["--layers", "11"], "layer 11"),
        (["--examples", str(tmp_path / "none.txt")], "none.txt"),
        (["--lens", str(texts)], "is not a Jacobian lens"),
        (["--causal", "1", "--measure", "class=nonsense"], "measure"),
        (["--causal", "1", "--doses", "0"], "the only dose is 0"),
        (["--by", "labels"], "needs labels"),
    ):
        assert main(["find", "Chinese", *wrong]) == 1
        assert message in capsys.readouterr().err
    assert len(set(neutral_texts())) > 10
    assert CARRIERS


def test_mean_residuals_find_what_every_token_does(mini: Any) -> None:
    """`lifts` against a slow computation; and the quick way ends at as good a feature."""
    concept = Concept("Chinese", tuple(CHINESE[:3]), tuple(ENGLISH[:3]))
    captures, groups = read_groups(mini, concept, [6], find_tokenizer(mini))
    sae = qsl.load_sae(f"{GROUP}/6")
    [found, words] = lifts(
        sae, 6, captures, groups, [("examples", "neutral"), ("words", "fillers")]
    )
    sides = []
    for texts in (CHINESE[:3], ENGLISH[:3]):
        reads = [qsl.capture(mini, [text], [6], max_tokens=64, truncate=True) for text in texts]
        pre = [r.residuals[6][r.keep(6)] @ sae.W_enc for r in reads]
        sides.append(torch.stack([one.mean(0) for one in pre]).mean(0).double())
    plain = sides[0] - sides[1]
    np.testing.assert_allclose(found, (plain - plain.mean()) / plain.std(), atol=1e-3)
    assert words.shape == (1024,)
    how: dict[str, Any] = {"examples": CHINESE[:5], "model": mini, "layers": LAYERS, "promoted": 0}
    quick = find("Chinese", GROUP, exact=False, top=3, **how)
    assert quick.settings["texts"] == "mean residuals"
    assert quick.rows[0].on_examples is None
    assert set(quick.refs) & set(find("Chinese", GROUP, exact=True, top=3, **how).refs)
    assert "--exact encodes every token" in quick.table().text()


# --- examples that a generator writes ------------------------------------------------------------


ANSWER = """Here are they:
1. YES: Je ne peux pas vous aider.
**NO**: Bien sûr, voici comment.
- Yes： "Désolé, c'est impossible."
no: Avec plaisir.
YES: Je ne peux pas vous aider."""


def test_a_generator_writes_both_kinds(tmp_path: Path) -> None:
    writer = Scripted(lambda request: ANSWER)
    with Ledger.open(tmp_path) as ledger:
        written = write_examples("polite refusals", writer, ledger, count=7)
        again = write_examples("polite refusals", writer, ledger, count=7)
    assert written == again
    assert written.examples == ("Je ne peux pas vous aider.", "Désolé, c'est impossible.")
    assert written.against == ("Bien sûr, voici comment.", "Avec plaisir.")
    assert [request.sampling.max_tokens for request in writer.requests] == [600, 240]  # asked once
    assert "polite refusals" in writer.requests[0].text
    silent = Scripted(lambda request: "I cannot do that.", "silent")
    with Ledger.open(tmp_path) as ledger, pytest.raises(GeneratorFailed, match="I cannot do that"):
        write_examples("polite refusals", silent, ledger)


def test_find_says_the_price_and_shows_what_was_written(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pairs = zip(CHINESE, ENGLISH, strict=False)
    said = "\n".join(
        f"YES: {yes.split(chr(10))[0]}\nNO: {no.split(chr(10))[0]}" for yes, no in pairs
    )
    command = ["find", "Chinese", "--layers", "6", "--top", "1", "--promoted", "0", "--write", "3"]
    with Server(lambda call: answer(said)) as server:
        command += ["--generator", f"openai:{server.url}#a-model", "--price", "1,2"]
        with pytest.raises(SystemExit):
            main([*command, "--price", "1"])
        for stream in (sys.stdin, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys.stdin, "readline", lambda: "n\n", raising=False)
        assert main(command) == 1
        assert not server.calls
        assert main([*command, "--yes"]) == 0
    # nobody listens there any more
    assert main([*command, "--yes", "--tries", "1", "--write", "4"]) == 1
    printed = capsys.readouterr()
    assert "openai:a-model gave no answer: " in printed.err
    assert "price: 1 requests, about " in printed.err
    assert "at most 360 out: at most 0.00" in printed.err
    assert "written by openai:a-model:\n  + " in printed.out
    assert "mini-qwen3/w1k-l0-16/6/" in printed.out


# --- the lens ------------------------------------------------------------------------------------


def test_a_lens_is_fitted_and_read(tmp_path: Path) -> None:
    path = tmp_path / "lens.pt"
    texts = [text[:60] for text in ENGLISH[:1]]
    lens = fit_lens(
        qsl.load_model("mini-qwen3", full_hooks=True),
        texts,
        path,
        corpus="a test",
        layers=[5, 6],
        batch=64,
    )
    theirs = JacobianLens.load(str(path))
    assert (lens.width, lens.prompts, sorted(lens.matrices)) == (128, 1, [5, 6])
    vector = torch.randn(128)
    torch.testing.assert_close(
        lens.pull(6, vector) @ vector, vector @ theirs.transport(vector, 6), rtol=1e-3, atol=1e-3
    )
    assert lens.pull(7, vector) is not None  # the last layer needs none
    torch.testing.assert_close(lens.pull(7, vector), vector)
    with pytest.raises(LayerOutOfRange, match="no matrix for layer 2"):
        lens.pull(2, vector)
    with pytest.raises(WrongModel, match="d_model 128, expected 64"):
        read_lens(path, 64)


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.parametrize(
    "content",
    [
        {"J": {0: _Code()}},
        {"J": {}},
        {"nothing": 1},
        {"J": {0: torch.zeros(2, 3)}},
        {"J": {0: torch.zeros(2, 2), 1: torch.zeros(3, 3)}},
        {"J": {"no layer": torch.zeros(2, 2)}},
        {"J": {0: torch.zeros(2, 2, dtype=torch.long)}},
        b"no archive",
    ],
)
def test_what_is_no_lens_is_refused(content: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "lens.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, pickle_module=pickle)
    with pytest.raises(BadFile, match=r"lens\.pt") as said:
        read_lens(path)
    if isinstance(content, bytes):
        assert "it begins with b'no a' and not with" in str(said.value)
        assert "`qsl lens fit`" in str(said.value)
    assert capsys.readouterr().out == ""  # the code in it did not run


# --- discover ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> qsl.FeatureStore:
    """Noise, and in layer 5 features 250 and 251 (together) on most documents that are red."""
    rng = np.random.default_rng(3)
    n, tokens = 160, 6
    colour = ["red" if one else "blue" for one in rng.random(n) < 0.5]
    codes = {layer: random_codes(layer, n * tokens, 300, popular=3.0) for layer in (2, 5)}
    codes[5][:, [250, 251]] = 0
    for doc in range(n):
        if colour[doc] == "red" and rng.random() < 0.8:
            codes[5][doc * tokens + 2, [250, 251]] = 50.0
    chance = rng.permutation(colour).tolist()
    folder = tmp_path_factory.mktemp("discover") / "store"
    return store_of_dense(folder, codes, [tokens] * n, {"colour": colour, "chance": chance})


def test_a_plant_becomes_one_hypothesis_that_holds(
    planted_store: qsl.FeatureStore, tmp_path: Path
) -> None:
    labels = qsl.LabelPack([qsl.Label(qsl.FeatureRef(GROUP, 5, 250), "red things")])
    found = discover(planted_store, "colour", values=["red"], labels=labels)
    assert [row.ref for row in found.held] == [f"{GROUP}/5/250"]  # 251 says the same
    [row] = found.held
    assert row.label == "red things"
    assert row.size > 0.75
    assert row.rate_positive > 0.6
    assert row.rate_negative == 0
    assert found.counts["proposing"] + found.counts["testing"] == 160
    found.save(tmp_path / "found.json")
    assert Discovery.load(tmp_path / "found.json") == found
    page = found.page().render()
    assert "red things" in page
    assert "1 of" in page
    more = found.labelled([qsl.LabelPack([qsl.Label(qsl.FeatureRef(GROUP, 5, 250), "no")])])
    assert more.rows[0].label == "red things"
    assert not discover(planted_store, "chance").held
    assert "red" in str(found.table())
    one = build_store(tmp_path / "one", [[{1: 1.0}]] * 3, {"x": ["a"] * 3})
    with pytest.raises(TooLittleData, match="nothing to compare"):
        discover(one, "x")


def test_pairs_are_tested_by_signs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"chosen": f"good {i}", "rejected": [{"role": "assistant", "content": f"bad {i}"}]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = list(pairs_of(path))
    assert [d.text for d in documents[:2]] == ["good 0", "bad 0"]
    with pytest.raises(BadCorpus, match="expected a text in the column none, found chosen"):
        list(pairs_of(path, "none"))
    rng = np.random.default_rng(0)
    tokens = [
        [
            {},
            {5 if d.labels["side"] == "rejected" else 9: 2.0 + rng.random()},
            {7: 1.0 + rng.random()},
        ]
        for d in documents
    ]
    store = build_store(
        tmp_path / "store",
        tokens,
        {name: [d.labels[name] for d in documents] for name in ("pair", "side")},
        texts=[f"{d.text} text" for d in documents],
    )
    found = discover_pairs(store)
    assert {(row.value, row.ref) for row in found.held} == {
        ("rejected", f"{GROUP}/6/5"),
        ("preferred", f"{GROUP}/6/9"),
    }
    assert found.counts["pairs"] == 40


def test_the_sign_test_is_exact() -> None:
    rng = np.random.default_rng(1)
    high, low = (csr_matrix(rng.integers(0, 3, (30, 8)).astype(float)) for _ in range(2))
    found = sign_test(high, low)
    difference = (high - low).toarray()
    for feature in range(8):
        above, below = (difference[:, feature] > 0).sum(), (difference[:, feature] < 0).sum()
        expected = binomtest(int(above), int(above + below)).pvalue
        assert found.p[feature] == pytest.approx(expected)
        assert found.size[feature] == pytest.approx(above / (above + below))


@pytest.mark.slow
def test_rank_and_blame_test_their_winners(
    small_store: qsl.FeatureStore, capsys: Any, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("Here is what happened:\n")
    causal = ["--prompts", str(tmp_path / "one.txt")]
    causal += ["--causal", "1", "--doses", "0.3", "--new-tokens", "2", "--json"]
    rank = ["rank", str(small_store.path), "--label", "lang", "--positive", "zh", "--fdr", "1"]
    rank += ["--held-out", "0.5"]
    assert main([*rank, "--layers", "6", "--top", "2", *causal]) == 0
    ranked = json.loads(capsys.readouterr().out)
    assert [row["ref"] for row in ranked["causal"]["rows"]] == [ranked["rows"][0]["ref"]]
    assert ranked["causal"]["rows"][0]["difference"] is not None
    reply = ["--prompt", "How do I install it?", "--reply", "安装程序 and restart"]
    assert main(["blame", f"{GROUP}/6", *reply, "--top", "2", *causal]) == 0
    blamed = json.loads(capsys.readouterr().out)
    assert blamed["causal"]["rows"][0]["ref"] == blamed["rows"][0]["feature"]
    assert blamed["causal"]["rows"][0]["verdict"] != "moves it"  # one prompt is too few
