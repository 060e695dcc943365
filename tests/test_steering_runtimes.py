"""Plans on other runtimes: exported files read back, interp-engine, lm-eval, the command line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import steering_reference as reference
import torch
from tiny_models import make_model, make_tokenizer

from qwen_scope_lens.cli.verbs import main
from qwen_scope_lens.errors import BadPlan, PlanNeverFired, WrongModel
from qwen_scope_lens.steering import Plan, steer
from qwen_scope_lens.steering.runtimes import (
    evaluate,
    export,
    layer_vectors,
    steer_engine,
    steered_lm,
)
from qwen_scope_lens.steering.runtimes.lm_eval_model import NAME

MINI = "mini-qwen3/w1k-l0-16"
IDS = list(b"some text to steer")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reference.write_saes(tmp_path_factory.mktemp("runtimes"))


@pytest.fixture(autouse=True)
def _home(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(world.home))


def ref(layer: int, feature: int) -> str:
    return f"local/tiny/{layer}/{feature}"


# --- files ---------------------------------------------------------------------------------------


def test_a_control_vector_reads_back(world: Any, tmp_path: Path) -> None:
    from gguf import GGUFReader

    plan = Plan(
        [f"{ref(1, 3)}:add:2@first", f"{ref(1, 4)}:add:-1@first", f"{ref(3, 5)}:add:1@first"]
    )
    reader = GGUFReader(export(plan, tmp_path / "v.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert Plan.from_dict(json.loads(fields["qwen_scope_lens.plan"])) == plan
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    d = {layer: world[layer]["W_dec"] for layer in (1, 3)}
    assert set(found) == {"direction.1", "direction.3"}
    torch.testing.assert_close(found["direction.1"], 2 * d[1][:, 3] - d[1][:, 4])
    torch.testing.assert_close(found["direction.3"], d[3][:, 5])
    mini = export(Plan([f"{MINI}/6/3:add:1@first"]), tmp_path / "mini.gguf")
    assert GGUFReader(mini).fields["controlvector.model_hint"].contents() == "qwen3"


def test_vectors_read_back(world: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    plan = Plan([f"{ref(0, 3)}:add:2", f"{ref(2, 4)}:add:-1"])
    with safe_open(export(plan, tmp_path / "v.safetensors"), framework="pt") as file:
        assert file.metadata()["first_token"] == "left out"
        assert Plan.from_dict(json.loads(file.metadata()["plan"])) == plan
        torch.testing.assert_close(file.get_tensor("layers.0"), 2 * world[0]["W_dec"][:, 3])
        assert set(file.keys()) == {"layers.0", "layers.2"}


@pytest.mark.parametrize(
    "edit",
    [
        "1/3:ablate@first",
        "1/3:set:2@first",
        "1/3:project_out@first",
        "1/3:add:0.1norm@first",
        "1/3:add:1@prompt,first",
        "1/3:add:1@pos=1",
        "1/3:add:1",
        "0/3:add:1@first",
    ],
)
def test_what_a_control_vector_cannot_say_is_refused(edit: str, tmp_path: Path) -> None:
    with pytest.raises(BadPlan):
        export(Plan([f"local/tiny/{edit}"]), tmp_path / "v.gguf")
    assert not (tmp_path / "v.gguf").exists()


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(BadPlan, match=r"\.gguf or \.safetensors"):
        export(Plan([f"{ref(1, 3)}:add:1"]), tmp_path / "v.bin")
    with pytest.raises(BadPlan, match="has no places"):
        export(Plan([f"{ref(1, 3)}:add:1@generation"]), tmp_path / "v.safetensors")
    with pytest.raises(BadPlan, match="calibrat"):
        layer_vectors(Plan([f"{ref(1, 3)}:add:1typical"]))


# --- interp-engine -------------------------------------------------------------------------------

ENGINE_PLANS = {
    "adds": ["1/3:add:+3", "1/4:add:-2", "2/5:add:+1"],
    "typical": ["1/3:add:+2typical"],
    "norm": ["1/3:add:-0.3norm"],
    "projected": ["1/3:project_out", "2/4:add:2"],
    "prompt": ["1/3:add:+3@prompt"],
    "generation": ["1/3:add:+3@generation"],
    "first": ["1/3:add:+3@first"],
    "positions": ["1/3:add:+3@prompt,pos=2-4+-1"],
}


@pytest.fixture(scope="module")
def engine() -> Any:
    from interp_engine import EagerModel

    hf = make_model()
    hf.generation_config.eos_token_id = None
    return EagerModel("tiny", hf_model=hf, tokenizer=make_tokenizer(), dtype="float32")


@pytest.mark.parametrize("name", ENGINE_PLANS)
def test_interp_engine_does_the_same(world: Any, engine: Any, name: str) -> None:
    plan = Plan([f"local/tiny/{edit}" for edit in ENGINE_PLANS[name]])
    plan = plan.calibrated({ref(1, 3): 1.5})
    hf = engine.hf_model
    with steer(hf, plan):
        out = hf.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)
    plain = hf.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)
    with steer_engine(engine, plan, IDS):
        found = engine._generate_completion(IDS, 6, 0.0, None).token_ids
        caught = asyncio.run(engine.capture(IDS, ["resid_post.3"]))
    assert found == out[0, len(IDS) :].tolist()
    assert found != plain[0, len(IDS) :].tolist()
    seen = []
    handle = hf.model.layers[3].register_forward_hook(lambda m, a, o: seen.append(o))
    with steer(hf, plan, must_fire=False), torch.no_grad():
        hf(torch.tensor([IDS]))
    handle.remove()
    [residual] = caught.values()
    torch.testing.assert_close(residual, seen[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "edits",
    [
        ["1/3:ablate"],
        ["1/3:set:2"],
        ["1/3:add:1@prompt", "1/4:add:1"],
        ["1/3:add:1@class=digit"],
        ["1/3:project_out", "1/4:add:1"],
        ["1/3:add:0.1norm", "1/4:add:0.1norm"],
    ],
)
def test_interp_engine_refuses_what_it_would_do_otherwise(engine: Any, edits: list[str]) -> None:
    plan = Plan([f"local/tiny/{edit}" for edit in edits])
    with pytest.raises(BadPlan), steer_engine(engine, plan, IDS):
        pass
    with pytest.raises(WrongModel), steer_engine(engine, Plan([f"{MINI}/6/3:add:1"]), IDS):
        pass


# --- lm-eval -------------------------------------------------------------------------------------

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"question": f"{n} is it?", "answer": n % 2} for n in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local_choice.yaml").write_text(TASK.format(data=data))
    return tmp_path


def test_lm_eval_runs_the_steered_model(world: Any, task: Path) -> None:
    """A push along one answer's unembedding makes it the answer to everything."""
    hf, tokenizer = make_model(), make_tokenizer()
    a, b = tokenizer("ab")["input_ids"]
    target = (hf.lm_head.weight[a] - hf.lm_head.weight[b]).detach()
    chosen = int((target @ world[3]["W_dec"]).abs().argmax())
    sign = float(torch.sign(target @ world[3]["W_dec"][:, chosen]))
    options: dict[str, Any] = {"include_path": task, "bootstrap_iters": 0, "tokenizer": tokenizer}
    answers = {}
    for strength in (-400, 400):
        plan = Plan([f"{ref(3, chosen)}:add:{sign * strength}", f"{ref(1, 4)}:ablate"])
        found = evaluate(hf, plan, ["local_choice"], **options)
        samples = found["samples"]["local_choice"]
        answers[strength] = [
            int(s["filtered_resps"][0][0] < s["filtered_resps"][1][0]) for s in samples
        ]
    assert answers == {-400: [1] * 12, 400: [0] * 12}
    assert found["results"]["local_choice"]["acc,none"] == 0.5
    never = Plan([f"{ref(1, 3)}:add:1@generation"])
    with pytest.raises(PlanNeverFired):
        evaluate(hf, never, ["local_choice"], **options)


def test_lm_eval_knows_the_model_type(world: Any, tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    assert get_model(NAME) is steered_lm() if steered_lm() else False
    Plan([f"{ref(1, 3)}:add:2"]).save(tmp_path / "plan.json")
    lm = steered_lm()(
        make_model(), tmp_path / "plan.json", tokenizer=make_tokenizer(), device="cpu"
    )
    lm._model_call(torch.tensor([IDS]))
    lm.close()
    assert lm.report.edits[0].fired == len(IDS) - 1


# --- the command line, on the mini ---------------------------------------------------------------


def test_the_verbs_work_together(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """blame -> calibrate -> steer -> sweep -> export, with real files."""
    monkeypatch.delenv("QWEN_SCOPE_HOME")
    sae = f"{MINI}/6"
    reply = "Use the package manager 安装程序 and restart."
    assert main(["blame", sae, "--prompt", "How?", "--reply", reply, "--class", "han"]) == 0
    out = capsys.readouterr().out
    first, edit, *_ = [line.split() for line in out.splitlines() if line.startswith("try: ")]
    feature = first[3]  # try: qsl calibrate FEATURE ..
    assert edit[1:] == ["--edit", f"{feature}:add:-1typical", "--calibration", "typical.json"]
    texts = tmp_path / "texts.txt"
    texts.write_text("安装程序会自动启动。\n你可以在系统中安装程序。\n")
    typical = str(tmp_path / "typical.json")
    assert main(["calibrate", feature, "--texts", str(texts), "--out", typical]) == 0
    plan = str(tmp_path / "plan.json")
    words = [
        "steer",
        "The package",
        "--edit",
        f"{feature}:add:+1.5typical@first",
        "--new-tokens",
        "8",
    ]
    assert main([*words, "--calibration", typical, "--compare", "--save-plan", plan]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("Note: A toy") == 1
    assert "unsteered" in shown.out
    assert "fired on" in shown.err
    assert main(["export", "--plan", plan, "--out", str(tmp_path / "v.gguf")]) == 0
    sweep = [
        "sweep",
        str(texts),
        "--edit",
        f"{feature}:add",
        "--unit",
        "typical",
        "--new-tokens",
        "6",
        "--strengths",
        "-2:2:2",
        "--calibration",
        typical,
        "--measure",
        "class=han",
        "--out",
        str(tmp_path / "dose"),
    ]
    assert main(sweep) == 0
    assert {p.name for p in (tmp_path / "dose").iterdir()} == {"sweep.json", "sweep.html"}
    assert main(sweep) == 0  # from what is kept
    capsys.readouterr()
    assert main(["steer", "x", "--edit", f"{feature}:add:1typical"]) == 1
    assert main(["steer", "x"]) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["steer", "x", "--edit", f"{feature}:ablate", "--new-tokens", "0"])
    assert main(["sweep", str(texts), "--edit", f"{feature}:add", "--strengths", "1:x"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("qsl ")]) == 4


@pytest.mark.slow
def test_qsl_lm_eval(task: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("QWEN_SCOPE_HOME")
    out = tmp_path / "results.json"
    words = [
        "lm_eval",
        "--model",
        "mini-qwen3",
        "--tasks",
        "local_choice",
        "--plain",
        "--limit",
        "4",
        "--include-path",
        str(task),
        "--edit",
        f"{MINI}/5/7:add:3",
        "--out",
        str(out),
        "--edit",
        f"{MINI}/6/1:ablate",
    ]
    assert main(words) == 0
    assert "steered    local_choice" in capsys.readouterr().out
    assert set(json.loads(out.read_text())["results"]) == {"unsteered", "steered"}
