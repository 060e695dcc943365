"""The Triton kernels against plain PyTorch, in Triton's interpreter, in a fresh process.

`TRITON_INTERPRET` is read when the kernels are defined, and other tests have imported them by now.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

COMMON = """
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
from qwen_scope_lens.saes.exact import certified, dots, encoder, kernels, pairs, topk
from qwen_scope_lens.saes.exact.encoder import Encoder
"""

PAIRS = """
for dtype in (torch.float32, torch.bfloat16):
    x, rows = torch.randn(9, 700), torch.randn(300, 700).to(dtype)
    token, feature = torch.randint(0, 9, (40,)), torch.randint(0, 300, (40,), dtype=torch.int32)
    want = (x[token].double() * rows[feature.long()].double()).sum(1)
    found = kernels.pair_dots(rows, x, token, feature)
    torch.testing.assert_close(found, want.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(kernels.pair_dots(rows, x, token[7:9], feature[7:9]), found[7:9])
assert kernels.pair_dots(rows, x, token[:0], feature[:0]).shape == (0,)
"""

ENCODE = """
# Every branch that a GPU would take. The rounded product is torch's own, and so is its device.
kernels.available = lambda device: True
for module in (certified, dots, encoder, pairs):
    module.on_cpu = lambda tensor: False
for mean in (0, 5):
    shift = mean * torch.randn(48)
    rows = torch.randn(512, 48) / 7
    x, bias = torch.randn(33, 48) + shift, 0.1 * torch.randn(512) - rows @ shift
    for dtype in (torch.float32, torch.bfloat16):
        encoder = Encoder(rows.to(dtype), bias.to(dtype))
        want = topk.exact_topk(x.to(dtype), encoder.rows, encoder.bias, 10)
        for precision in (torch.float32, torch.bfloat16):
            values, indices = topk.encode_topk(x.to(dtype), encoder, 10, precision)
            assert torch.equal(indices.sort(1).values, want[1].sort(1).values.int())
            torch.testing.assert_close(values, want[0], rtol=1e-5, atol=1e-5)
        assert encoder.settled["float64"] == 0, encoder.settled
"""

DECODE = """
from qwen_scope_lens.saes.exact.gather import gather_decode
kernels.available = lambda device: True
for dtype in (torch.float32, torch.bfloat16):
    rows = torch.randn(300, 700).to(dtype)
    values, indices = torch.rand(9, 7), torch.randint(0, 300, (9, 7), dtype=torch.int32)
    weight, grads = torch.randn(9, 700), []
    for decode in (gather_decode, lambda v, i, w: (v[..., None] * w[i.long()].float()).sum(1)):
        leaf = values.clone().requires_grad_()
        out = decode(leaf, indices, rows)
        (out.float() * weight).sum().backward()
        grads.append((out.float(), leaf.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance * 20)
assert kernels.decode(values[:0], indices[:0], rows).shape == (0, 700)
"""


def test_in_the_interpreter() -> None:
    script = COMMON + PAIRS + ENCODE + DECODE
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
