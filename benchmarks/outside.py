"""Other people's SAE benchmarks on a mini SAE, through their public interfaces.

    OMP_NUM_THREADS=1 python benchmarks/outside.py > benchmarks/results/outside.txt

`sae-probes` (sparse probing, 113 datasets inside its wheel; a few are run) and SAELens's own
evaluation, from Python and from the shell. sae-probes 0.4.2 asks for pandas < 3 and pyarrow < 26,
so it is installed without its dependencies:
`pip install --no-deps sae-probes==0.4.2 xgboost-cpu zstandard`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from _measure import cpu_name
from sae_lens import ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

import qwen_scope_lens as qsl
from qwen_scope_lens.compare import random_sae
from qwen_scope_lens.mini import heldout

MODEL, GROUP, LAYER = "mini-qwen3", "mini-qwen3/w1k-l0-16", 6
PROBED = ("105_click_bait", "96_spam_is", "95_toxic_is", "22_headline_isobama")
KS = [1, 16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probed", nargs="*", default=PROBED, help="datasets of sae-probes")
    names = parser.parse_args().probed
    torch.set_num_threads(1)
    print(f"{cpu_name()}; {GROUP}/{LAYER} on {MODEL}\n")
    model, sae = qsl.load_model(MODEL), qsl.load_sae(f"{GROUP}/{LAYER}")
    saelens_evals(model, sae)
    saelens_shell()
    sparse_probing(model, sae, names)


def saelens_evals(model: Any, sae: Any) -> None:
    """`run_evals` with the bridge and an activation store on the held-out texts."""
    texts = [{"text": r["text"]} for r in heldout() if r["domain"] in ("prose", "chat", "code")]
    config = EvalConfig(
        batch_size_prompts=8,
        n_eval_reconstruction_batches=3,
        n_eval_sparsity_variance_batches=3,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    for name, one in (("the SAE", sae), ("a random one", random_sae(sae))):
        store = ActivationsStore.from_sae(
            model,
            one,
            dataset=datasets.Dataset.from_list(texts),
            context_size=96,
            store_batch_size_prompts=8,
            n_batches_in_buffer=2,
            train_batch_size_tokens=768,
            streaming=False,
        )
        found, _ = run_evals(one, store, model, ActivationScaler(), eval_config=config)
        kept, quality = found["model_performance_preservation"], found["reconstruction_quality"]
        print(
            f"SAELens run_evals, {name}: explained variance {quality['explained_variance']:.3f},"
            f" L0 {found['sparsity']['l0']:.1f}, loss {kept['ce_loss_without_sae']:.3f} ->"
            f" {kept['ce_loss_with_sae']:.3f} (ablated {kept['ce_loss_with_ablation']:.3f},"
            f" recovered {kept['ce_loss_score']:.3f})"
        )


def saelens_shell() -> None:
    """The same from SAELens's command line, with and without `install()`."""
    release = qsl.find_group(GROUP).release
    words = [
        release,
        f"layer{LAYER}",
        "--batch_size_prompts",
        "4",
        "--ctx_lens",
        "64",
        "--n_eval_reconstruction_batches",
        "1",
        "--n_eval_sparsity_variance_batches",
        "1",
        "--datasets",
        "nowhere",
    ]
    plain = [sys.executable, "-W", "ignore", "-m", "sae_lens.evals", *words]
    program = (
        "import sys, qwen_scope_lens as qsl; qsl.install();"
        " from sae_lens.evals import run_evals_cli; run_evals_cli(sys.argv[1:])"
    )
    installed = [sys.executable, "-W", "ignore", "-c", program, *words]
    for name, command in (("python -m sae_lens.evals", plain), ("after install()", installed)):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1][:160] if lines else "no output"
        print(f"SAELens's shell command, {name}: exit {done.returncode}; {last}")


def sparse_probing(model: Any, sae: Any, names: list[str]) -> None:
    try:
        import sae_probes
        from sae_probes.constants import DATA_PATH
        from sae_probes.generate_model_activations import generate_single_dataset_activations
    except ImportError as error:
        print(f"sae-probes: not installed ({error}); see the head of this script")
        return
    hook = sae.cfg.metadata.hook_name
    print(f"\nsae-probes {sae_probes.__version__}, test AUC of probes on k features, L1:")
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "activations"
        for name in names:  # its own loader knows no Qwen-Scope model, but takes one in memory
            path = DATA_PATH / "cleaned_data" / f"{name}.csv.zst"
            with contextlib.redirect_stdout(sys.stderr):
                generate_single_dataset_activations(
                    model, MODEL, path, [hook], cache, "cpu", max_seq_len=128
                )
        floor = random_sae(sae)
        for name, one in (("the SAE", sae), ("a random one", floor)):
            out = Path(scratch) / name
            with contextlib.redirect_stdout(sys.stderr):
                sae_probes.run_sae_evals(
                    sae=one,
                    model_name=MODEL,
                    hook_name=hook,
                    reg_type="l1",
                    setting="normal",
                    ks=KS,
                    results_path=out,
                    model_cache_path=cache,
                    datasets=list(names),
                    device="cpu",
                )
            for dataset in names:
                [path] = out.rglob(f"{dataset}_*.json")
                rows = json.loads(path.read_text())
                shown = ", ".join(f"k={row['k']} {row['test_auc']:.3f}" for row in rows)
                print(f"  {name:13} {dataset:24} {shown}")


if __name__ == "__main__":
    main()
