"""`qsl serve` over the real llama-server: does it write what our own engine writes?

    python benchmarks/serve_llama.py --program PATH/llama-server --out serve-llama.txt
    QWEN_SCOPE_HOME=WORK/release python benchmarks/serve_llama.py --program ... --model MODEL \\
        --name "WHAT IT IS" --sae local/SAE-... --layers 10,14 --out ...    # a real one
    python benchmarks/serve_llama.py --program ... --record tests/llama_recorded.json

The model is written as GGUF in float32 with its vocabulary. Prompts are answered greedily by our
own engine and by the program, without a plan and under one of `add` edits, whole and as streams,
and with stop texts. Where two replies differ, it says whether the program took a token for an end
that the model's own configuration does not name, or how near a tie the first other token was.
`--record` writes what the program answers to a few requests; the double of the tests answers the
same.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from _llama import make_plan, write_model
from _measure import Printed, cpu_name

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.models import load_model
from qwen_scope_lens.serve.engines import llama
from qwen_scope_lens.serve.engines.programs import Programs
from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.rows import Row, Wanted
from qwen_scope_lens.steering import Plan
from qwen_scope_lens.steering.generate import end_tokens

EXACT = ["-t", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]  # no half precision in the cache
LONGEST = 24  # tokens of a prompt
STOPS = (".", "。", "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--model", default="mini-qwen3")
    parser.add_argument("--name", default="mini-qwen3", help="what the model is, for the results")
    parser.add_argument("--sae", default="mini-qwen3/w1k-l0-16", help="the group of its SAEs")
    parser.add_argument("--layers", default="3,6", help="two of them")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    bridge = load_model(given.model, dtype=torch.float32)
    tokenizer = bridge.tokenizer
    texts = [row["text"] for row in heldout()][:: 640 // given.prompts][: given.prompts]
    ids = [tuple(tokenizer(text)["input_ids"][:LONGEST]) for text in texts]
    plan = make_plan(bridge, given.sae, given.layers.split(","), texts)
    model = bridge.release()
    with tempfile.TemporaryDirectory() as folder:
        gguf = write_model(model, Path(folder) / "model.gguf", tokenizer)
        programs = Programs(given.program, gguf, EXACT)
        ends = frozenset(end_tokens(model))
        group = find_group(given.sae)
        engine = llama.LlamaCpp(
            tokenizer, ends, group.d_model, programs, lambda name: lens.sae_of(name)
        )
        lens = Lens(
            model, tokenizer, group, [int(given.layers.split(",")[0])], engine=engine, name=None
        )
        try:
            if given.record is not None:
                record(given.record, engine, tokenizer)
            else:
                compare(given, lens, ids, plan)
        finally:
            lens.close()


def compare(
    given: argparse.Namespace, lens: Lens, ids: Sequence[tuple[int, ...]], plan: Plan
) -> None:
    say = Printed()
    say(f"{given.name}; CPU: {cpu_name()}; {version(given.program)}; torch {torch.__version__}")
    say(f"commit {commit()}, {date.today()}; float32 GGUF, {' '.join(EXACT)}")
    say(f"{len(ids)} prompts of up to {LONGEST} tokens, {given.tokens} new tokens, greedy")
    say(f"plan: {plan}")
    lens.engine.check(plan)
    plain: list[Row] = []
    for name, used in (("without a plan", None), ("under the plan", plan)):
        wanted = [Wanted(one, given.tokens, 0.0, plan=used) for one in ids]
        ours, theirs = replies(lens.reader, wanted), replies(lens.engine, wanted)
        streams = [Wanted(one, given.tokens, 0.0, plan=used, streams=True) for one in ids]
        stops = [Wanted(one, given.tokens, 0.0, plan=used, stop=STOPS) for one in ids]
        same = [a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True)]
        say(f"{name}: replies equal, token for token: {sum(same)} of {len(same)}")
        for a, b in zip(ours, theirs, strict=True):
            if a.tokens != b.tokens:
                say(f"  first other token: {first(a, b)}, {why(lens, a, b)}")
        found = replies(lens.engine, streams)
        equal = sum(a.tokens == b.tokens for a, b in zip(theirs, found, strict=True))
        say(f"{name}: streams equal to whole replies: {equal} of {len(ids)}")
        ours, theirs = replies(lens.reader, stops), replies(lens.engine, stops)
        pairs = list(zip(ours, theirs, strict=True))
        equal = sum((a.text.text, a.reason) == (b.text.text, b.reason) for a, b in pairs)
        say(f"{name}: with stop texts, text and reason equal: {equal} of {len(ids)}")
        plain = plain or found
    changed = sum(a.tokens != b.tokens for a, b in zip(plain, found, strict=True))
    say(f"the plan changed {changed} of {len(ids)} replies")
    if given.out is not None:
        say.save(given.out)


def replies(engine: Any, wanted: Sequence[Wanted]) -> list[Row]:
    told: queue.Queue[Any] = queue.Queue()
    rows: list[Row] = engine.submit(wanted, lambda row, step: told.put(step))
    left = len(rows)
    while left:
        step = told.get(timeout=1200)
        if step.error is not None:
            raise step.error
        left -= step.reason is not None
    return rows


def first(a: Row, b: Row) -> int:
    pairs = zip([*a.tokens, -1], [*b.tokens, -1], strict=False)
    return next(i for i, (one, other) in enumerate(pairs) if one != other)


def why(lens: Lens, ours: Row, theirs: Row) -> str:
    """Whether the program took our token for an end, or how near a tie it was where they part."""
    at = first(ours, theirs)
    if theirs.reason == "stop" and at == len(theirs.tokens):
        return f"{lens.vocabulary.text(ours.tokens[at])}, at which llama-server ends a text"
    ids = ours.ids[: len(ours.wanted.prompt) + at]
    wanted = Wanted(tuple(ids), 1, 0.0, plan=ours.wanted.plan, top_logprobs=2)
    [again] = replies(lens.reader, [wanted])
    (_, high), (_, low) = again.logprobs[0].top
    return f"where the best two logits are {high - low:.1e} apart"


def record(path: Path, engine: llama.LlamaCpp, tokenizer: Any) -> None:
    """What the program answers, word for word: `[{steered, method, path, body, status, text}]`."""
    plan = Plan("mini-qwen3/w1k-l0-16/6/423:add:40@first")
    engine.check(plan)
    rows: list[dict[str, Any]] = []
    prompts = ("The kernel reads a file", "内核读取文件。", "Emoji 😀 😀")
    for steered in (False, True):
        replies(engine, [Wanted((5,), 1, 0.0, plan=plan if steered else None)])
        program = engine._source.running(plan if steered else None)  # type: ignore[union-attr]
        assert program is not None
        headers = {"Authorization": f"Bearer {program.address.key}"}
        http = httpx.Client(base_url=program.address.url, headers=headers, timeout=60)

        def keep(place: str, body: Any = None) -> None:
            answer = http.request("GET" if body is None else "POST", place, json=body)  # noqa: B023
            text = answer.text.replace(str(engine._source._gguf), "model.gguf")  # type: ignore[union-attr]
            about = {"steered": steered, "path": place, "body": body}  # noqa: B023
            rows.append({**about, "status": answer.status_code, "text": text})

        for place in ("/health", "/v1/models", "/props"):
            keep(place)
        keep("/tokenize", {"content": llama.PROBE})
        for prompt in prompts:
            ids = tuple(tokenizer(prompt)["input_ids"])
            for streams in (False, True):
                keep("/completion", llama._body(Wanted(ids, 16, 0.0, streams=streams)))
        keep("/completion", llama._body(Wanted((5,) * 1100, 4, 0.0)))
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", "utf-8")


def version(program: Path) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return "llama-server " + next((x for x in lines if x.startswith("version")), "of no version")


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
