"""What steering as a graph of fixed shapes costs on a CPU, against steering in eager mode.

    python benchmarks/engines.py [--model FOLDER --sae GROUP/LAYER]

One layer's edits alone, without a model: `GraphEdits` (run as it is, and not compiled: a recorded
CUDA graph runs these operations, and no compiler need be there) over `LayerEdits`, the arithmetic
of `steer`, on the same residuals. The SAE is random, with a bias that leaves about a tenth of the
scores positive, as trained SAEs have it, and some features fire much more often than others. One
thread, CPU time, interleaved; a ratio is above 1 where the graph takes longer. With --model, the
residuals are those of this repository's docs/steer.md, and the features fire on one token in ten,
a hundred and a thousand. Nothing here says what a GPU or a serving engine would take.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import Printed, cpu_name, interleaved
from torch import Tensor

from qwen_scope_lens.models import capture, load_model
from qwen_scope_lens.saes import ScopeSAE, load_sae
from qwen_scope_lens.steering import Plan
from qwen_scope_lens.steering.readers import layer_edits
from qwen_scope_lens.steering.runtimes import graph_edits

WIDTH, D_SAE, K = 1024, 16384, 50
POSITIONS = (1, 8, 512)
CAPACITIES = (64, 256)
SHARES = (0.1, 0.01, 0.001)
RESULTS = Path(__file__).parent / "results" / "engines.txt"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--model", help="a real model's folder, with --sae")
    arguments.add_argument("--sae", help="the address of the SAE of one of its layers")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    say = Printed()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    say(f"{cpu_name()}, one thread, CPU time beside other work; torch {torch.__version__}")
    say(f"commit {commit}, {datetime.date.today()}; {options.rounds} interleaved rounds")
    say("float32; the graph's time over eager mode's, and milliseconds in brackets")
    home_before = os.environ.get("QWEN_SCOPE_HOME")
    with tempfile.TemporaryDirectory() as home:
        os.environ["QWEN_SCOPE_HOME"] = home
        write_sae(Path(home) / "one")
        sae = load_sae("local/one/0")
        say(f"\na random SAE, {WIDTH} x {D_SAE}, k {K}, on random residuals")
        residuals = torch.randn(2048, WIDTH, generator=torch.Generator().manual_seed(1))
        for edits in (("7:set:3",), ("7:cap:1", "8:set:2", "9:ablate", "10:ablate"), ("7:add:3",)):
            plan = Plan([f"local/one/0/{edit}" for edit in edits])
            measure(say, sae, plan, residuals, options.rounds)
    if options.model:
        os.environ.pop("QWEN_SCOPE_HOME")
        os.environ |= {} if home_before is None else {"QWEN_SCOPE_HOME": home_before}
        real(say, options)
    say.save(RESULTS)


def real(say: Printed, options: argparse.Namespace) -> None:
    """The same on residuals of a real model, on which the SAE was trained."""
    sae, layer = load_sae(options.sae), int(options.sae.rpartition("/")[2])
    model = load_model(options.model, up_to_layer=layer)
    page = (Path(__file__).parents[1] / "docs" / "steer.md").read_text("utf-8")
    texts = [page[at : at + 1000] for at in range(0, 10_000, 1000)]
    found = capture(model, texts, [layer])
    residuals = found.residuals[layer].float()
    codes = sae.encode_sparse(residuals)
    counts = torch.bincount(codes.indices[codes.active].long(), minlength=sae.cfg.d_sae)
    chosen = [int((counts / len(residuals) - share).abs().argmin()) for share in SHARES]
    fired = ", ".join(str(int(counts[f])) for f in chosen)
    say(f"\n{options.sae}, {sae.cfg.d_in} x {sae.cfg.d_sae}, k {sae.cfg.k},")
    say(f"on {len(residuals)} real residuals, on {fired} of which the features fire")
    order = torch.randperm(len(residuals), generator=torch.Generator().manual_seed(0))
    for edits in ([f"{chosen[0]}:set:3"], [f"{f}:ablate" for f in chosen]):
        plan = Plan([f"{options.sae}/{edit}" for edit in edits])
        measure(say, sae, plan, residuals[order], options.rounds)


def write_sae(folder: Path) -> None:
    folder.mkdir()
    settings = {
        "model_type": "topk_sae",
        "base_model": "random/one",
        "num_layers": 1,
        "d_model": WIDTH,
        "d_sae": D_SAE,
        "k": K,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    rng = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, WIDTH, generator=rng), dim=-1)
    often = torch.linspace(0, 1, D_SAE).pow(0.2)[torch.randperm(D_SAE, generator=rng)]
    weights = {
        "W_enc": rows,
        "W_dec": rows.T.contiguous(),
        "b_enc": -1.6 * often,
        "b_dec": torch.zeros(WIDTH),
    }
    torch.save(weights, folder / "layer0.sae.pt")


def measure(say: Printed, sae: ScopeSAE, plan: Plan, residuals: Tensor, rounds: int) -> None:
    """`residuals [n, d]`: the last 512 are steered, and the others show which features fire."""
    [layer] = plan.layers
    sample, rest = residuals[:-512], residuals[-512:]
    eager = layer_edits(plan.edits, sae)
    full = graph_edits(plan, sae)[layer]
    few = {
        c: graph_edits(plan, sae, capacity=c, samples={layer: sample})[layer] for c in CAPACITIES
    }
    everywhere = torch.ones(len(residuals), len(plan.edits), dtype=torch.bool)
    eager.change(sample, everywhere[:-512])  # so that the eager way knows its witnesses
    say()
    say(", ".join(str(edit).rpartition("/")[2] for edit in plan.edits))
    for n in POSITIONS:
        x, on = rest[:n], everywhere[:n]
        right = eager.change(x, on)[0]
        cases: dict[str, Callable[[], object]] = {
            "eager": lambda x=x, on=on: eager.change(x, on),
            "full": lambda x=x, on=on: full(x, on),
        }
        for c in CAPACITIES if n > max(CAPACITIES) else ():
            cases[str(c)] = lambda x=x, on=on, c=c: few[c](x, on)
        took = interleaved(cases, rounds)
        times = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in took.items())
        line = f"  {n:4} positions  all in full {took['full'] / took['eager']:5.2f}x  ({times})"
        full.clear()
        apart = float((full(x, on) - right).abs().max())
        say(f"{line}; undecided {int(full.undecided.sum())}, apart {apart:.1e}")
        for c, module in few.items():
            if str(c) in took:
                module.clear()
                module(x, on)
                missed, asked = int(module.undecided.sum()), n * len(plan.edits)
                ratio = took[str(c)] / took["eager"]
                say(f"{'':18}{c:4} in full {ratio:5.2f}x; undecided {missed} of {asked}")


if __name__ == "__main__":
    main()
