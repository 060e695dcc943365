"""tools/real on a tiny Qwen2: texts, capture, training and release, each resumed on the way."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_model, make_tokenizer

from qwen_scope_lens.errors import BadFile, CannotWrite, TooLittleData
from qwen_scope_lens.models import capture, load_model
from qwen_scope_lens.saes import load_sae
from tools.real import capture as capture_step
from tools.real import release as release_step
from tools.real import texts as texts_step
from tools.real import train as train_step
from tools.real.capture import residuals_folder
from tools.real.data_sets import DATA_SETS
from tools.real.measure import Losses
from tools.real.shards import Layer, Source, plan_shards, shard_path, shards_there
from tools.real.train import Run, folded, sae_folder, train_layer

LAYERS = [1, 2]
SMALL = {"width": 4, "k": 4, "batch": 64, "warm_up": 2, "dead_window": 5}


def write_data(folder: Path) -> None:
    """Every data set with its own field, a few harmless lines each."""
    for row in DATA_SETS:
        path = row.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for n in range(30):
                record = {row.field: f"{row.file}, line {n} of thirty"}
                record |= {row.group: f"group {n % 9}"} if row.group else {}
                file.write(json.dumps(record) + "\n")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "Tiny-Qwen2"
    make_model("Qwen2ForCausalLM").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder after the first two steps: texts, and residuals of two layers."""
    work = tmp_path_factory.mktemp("work")
    write_data(work / "data")
    data = ["--data", str(work / "data"), "--no-debian", "--tokens", "2500"]
    here = ["--model", str(model_folder), "--work", str(work)]
    texts_step.main([*here, *data, "--heldout-tokens", "400"])
    capture_step.main([*here, *capture_options(900)])
    return work


def capture_options(tokens: int, dtype: str = "float32") -> list[str]:
    return [
        "--layers",
        "1,2",
        "--tokens",
        str(tokens),
        "--heldout-tokens",
        "300",
        "--shard-tokens",
        "250",
        "--token-budget",
        "256",
        "--dtype",
        dtype,
    ]


def run_of(work: Path, layer: int, samples: int = 64 * 12, **changes: Any) -> Run:
    shards = len(shards_there(residuals_folder(work), "train"))
    return Run(layer, 32, changes.pop("shards", shards), samples, **{**SMALL, **changes})


def test_texts_are_mixed_split_by_group_and_counted(work: Path) -> None:
    train, heldout = texts_step.read(work, "train"), texts_step.read(work, "heldout")
    assert {text.kind for text in train} >= set(texts_step.QUOTAS) - {"prose"}
    assert not {text.text for text in train} & {text.text for text in heldout}
    count = make_tokenizer()
    for text in train[:20]:
        assert text.tokens == len(count(text.text)["input_ids"])
    # A functionality stands on one side, in all languages.
    sides = {}
    for side, found in (("train", train), ("heldout", heldout)):
        for text in found:
            if "hatecheck" in text.source:
                group = int(text.text.split()[2]) % 9
                assert sides.setdefault(group, side) == side


def test_texts_name_what_cannot_be_read(tmp_path: Path) -> None:
    write_data(tmp_path)
    with gzip.open(DATA_SETS[0].path(tmp_path), "wt") as file:
        file.write('{"other": "field"}\n')
    with pytest.raises(BadFile, match=r"hatecheck.*line 1.*no field 'text'"):
        list(texts_step.gather(tmp_path, None))
    DATA_SETS[0].path(tmp_path).write_bytes(b"no gzip")
    with pytest.raises(BadFile, match="gzipped JSON lines"):
        list(texts_step.gather(tmp_path, None))
    with pytest.raises(BadFile, match=r"tools\.real\.texts"):
        texts_step.read(tmp_path, "train")


def test_a_plan_of_shards_does_not_depend_on_the_goal() -> None:
    lengths = [5, 7, 9, 20, 1, 1, 30, 2]
    runs = plan_shards(lengths, 15)
    assert [n for run in runs for n in run] == list(range(8))
    assert all(sum(lengths[n] for n in run) >= 15 for run in runs[:-1])
    assert plan_shards(lengths[:4], 15) == runs[:2]


def test_shards_hold_the_residuals_and_a_larger_goal_goes_on(
    work: Path, model_folder: Path, tmp_path: Path
) -> None:
    here = tmp_path / "work"
    shutil.copytree(work, here)
    folder = residuals_folder(here)
    before = {path.name: path.read_bytes() for path in shards_there(folder, "train")}
    assert len(before) >= 2
    documents = [text.text for text in texts_step.read(here, "train")]
    truth = capture(load_model(model_folder), documents, LAYERS)
    shard_path(folder, "train", 0).unlink()  # one is lost, and the goal is raised
    with pytest.raises(BadFile, match=r"train-00000.*missing between"):
        Layer(folder, "train", 1)
    command = ["--model", str(model_folder), "--work", str(here)]
    capture_step.main([*command, *capture_options(1500)])
    after = {path.name: path.read_bytes() for path in shards_there(folder, "train")}
    assert len(after) > len(before)
    assert all(after[name] == content for name, content in before.items())
    for layer in LAYERS:
        data = Layer(folder, "train", layer)
        kept = truth.residuals[layer][: data.seen][truth.keep(layer)[: data.seen]]
        found = data.take(np.arange(len(data)))
        assert len(found) == len(kept) < data.seen
        torch.testing.assert_close(found, kept, rtol=1e-4, atol=1e-4)
        others = Layer(folder, "train", layer, dropped=True)
        assert len(others) == data.seen - len(data)
        assert others.take(np.arange(0)).shape == (0, 32)
    with pytest.raises(CannotWrite, match=r"another source.*dtype"):
        capture_step.main([*command, *capture_options(1500, "bfloat16")])


def test_training_goes_on_as_if_it_had_not_stopped(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, calls = Layer.take, 0

    def killed(self: Layer, numbers: np.ndarray) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:  # the first call is the fresh SAE's probe
            raise KeyboardInterrupt
        return take(self, numbers)

    tensors = []
    for name in ("whole", "stopped"):
        here = tmp_path / name
        shutil.copytree(residuals_folder(work), residuals_folder(here))
        run = run_of(here, 1)
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(Layer, "take", killed)
                with pytest.raises(KeyboardInterrupt):
                    train_layer(here, run, save_every=2)
            assert [path.name for path in sae_folder(here, 1).glob("step-*")] == ["step-4"]
        train_layer(here, run, save_every=2)
        tensors.append(torch.load(sae_folder(here, 1) / "sae.pt", weights_only=True))
        assert train_step.read_run(sae_folder(here, 1))[1]["samples"] == 64 * 12
        assert not list(sae_folder(here, 1).glob("step-*"))  # a finished one needs none
    for name, value in tensors[0].items():
        assert torch.equal(value, tensors[1][name]), name
    with pytest.raises(CannotWrite, match=r"other settings.*k: there 4, here 5"):
        train_layer(here, run_of(here, 1, k=5))
    with pytest.raises(TooLittleData, match="expected 99"):
        train_layer(here, run_of(here, 2, shards=99))


def test_folding_leaves_the_function_as_it_was(work: Path) -> None:
    data = Layer(residuals_folder(work), "train", 2)
    run = run_of(work, 2)
    sae, scale = train_step.fresh(data, run)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(run.d_sae, 1) + 0.5)  # norms that training would leave
        x = data.take(np.arange(50))
        truth = sae(x * scale) / scale
        plain = folded(sae, scale)
        pre = torch.relu(x @ plain["W_enc"].T + plain["b_enc"])
        values, indices = pre.topk(run.k, dim=-1)
        codes = torch.zeros_like(pre).scatter_(-1, indices, values)
        found = codes @ plain["W_dec"].T + plain["b_dec"]
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    assert plain["W_dec"].shape == (32, run.d_sae)
    torch.testing.assert_close(plain["W_dec"].norm(dim=0), torch.ones(run.d_sae))


def test_a_release_loads_as_ones_own_and_its_card_tells_the_shrinkage(
    work: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TooLittleData, match=r"no layer.*tools\.real\.train"):
        release_step.finished(work, Source.read(residuals_folder(work)))
    options = ["--width", "4", "--k", "4", "--batch", "64", "--samples", "9600"]
    options += ["--lr", "0.01", "--warm-up", "10", "--save-every", "100", "--no-autocast"]
    train_step.main(["--work", str(work), *options])
    release_step.main(
        [
            "--model",
            str(model_folder),
            "--work",
            str(work),
            "--loss-tokens",
            "100",
            "--base-model",
            "someone/Tiny-Qwen2",
        ]
    )
    [folder] = [path for path in (work / "release").iterdir() if path.is_dir()]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "card.json",
        "config.json",
        "layer1.sae.pt",
        "layer2.sae.pt",
    ]
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(work / "release"))
    sae = load_sae(f"local/{folder.name}", 2)
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (32, 128, 4)
    figures = json.loads((folder / "card.json").read_text())["layers"]
    assert set(figures) == {"1", "2"}
    for one in figures.values():
        assert 0 < one["fvu"] < 0.7  # 1 would be the mean
        assert 3.5 < one["l0"] <= 4
        assert one["losses"]["clean"] == pytest.approx(5.86, abs=0.3)  # a random model's
    text = (folder / "README.md").read_text()
    assert "**Shrunk.**" in text
    assert "1,500,000" in text
    assert Losses(10, clean=1.0, spliced=2.0, random=5.0, zeroed=9.0).recovered == 0.75
    assert Losses(10, clean=1.0, spliced=2.0, random=5.0, zeroed=9.0).recovered_from_zeros == 0.875
