"""An exported control vector in a real llama.cpp: do its logits move as Hugging Face's do?

    pip install llama-cpp-python gguf      # builds llama.cpp from source
    python benchmarks/llama_runtime.py > benchmarks/results/llama-cpp.txt
    QWEN_SCOPE_HOME=WORK/release python benchmarks/llama_runtime.py --model MODEL \\
        --name "WHAT IT IS" --sae local/SAE-... --layers 10,14    # a real one

mini-qwen3 (or a Qwen2 or Qwen3 model of one's own) is written as GGUF (float32, without a
vocabulary: token ids go in) into a temporary folder. A plan of `add` edits is exported with
`to_gguf`, read back, laid out as llama.cpp's own loader does (`common_control_vector_load`:
direction.N at N - 1) and given to the context. The same plan runs under `steer` on the HF model.
Compared are all next-token logits of held-out texts.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np
import torch
import transformers
from _llama import make_plan, write_model
from _measure import cpu_name

from qwen_scope_lens.mini import heldout
from qwen_scope_lens.models import load_model
from qwen_scope_lens.steering import steer
from qwen_scope_lens.steering.runtimes import to_gguf

TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini-qwen3")
    parser.add_argument("--name", default="mini-qwen3", help="what the model is, for the results")
    parser.add_argument("--sae", default="mini-qwen3/w1k-l0-16", help="the group of its SAEs")
    parser.add_argument("--layers", default="3,6", help="two of them")
    parser.add_argument("--texts", type=int, default=16)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    bridge = load_model(given.model, dtype=torch.float32)
    documents = [row["text"] for row in heldout("prose")][:: 320 // given.texts]
    ids = [bridge.tokenizer(text)["input_ids"][:TOKENS] for text in documents[: given.texts]]
    plan = make_plan(bridge, given.sae, given.layers.split(","), documents)
    hf = bridge.release()
    with tempfile.TemporaryDirectory() as folder:
        runtime = Runtime(write_model(hf, Path(folder) / "mini.gguf"))
        vector = read_vector(
            to_gguf(plan, Path(folder) / "vector.gguf"), int(hf.config.hidden_size)
        )
        plain_hf, plain = logits(hf, ids), runtime.logits(ids)
        with steer(hf, plan, allow_other_model=True) as report:
            moved_hf = logits(hf, ids)
        runtime.steer(vector)
        moved = runtime.logits(ids)
        runtime.steer(None)
        again = runtime.logits(ids)
    print(f"{given.name}; CPU: {cpu_name()}; llama-cpp-python {version()}, float32 GGUF")
    print(f"{len(ids)} texts, {sum(map(len, ids))} positions; plan:")
    print("\n".join(f"  {row}" for row in report.edits))
    ours, theirs = moved_hf - plain_hf, moved - plain
    print(f"unsteered: largest difference of a logit {np.abs(plain - plain_hf).max():.1e}")
    print(f"steered:   largest difference of a logit {np.abs(moved - moved_hf).max():.1e}")
    print(f"the effect itself: largest {np.abs(ours).max():.1f}, mean {np.abs(ours).mean():.2f}")
    print(f"correlation of the effects: {np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]:.6f}")
    same, changed = moved.argmax(-1) == moved_hf.argmax(-1), moved.argmax(-1) != plain.argmax(-1)
    print(f"same top token when steered: {same.mean():.2%} of positions")
    print(f"the plan changed the top token at {changed.mean():.0%} of them")
    print(f"vector taken off: logits as before, bit for bit: {bool((again == plain).all())}")


def logits(model: Any, rows: Sequence[Sequence[int]]) -> np.ndarray:
    with torch.no_grad():
        found = [model(torch.tensor([list(ids)])).logits[0].float().numpy() for ids in rows]
    return np.concatenate(found)


def read_vector(path: Path, width: int) -> np.ndarray:
    reader = gguf.GGUFReader(path)
    found = {int(t.name.split(".")[1]): np.array(t.data) for t in reader.tensors}
    flat = np.zeros((max(found), width), dtype=np.float32)
    for layer, row in found.items():
        flat[layer - 1] = row
    return flat


class Runtime:
    """A llama.cpp context over one model."""

    def __init__(self, path: Path) -> None:
        llama.llama_backend_init()
        self._log = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._log, None)
        settings = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(str(path).encode(), settings)
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 256
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = 0  # float32
        options.flash_attn_type = 0  # off: its products are half precision
        self.context = llama.llama_init_from_model(self.model, options)
        vocabulary = llama.llama_model_get_vocab(self.model)
        self.size = int(llama.llama_vocab_n_tokens(vocabulary))
        self.layers = int(llama.llama_model_n_layer(self.model))

    def steer(self, vector: np.ndarray | None) -> None:
        """Give the context a control vector, or take it off."""
        if vector is None:
            code = llama.llama_set_adapter_cvec(self.context, None, 0, 0, 0, 0)
        else:
            data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            code = llama.llama_set_adapter_cvec(
                self.context, data, vector.size, vector.shape[1], 1, self.layers
            )
        assert code == 0

    def logits(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        found = []
        for ids in rows:
            llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
            batch = llama.llama_batch_init(len(ids), 0, 1)
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, 1
            assert llama.llama_decode(self.context, batch) == 0
            for i in range(len(ids)):
                row = llama.llama_get_logits_ith(self.context, i)
                found.append(np.ctypeslib.as_array(row, (self.size,)).copy())
            llama.llama_batch_free(batch)
        return np.stack(found)


def version() -> str:
    import llama_cpp

    return str(llama_cpp.__version__)


if __name__ == "__main__":
    main()
