"""Every Python snippet in the README and the docs runs, in order, page by page."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import run

import planted
import pytest
import torch
import training_data
from feature_stores import build_store
from tiny_models import make_model, make_sae, make_tokenizer

import qwen_scope_lens as qsl
from qwen_scope_lens.labels import Label, LabelPack
from qwen_scope_lens.synth import TargetSet
from qwen_scope_lens.synth.targets import Target

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


WITH_SNIPPETS = [page for page in PAGES if snippets_of(page)]
STEP = re.compile(r"<!-- *(?:run|first)\b")
WITH_OUTPUTS = [page for page in PAGES if STEP.search(page.read_text("utf-8"))]


@pytest.fixture(scope="module")
def layer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layer that the pages name, in its true shape: a gigabyte and a half of ones and zeros."""
    home = tmp_path_factory.mktemp("home")
    group = qsl.find_group("qwen3-8b-base/w64k-l0-50")
    folder = home / group.repo_name
    folder.mkdir()
    torch.save(
        {
            "W_enc": torch.ones(group.d_sae, group.d_model),
            "W_dec": torch.zeros(group.d_model, group.d_sae, dtype=torch.float16),
            "b_enc": torch.ones(group.d_sae),
            "b_dec": torch.ones(group.d_model),
        },
        folder / "layer20.sae.pt",
    )
    return home


# What a page takes for granted (a checkpoint, an SAE, a corpus), made tiny in `folder`.


def _bench(folder: Path) -> dict[str, object]:
    (folder / "items").mkdir()
    return {"folder": folder / "items"}


def _classify(folder: Path) -> dict[str, object]:
    return {"folder": folder / "classify"}


def _compare(folder: Path) -> dict[str, object]:
    sae, model = qsl.load_sae("mini-qwen3/w1k-l0-16/1"), qsl.load_model("mini-qwen3")
    return {"sae_a": sae, "sae_b": sae, "sae": sae, "model": model, "texts": ["some words"]}


def _encode(folder: Path) -> dict[str, object]:
    planted.write_group(Path(os.environ["QWEN_SCOPE_HOME"]) / "mine")
    return {"sae": qsl.load_sae("local/mine/1"), "x": torch.randn(2, 5, planted.D_MODEL)}


def _models(folder: Path) -> dict[str, object]:
    make_model(dtype=torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    name = str(folder / "model")
    return {"name": name, "sae": make_sae(), "corpus": ["text"] * 5, "max_fvu": 1e9}


def _rank(folder: Path) -> dict[str, object]:
    documents = [[{n % 7: 1.0, 50: 2.0} if n < 20 else {n % 7: 1.0}] * 3 for n in range(60)]
    labels = {"lang": ["zh"] * 20 + ["en"] * 40}
    build_store(folder / "store", documents, labels, texts=[f"one {n}" for n in range(60)])
    return {"path": folder / "store"}


def _synth(folder: Path) -> dict[str, object]:
    ref = qsl.FeatureRef.parse("mini-qwen3/w1k-l0-16/6/7")
    LabelPack([Label(ref, "names")]).write("labels.jsonl")
    TargetSet((Target(ref, typical=50.0),), openings=("The file",)).save(Path("targets.json"))
    return {"qsl": qsl}


def _train(folder: Path) -> dict[str, object]:
    training_data.table({6: (1, 2), 7: (3, 4)}).save(folder / "language_features.json")
    model, tokenizer = training_data.mini()
    settings = training_data.settings(folder / "runs", max_steps=1)
    for said_on_the_page in ("output_dir", "per_device_train_batch_size"):
        del settings[said_on_the_page]
    return {"model": model, "tokenizer": tokenizer, "settings": settings}


STAND_INS: dict[str, Callable[[Path], dict[str, object]]] = {
    "bench.md": _bench,
    "classify.md": _classify,
    "compare.md": _compare,
    "encode.md": _encode,
    "models.md": _models,
    "rank.md": _rank,
    "synth.md": _synth,
    "train.md": _train,
}


# The types of those names, as a reader would have them.
DECLARED = {
    "bench.md": "from pathlib import Path\nfolder: Path",
    "classify.md": "from pathlib import Path\nfolder: Path",
    "compare.md": """
from qwen_scope_lens.models import ScopeBridge
from qwen_scope_lens.saes import ScopeSAE
sae_a: ScopeSAE
sae_b: ScopeSAE
sae: ScopeSAE
model: ScopeBridge
texts: list[str]
""",
    "encode.md": """
import torch
from qwen_scope_lens.saes import ScopeSAE
sae: ScopeSAE
x: torch.Tensor
""",
    "models.md": """
from qwen_scope_lens.saes import ScopeSAE
name: str
sae: ScopeSAE
corpus: list[str]
max_fvu: float
""",
    "rank.md": "from pathlib import Path\npath: Path",
    "synth.md": "import qwen_scope_lens as qsl",
    "train.md": """
from typing import Any
from transformers import PreTrainedModel, PreTrainedTokenizerBase
model: PreTrainedModel
tokenizer: PreTrainedTokenizerBase
settings: dict[str, Any]
""",
}


@pytest.mark.filterwarnings("ignore:You are loading an SAE using")
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.name)
def test_snippets_run(
    page: Path, layer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(layer_folder))
    monkeypatch.chdir(tmp_path)
    namespace = STAND_INS.get(page.name, lambda folder: {})(tmp_path)
    try:
        for snippet in snippets_of(page):
            exec(compile(snippet, str(page), "exec"), namespace)
    finally:
        qsl.uninstall()


def test_the_pages_have_snippets_and_outputs() -> None:
    """Without them, the tests of this file would check nothing."""
    assert {"README.md", "rank.md", "steer.md", "store.md"} <= {page.name for page in WITH_SNIPPETS}
    assert {"store.md", "synth.md", "train.md"} <= {page.name for page in WITH_OUTPUTS}
    assert set(STAND_INS) == set(DECLARED)


@pytest.mark.slow
def test_snippets_pass_the_type_checker(tmp_path: Path) -> None:
    """With the types that users get. The cache is that of `make lint`: the first run is slow."""
    modules = []
    for page in WITH_SNIPPETS:
        module = tmp_path / f"page_{page.stem.lower()}.py"
        parts = ["# mypy: allow-redefinition-new", DECLARED.get(page.name, ""), *snippets_of(page)]
        module.write_text("\n".join(parts), "utf-8")
        modules.append(str(module))
    wrong = tmp_path / "page_wrong.py"  # without it, a package of Any would pass, too
    wrong.write_text('import qwen_scope_lens as qsl\nqsl.load_sae(7)\nqsl.Edit(8, "add")\n')
    command = [sys.executable, "-m", "mypy", "--no-pretty", *modules, str(wrong)]
    found = run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    assert all(wrong.name in line for line in errors), found.stdout
    assert len(errors) == 2, found.stdout + found.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_verbs_exist(page: Path) -> None:
    from qwen_scope_lens.cli.verbs import VERBS

    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for verb in re.findall(r"^qsl (\w+)", text, re.MULTILINE):
        assert verb in VERBS, f"{page.name} shows `qsl {verb}`"


def test_the_first_screen_is_short() -> None:
    """What a user gets, in about twenty lines, with a picture."""
    first = (ROOT / "README.md").read_text().splitlines()[:32]
    assert any(line.startswith("![") for line in first)
    assert any("SAE.from_pretrained" in line for line in first)


@pytest.mark.parametrize("page", WITH_OUTPUTS, ids=lambda page: page.name)
def test_outputs_can_be_made_again(page: Path) -> None:
    """Every command that a page gives for a block is one of ours, and a block follows."""
    from qwen_scope_lens.cli.verbs import VERBS

    text = page.read_text("utf-8")
    steps = list(re.finditer(r"^<!-- (run|first): (.+?) -->\n", text, re.MULTILINE))
    assert len(steps) == len(STEP.findall(text)), "a step that is not read"
    assert any("qsl " in step[2] for step in steps), f"{page.name} runs no command of ours"
    for step in steps:
        verbs = re.findall(r"(?:^|[;&|] *)qsl (\w+)", step[2])
        assert set(verbs) <= set(VERBS), f"{page.name}: {step[2]}"
        if step[1] == "run":
            block = re.match(r"```\w*\n(.+?)^```$", text[step.end() :], re.DOTALL | re.MULTILINE)
            assert block is not None, f"{page.name}: no output follows {step[2]}"
            assert block[1].strip()
