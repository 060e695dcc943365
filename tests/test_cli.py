"""The command line: help that helps, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_model, make_tokenizer

from qwen_scope_lens.catalog import GROUPS
from qwen_scope_lens.cli import main
from qwen_scope_lens.cli.convert import CONVERTERS
from qwen_scope_lens.cli.options import layer_list, old_spellings
from qwen_scope_lens.cli.show import size
from qwen_scope_lens.cli.verbs import VERBS

MINI = "mini-qwen3/w1k-l0-16"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out) > 150
    main(["--help"])
    assert f"  {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["label", "synth"])
def test_a_word_of_two_verbs_shows_the_one_that_was_asked(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([verb, "describe", "--help"])
    examples = re.findall("^    (qsl .*? describe) ", capsys.readouterr().out, re.MULTILINE)
    assert examples == [f"qsl {verb} describe"] * 2


@pytest.mark.slow
def test_every_converter_runs_by_itself() -> None:
    code = "import runpy, sys\n"
    for name in CONVERTERS:
        module = name.replace("-", "_")
        path = Path(__file__).parent.parent / "converters" / f"{module}.py"
        for run in (f"run_module('qwen_scope_lens.converters.{module}'", f"run_path({str(path)!r}"):
            code += (
                "sys.argv = ['convert', '--help']\n"
                f"try: runpy.{run}, run_name='__main__')\n"
                "except SystemExit as end: assert end.code == 0\n"
            )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--out OUT") >= 2 * len(CONVERTERS)


def words_of(verb: str) -> list[list[str]]:
    """The verb, and every word of it, with its own words: ["train"], ["train", "grpo"], ..."""
    module = importlib.import_module(f"qwen_scope_lens.cli.{verb.replace('-', '_')}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return [[verb, *words] for words in _words(parser)]


def _words(parser: argparse.ArgumentParser) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found += [[name, *words] for words in _words(below)]
    return found


HEAVY = ("torch", "transformers", "sae_lens", "transformer_lens", "starlette", "lm_eval", "trl")


READERS = (
    "stores.remote",
    "stores.store",
    "stores.sql",
    "stores.merge",
    "stores.inspect",
    "stores.reread",
    "features.pool",
    "features.rank",
    "features.statistics",
    "features.statistics_table",
    "labels.packs",
    "labels.passages",
    "labels.search",
    "bench.analysis",
    "bench.report",
    "classify.estimator",
    "classify.report",
    "classify.task",
    "concepts.discover",
    "compare.drift",
    "train.language_features",
    "train.repetition_features",
    "writers.roles",
)
"""What reads stores and other files. torch takes over a second of a CPU."""

SAES = (
    "stores.extract",  # until it has checked the corpus
    "compare.match",
    "converters.official_to_saelens",
    "converters.saelens_folder",
    "saes.layer_sae",
    "saes.verify",
    "site.build",
)
"""What reads SAEs, and runs no model. transformers takes two to three seconds more, and torch's
compiler one."""

MODELS = (
    "classify.read",
    "compare.transfer",
    "concepts.find",
    "features.read",
    "graphs.attribution",
    "graphs.faithfulness",
    "labels.verified",
    "mcp.toolbox",
    "mini.demo",
    "models.verify",
    "recipes.engine",
    "serve.run",
    "serve.lens",
    "steering.blame",
    "steering.calibrate",
    "steering.generate",
    "steering.sweep",
    "stores.extraction",
    "synth.run",
    "train.thresholds",
)
"""What runs models. SAELens, which brings TransformerLens along, takes seconds more."""


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """All in one process that has imported nothing yet; one that imported it would be seen.

    Help needs nothing heavy, what reads stores needs no torch, and what makes an SAE or runs a
    model, no SAELens: at the end, `read` works.
    """
    asked = [words for verb in VERBS for words in words_of(verb)]
    assert len(asked) > len(VERBS) + 25
    for words in (["train", "repetition", "screen"], ["convert", "saelens-to-official"]):
        assert words in asked
    run = ["read", "The kernel reads a file.", "--sae", "mini-qwen3/w1k-l0-16", "--layers", "2"]
    code = f"""
import contextlib, io, sys
from qwen_scope_lens.cli import main
for words in {[["--help"], ["list"], *([*words, "--help"] for words in asked)]!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(words)
    assert out.getvalue().startswith(("usage: qsl", "GROUP")), words
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, f"{{words}} imported {{heavy}}"
import importlib
for modules, allowed in (({READERS!r}, 0), ({SAES!r}, 1), ({MODELS!r}, 2)):
    for module in modules:
        importlib.import_module(f"qwen_scope_lens.{{module}}")
        names = {HEAVY[:4]!r}[allowed:] + (("torch._dynamo",) if allowed < 2 else ())
        heavy = [name for name in names if name in sys.modules]
        assert not heavy, f"{{module}} imported {{heavy}}"
with contextlib.redirect_stdout(out):
    assert main({run!r}) == 0
heavy = [name for name in {HEAVY[2:4]!r} if name in sys.modules]
assert not heavy, f"read imported {{heavy}}"
assert "kernel" in out.getvalue()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_names_of_files_are_those_of_saelens() -> None:
    """They are written down in the package because importing SAELens takes seconds."""
    from sae_lens import constants

    from qwen_scope_lens.saes.locate import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

    assert constants.SAE_CFG_FILENAME == SAE_CFG_FILENAME
    assert constants.SAE_WEIGHTS_FILENAME == SAE_WEIGHTS_FILENAME


@pytest.mark.parametrize("words", [["list", "--json"], ["list"], ["rank", "--help"], ["--help"]])
def test_a_closed_pipe_ends_quietly(words: list[str]) -> None:
    """As in `qsl list | head -1`: here the reader has gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qwen_scope_lens.cli", *words],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # argparse, which prints the help, says 0


OLD = {
    "stats s --layer 3": "stats s --layers 3",
    "bench extract f --sae g --layer 3 --out o": "bench extract f --sae g --layers 3 --out o",
    "verify s --model m --folder f": "verify s --model m --sae-folder f",
    "extract c --sae g --layers 3 --out o --rank 1/4": (
        "extract c --sae g --layers 3 --out o --worker 1/4"
    ),
    "classify report d --label l --page p": "classify report d --label l --out p",
    "classify fit d --label l --out o --layer 3": "classify fit d --label l --out o --rule-layer 3",
    "synth report d --targets t --html p": "synth report d --targets t --out p",
}


def test_old_spellings_still_work(capsys: pytest.CaptureFixture[str]) -> None:
    """They do the same, are not in the help, and say what they are called now."""
    with pytest.raises(SystemExit) as caught:
        main(["lm_eval", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: qsl lm-eval")
    assert "lm_eval is now called lm-eval" in shown.err
    for old, new in OLD.items():
        parser = argparse.ArgumentParser(allow_abbrev=False)
        verb, *before = old.split()
        importlib.import_module(f"qwen_scope_lens.cli.{verb}").add_arguments(parser)
        found = parser.parse_args(before)
        assert found == parser.parse_args(new.split()[1:])
        [said] = old_spellings(parser, found, before)
        [spelling] = set(old.split()) - set(new.split())
        [successor] = set(new.split()) - set(old.split())
        assert said.startswith(f"{spelling} is now called {successor};")
        assert not re.search(rf"{spelling}\b", parser.format_help())
    assert main(["stats", "nosuch", "--layer", "3"]) == 1
    assert "--layer is now called --layers" in capsys.readouterr().err
    assert main(["stats", "nosuch", "--layer", "3", "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "now called" not in said
    assert "not a feature store" in said  # errors are shown


def test_tables_are_printed_as_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = tmp_path / "labels.jsonl"
    pack.write_text(json.dumps({"address": f"{MINI}/6/1", "text": "a label"}) + "\n")
    assert main(["label", "list", str(pack)]) == 0
    assert capsys.readouterr().out.split() == [
        *("feature", "score", "label"),
        *(f"{MINI}/6/1", "–", "a", "label"),
    ]
    assert main(["label", "list", str(pack), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "format": "qsl-label-list",
        "version": 1,
        "rows": [{"feature": f"{MINI}/6/1", "score": None, "label": "a label"}],
    }


def test_list(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr()
    assert "qwen3-30b-a3b-base/w128k-l0-100" in shown.out
    assert "local/mine" in shown.out
    assert "544 official files" in shown.err
    main(["list", "--quiet"])
    assert capsys.readouterr() == (shown.out, "")
    main(["list", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == len(GROUPS) + 1  # and local/mine
    assert rows[0]["backbone"]["model_id"] == "Qwen/Qwen3-1.7B-Base"


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "qwen-scope-3.5-27b-w80k-l100"]) == 0
    out = capsys.readouterr().out
    for fact in ("5120 -> 81920", "3.356 GB per layer", "215 GB", "blocks.0.hook_resid_post"):
        assert fact in out
    assert "model.language_model.layers.0" in out
    assert "must not be used" in " ".join(out.split()).replace("they must", "must")


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "qwen3-8b"]) == 1
    error = capsys.readouterr().err
    assert "nearest:" in error
    assert "Traceback" not in error
    assert main(["shwo"]) == 2
    assert "no verb 'shwo'" in capsys.readouterr().err
    assert main(["--version"]) == 0


@pytest.mark.parametrize("form", ["npy", "safetensors", "pt"])
def test_verify(home: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    x = planted.activations(planted.tensors(seed=1))
    path = home / f"x.{form}"
    if form == "npy":
        np.save(path, x.numpy())
    elif form == "pt":
        torch.save(x, path)
    else:
        save_file({"x": x}, path)
    assert main(["verify", "local/mine/1", "--activations", str(path)]) == 0
    assert "as documented   <- in use" in capsys.readouterr().out
    assert main(["verify", "local/mine/2", "--activations", str(path)]) == 1
    assert "PROBLEM" in capsys.readouterr().err


def test_verify_with_a_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint on disk, and an SAE that keeps both signs of every coordinate: exact."""
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    eye = torch.eye(32)
    folder = planted.write_group(home / "exact", range(0), d_model=32, d_sae=64, k=32)
    weights = {"W_enc": torch.cat([eye, -eye]), "W_dec": torch.cat([eye, -eye], 1)}
    weights |= {"b_enc": torch.zeros(64), "b_dec": torch.zeros(32)}
    for layer in (1, 2):
        torch.save(weights, folder / f"layer{layer}.sae.pt")
    assert main(["verify", "local/exact/1", "--model", str(home / "model")]) == 0
    assert "FVU 0.0000 on layer 0, FVU 0.0000 on layer 2" in capsys.readouterr().out
    command = ["verify", "local/exact/2", "--model", str(home / "model")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "blocks.2.hook_resid_post is the output of decoder layer 2" in out
    assert "FVU    0.0000  as documented   <- in use" in out
    assert "NOTE: the SAE was trained on somebody/their-model" in out
    (home / "texts.txt").write_text("one line\n\nand another, longer\n")
    assert main([*command, "--texts", str(home / "texts.txt")]) == 0
    assert main([*command, "--texts", str(home / "none.txt")]) == 1
    assert main(["verify", "local/mine/1", "--model", str(home / "model")]) == 1  # another width
    assert main(["verify", "local/exact/2", "--model", str(home / "nowhere")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_verify_refuses_bad_activation_files(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "x.npy"
    for content in (np.array([object()]), np.zeros((4, 3))):
        np.save(path, content, allow_pickle=True)
        assert main(["verify", "local/mine/1", "--activations", str(path)]) == 1
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, home / "two.pt")
    assert main(["verify", "local/mine/1", "--activations", str(home / "two.pt")]) == 1
    assert main(["verify", "local/mine/1", "--activations", str(home / "none.pt")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_convert(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "convert",
        "official-to-saelens",
        "local/mine",
        "--out",
        str(home),
        "--layers",
        "0-1",
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == [str(home / "mine" / f"layer{n}") for n in (0, 1)]


def test_layer_list() -> None:
    assert layer_list("0-3,7") == [0, 1, 2, 3, 7]
    assert layer_list("5,5") == [5]
    for bad in ("", "a", "3-", "3-1", "-1", "1,,2"):
        with pytest.raises(argparse.ArgumentTypeError):
            layer_list(bad)


def test_size() -> None:
    assert [size(n) for n in (5, 1500, 537_000_000, 2_147_786_752, 215_000_000_000)] == [
        "5 B",
        "1.5 kB",
        "537 MB",
        "2.148 GB",
        "215 GB",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["extract", "c.txt", "--sae", "g", "--layers", "1", "--out", "o", "--max-tokens", "0"],
            "1 or",
        ),
        (["store", "merge", "new", "old", "--shard-docs", "-1"], "1 or more"),
        (["rank", "s", "--label", "l", "--positive", "p", "--seed", "-1"], "0 or more"),
        (["rank", "s", "--label", "l", "--positive", "p", "--fdr", "-1"], "from 0 to 1"),
        (["rank", "s", "--label", "l", "--positive", "p", "--held-out", "nan"], "from 0 to 1"),
        (["app", "--port", "99999"], "0 to 65535"),
        (["stats", "s", "--layer", "-3"], "0 or more"),
        (["sweep", "p", "--edit", "e", "--strengths", "1", "--batch", "x"], "1 or more"),
        (["bench", "subset", "b", "--coverage", "95"], "from 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_usage_errors(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["rank", "s", "--label", "l", "--positive", "p", "--out"],
        ["stats", "s", "--layer", "3", "--out"],
        ["compare", "match", "a", "b", "--out"],
        ["classify", "predict", "c", "d", "--out"],
        ["train", "languages", "s", "--targets", "zh", "--out"],
        ["calibrate", "--texts", "t", "--out"],
        ["export", "--edit", "e", "--out"],
        ["bench", "report", "b", "--out"],
        ["synth", "run", "t", "--generator", "g", "--budget", "1", "--out"],
        ["label", "merge", "a", "--out"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_cannot_be_a_file_is_refused_before_the_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out, said in (
        (f"{tmp_path}", "is a folder"),
        (f"{tmp_path}/new/", "is a folder"),
        (f"{tmp_path}/file/x", "is a file"),
        ("~nosuchuser/x", "cannot be written"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*words, out])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


def test_thinking_wants_a_chat(capsys: pytest.CaptureFixture[str]) -> None:
    edit = ["--edit", "mini-qwen3/w1k-l0-16/6/1:ablate"]
    assert main(["steer", "text", *edit, "--thinking"]) == 1
    assert "--chat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "banana"], "device 'banana' cannot be used here"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--model", "."], "not a model that transformers can open"),
    ],
)
def test_devices_and_folders_that_are_none_are_one_line(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    edit = ["--edit", "mini-qwen3/w1k-l0-16/6/1:ablate"]
    assert main(["steer", "text", *edit, *options]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qsl steer: ")
    assert said in last


def test_saes_of_two_models_are_not_run_on_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    two = ["mini-qwen3/w1k-l0-16/6", "mini-qwen3.5/w1k-l0-16/3"]
    assert main(["blame", *two, "--prompt", "a", "--reply", "b"]) == 1
    assert "belong to different models" in capsys.readouterr().err
