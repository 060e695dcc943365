"""Careless command lines are refused at once: before torch, SAELens or a data set is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MINI = "mini-qwen3/w1k-l0-16"

CARELESS = """
completion tcsh                                                         | invalid choice
convert official-to-saelens nosuch --out o                              | no group is named
convert official-to-saelens MINI --out o --layers 99                    | layer 99
convert openinterp-to-saelens nosuch --out o                            | no group is named
convert saelens-to-official nosuch --out o --num-layers 4               | has no cfg.json
show nosuch                                                             | no group is named
verify nosuch/20 --model x                                              | no group is named
verify MINI/99 --model x                                                | layer 99
verify MINI/6 --activations none.npy                                    | there is no file none.npy
verify MINI/6 --activations empty.jsonl                                 | empty.jsonl is empty
verify MINI/6 --model ./nowhere                                         | not a folder
verify MINI/6 --model folder                                            | not a model
verify MINI/6 --model mini-qwen3 --texts none.txt                       | there is no file
read x --sae nosuch                                                     | no group is named
read x --layers 99                                                      | layer 99
read x --labels none.jsonl                                              | none.jsonl
read x --model ./nowhere                                                | not a folder
graph x --sae nosuch --out o                                            | no group is named
graph x --layers 99 --out o                                             | layer 99
graph --out o                                                           | give a TEXT
graph --from nosuch                                                     | nosuch
extract none.jsonl --sae MINI --layers 6 --out o                        | does not exist
extract empty.jsonl --sae MINI --layers 6 --out o                       | empty.jsonl is empty
extract blank.jsonl --sae MINI --layers 6 --out o                       | blank.jsonl is empty
extract one.jsonl --sae nosuch --layers 6 --out o                       | no group is named
extract one.jsonl --sae MINI --layers 99 --out o                        | layer 99
extract one.jsonl --sae MINI --layers 6 --out o --model ./nowhere       | not a folder
extract one.jsonl --sae MINI --layers 6 --out o --device banana         | device 'banana'
extract one.jsonl --sae MINI --layers 6 --out o --ray 2                 | ray, which is not
extract one.jsonl --sae MINI --layers 6 --out memory://x                | is lost when it ends
extract one.jsonl --sae MINI --layers 6 --out s3://                     | expected a bucket
store info folder                                                       | not a feature store
store sql nosuch select                                                 | not a feature store
store merge new nosuch                                                  | not a feature store
store copy store memory://x                                             | is lost when it ends
store info s3://                                                        | expected a bucket
stats nosuch                                                            | not a feature store
stats store --layers 99                                                 | layer 99 is not in store
stats store --feature 9999                                              | feature 9999
rank nosuch --label lang --positive p                                   | not a feature store
rank store --label nosuch --positive p                                  | no label 'nosuch'
rank store --label lang --positive p --layers 99                        | layer 99 is not in store
label list none.jsonl                                                   | there is no file
label list empty.jsonl                                                  | empty.jsonl is empty
label check labels.jsonl --store nosuch                                 | not a feature store
find a --sae MINI --labels labels.jsonl --embed openai:http://127.0.0.1:9/v1#m| no connection
dash build store --out o --layers 99                                    | layer 99 is not in store
dash export nosuch --out o                                              | not a feature store
dash serve nosuch                                                       | not a site of features
dash serve site --port PORT                                             | cannot be used
app --sae nosuch                                                        | no group is named
app --layers 99                                                         | layer 99
app --labels none.jsonl                                                 | none.jsonl
app --site nosuch                                                       | not a site of features
app                                                                     | starlette, which is not
serve --plan none.json                                                  | none.json
serve --record-limit 1MB                                                | below --record-rotate
serve --host 0.0.0.0                                                    | give a --token
compare match nosuch MINI/6                                             | not an SAE address
compare match MINI/99 MINI/6                                            | layer 99
compare drift nosuch store                                              | not a feature store
compare drift store store --layers 99                                   | layer 99 is not in store
compare transfer --sae MINI --layers 99 --models a --texts one.jsonl    | layer 99
compare transfer --sae MINI --layers 6 --models adapter --texts one.jsonl | peft, which is not
compare transfer --sae MINI --layers 6 --models a --texts empty.jsonl   | empty.jsonl is empty
steer x                                                                 | nothing to steer
steer x --edit nosuch                                                   | not an edit
steer x --edit MINI/6/9999:ablate                                       | feature 9999
steer x --edit MINI/6/1:boost                                           | no operation is named
steer x --edit MINI/6/1:add:2typical                                    | typical activation
steer x --edit MINI/6/1:add:2typical --calibration none.json            | does not exist
steer x --edit MINI/6/1:ablate --thinking                               | --chat
steer x --edit MINI/6/1:ablate --edit OTHER/3/1:ablate                  | different models
steer x --plan bad.json                                                 | cannot be read as JSON
plan none.json --edit ablate                                            | `qsl rank --out none.json`
plan bad.json --edit ablate                                             | has no rows with features
sweep one.jsonl --strengths 1                                           | nothing to sweep
sweep empty.jsonl --edit MINI/6/1:add --strengths 1                     | empty.jsonl is empty
sweep one.jsonl --edit MINI/6/1:add --strengths x                       | strengths 'x'
sweep one.jsonl --edit MINI/6/1:ablate --strengths 1                    | without a strength
sweep one.jsonl --edit MINI/6/1:add --strengths 1 --measure nosuch      | measure 'nosuch'
sweep one.jsonl --edit MINI/6/1:add --strengths 1 --unit typical        | typical activation
calibrate nosuch --texts one.jsonl --out o.json                         | not an SAE address
calibrate MINI/6/1 --texts empty.jsonl --out o.json                     | empty.jsonl is empty
calibrate MINI/3/1 --store store --out o.json                           | layer 3 is not in store
blame nosuch/6 --prompt a --reply b                                     | no group is named
blame MINI/6 --prompt a                                                 | --prompt and --reply
blame MINI/6 --cases empty.jsonl                                        | empty.jsonl is empty
blame MINI/6 --prompt a --reply b --class nosuch                        | nosuch
blame MINI/6 OTHER/3 --prompt a --reply b                               | different models
export --edit MINI/6/1:add:1 --out o.gguf                               | gguf, which is not
lm-eval --model m --tasks t                                             | lm_eval, which is not
bench extract none.jsonl --sae MINI --layers 6 --out b                  | does not exist
bench extract --sae MINI --layers 6 --out b                             | no benchmark was named
bench extract --tasks t --sae MINI --layers 6 --out b                   | lm_eval, which is not
bench redundancy folder                                                 | does not hold benchmarks
bench subset nosuch                                                     | not a feature store
compare match MINI/6 MINI/7 --by activation                            | needs a store of each
compare match MINI/6 OTHER/7 --by decoder                               | different residual spaces
reproduce show toxicity --yaml --json                                   | give one of them
classify fit nosuch --label l --out c.json                              | pass --sae
classify fit store --label nosuch --out c.json                          | no label 'nosuch'
classify fit one.jsonl --label nosuch --out c.json --model m --sae MINI | no column 'nosuch'
classify predict bad.json store                                         | cannot be read as JSON
classify predict labels.jsonl store                                     | is not a qwen-scope-cl
classify transfer store --label lang --language nosuch                  | no label 'nosuch'
synth targets store --reference nosuch --out t.json                     | not a feature store
synth targets store --layers 99 --out t.json                            | layer 99 is not in store
synth describe store --layers 99 --generator hf:x --out l.jsonl         | layer 99 is not in store
synth run bad.json --generator hf:x --out d.jsonl                       | cannot be read as JSON
synth report none.jsonl --targets bad.json                              | there is no file
train languages store --targets zh --label nosuch --out o.json          | no label 'nosuch'
train sasft none.yaml                                                   | there is no file
train grpo run.yaml                                                     | trl, which is not
train repetition loops empty.jsonl --model m --out o.jsonl              | empty.jsonl is empty
train repetition find store --label lang --out o.json                   | belong together
train repetition screen bad.json one.jsonl                              | cannot be read as JSON
train measure empty.jsonl                                               | empty.jsonl is empty
train measure one.jsonl --script nosuch                                 | no script
"""

PROGRAM = """
import json, socket, sys
class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "sae_lens", "transformers", "transformer_lens", "sklearn", "datasets"):
            raise AssertionError(f"imports {name}")
sys.meta_path.insert(0, Heavy())
for name in ("starlette", "lm_eval", "gguf", "ray", "trl", "peft"):
    sys.modules[name] = None  # as if it were not installed
from qwen_scope_lens.cli import main
from qwen_scope_lens.stores.manifest import (
    CorpusFacts, Manifest, ModelFacts, SAEFacts, Settings, TokenizerFacts
)
from pathlib import Path
Manifest(
    ModelFacts("mini-qwen3", None, "float32", 64, "x"), TokenizerFacts("t", 10, "x"),
    {6: SAEFacts(f"{sys.argv[1]}/6", 1024, 16, "x")}, Settings(), {"lang": "str"},
    (CorpusFacts("c", 1, "x"),), {},
).write(Path("store"))
busy = socket.create_server(("127.0.0.1", 0))
for words, said in json.load(sys.stdin):
    print(json.dumps(words), file=sys.stderr)
    words = [word.replace("PORT", str(busy.getsockname()[1])) for word in words]
    try:
        code = main(words)
    except SystemExit as end:  # argparse
        code = end.code
    assert code in (1, 2), (words, code)
"""


def test_every_verb_refuses_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """All in one process, in which an import of torch or the like raises."""
    for folder in ("store", "folder", "adapter", "site/data"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in {
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "one.jsonl": '{"text": "a", "prompt": "b"}\n',
        "bad.json": "{",
        "run.yaml": "model: m\n",
        "labels.jsonl": f'{{"address": "{MINI}/6/1", "text": "x"}}\n',
        "adapter/adapter_config.json": "{}",
        "site/index.html": "",
        "site/data/site.js": "",
    }.items():
        (tmp_path / name).write_text(text)
    there = sorted(tmp_path.rglob("*"))
    cases = []
    for line in CARELESS.strip().splitlines():
        words, _, said = line.partition("|")
        words = words.replace("MINI", MINI).replace("OTHER", "mini-qwen3.5/w1k-l0-16")
        cases.append((words.split(), said.strip()))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, MINI],
        input=json.dumps(cases),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = done.stderr
    for case, said in cases:
        _, marked, answers = answers.partition(f"{json.dumps(case)}\n")
        assert marked
        answer = answers.partition('\n["')[0]
        assert said in " ".join(answer.split()), (case, answer)
    written = set(tmp_path.rglob("*")) - {*there, tmp_path / "store" / "manifest.json"}
    assert not written
