"""SparseCodes behave as the dense tensors that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen_scope_lens.saes import SparseCodes


@pytest.fixture
def codes() -> SparseCodes:
    """`[2, 3]` positions, k=2 of 5; one position has a single feature, one has none."""
    values = [[[3.0, 1], [2, 2], [1, 0]], [[0, 0], [5, 4], [0.5, 0.25]]]
    indices = [[[4, 0], [1, 2], [0, 0]], [[0, 0], [3, 0], [2, 4]]]
    return SparseCodes(torch.tensor(values), torch.tensor(indices), 5)


def test_padding_is_not_feature_zero(codes: SparseCodes) -> None:
    assert codes.l0.tolist() == [[2, 2, 1], [0, 2, 2]]
    assert codes.active[0, 2].tolist() == [True, False]
    assert codes.to_dense()[0, 2].tolist() == [1, 0, 0, 0, 0]
    assert codes.to_dense()[1, 0].count_nonzero() == 0
    assert codes.to_scipy_csr().nnz == int(codes.l0.sum())


def test_dense_and_csr_agree(codes: SparseCodes) -> None:
    dense = codes.to_dense()
    assert dense.shape == (2, 3, 5)
    np.testing.assert_array_equal(codes.to_scipy_csr().toarray(), dense.reshape(6, 5).numpy())
    assert SparseCodes.from_dense(dense, 2) == codes
    assert codes.to_dense(torch.float64).dtype == torch.float64


KEYS = [0, -1, slice(1), (0, 1), (slice(None), 2), (..., 1), ([0, 1], [2, 0]), None, (0, ...), ...]
KEYS += [torch.tensor([[True, False, True], [False, False, True]]), (1, torch.tensor([2, 0]))]


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_slicing_follows_the_positions(codes: SparseCodes, key: Any) -> None:
    has_ellipsis = isinstance(key, tuple) and any(part is ... for part in key)
    dense = codes.to_dense()
    expected = dense[(*key, slice(None))] if has_ellipsis else dense[key]
    assert torch.equal(codes[key].to_dense(), expected)
    assert codes[key].k == codes.k


def test_slicing_never_reaches_k(codes: SparseCodes) -> None:
    with pytest.raises(IndexError, match="too many indices"):
        codes[0, 1, 0]
    with pytest.raises(TypeError, match="no length"):
        len(codes[0, 0])
    assert [len(part) for part in (codes, codes[0])] == [2, 3]


def test_cat(codes: SparseCodes) -> None:
    assert SparseCodes.cat([codes[:1], codes[1:]]) == codes
    joined = SparseCodes.cat([codes, codes], dim=-1)
    assert joined.shape == (2, 6)
    narrow = SparseCodes(codes.values[..., :1], codes.indices[..., :1], 5)
    both = SparseCodes.cat([codes, narrow])
    assert both.k == 2
    assert torch.equal(both[2:].to_dense(), narrow.to_dense())
    other = SparseCodes(codes.values, codes.indices, 9)
    with pytest.raises(ValueError, match=r"d_sae \[5, 9\]"):
        SparseCodes.cat([codes, other])
    with pytest.raises(ValueError, match="nothing to concatenate"):
        SparseCodes.cat([])


def test_mask_empties_and_keeps_the_shape(codes: SparseCodes) -> None:
    keep = torch.tensor([[True, False, True], [True, True, False]])
    masked = codes.mask(keep)
    assert masked.shape == codes.shape
    assert torch.equal(masked.to_dense(), codes.to_dense() * keep[..., None])
    assert masked.l0[~keep].sum() == 0
    with pytest.raises(ValueError, match="positions must be bool"):
        codes.mask(keep[0])


def test_to_equality_repr(codes: SparseCodes) -> None:
    half = codes.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half != codes
    assert codes.to("cpu") == codes
    assert half.to(torch.float32) == codes
    assert codes != "codes"
    assert repr(codes) == "SparseCodes([2, 3], k=2 of 5, float32)"
    assert codes.indices.dtype == torch.int32
    with pytest.raises(TypeError):
        hash(codes)


def test_codes_as_a_frame_and_in_a_notebook(codes: SparseCodes) -> None:
    frame = codes.to_pandas()
    dense = torch.zeros(6, 5)
    for row in frame.itertuples():
        dense[row.position, row.feature] += row.activation
    assert torch.equal(dense, codes.flatten().to_dense())
    assert len(frame) == int(codes.l0.sum())
    assert codes.table(1).more == len(frame) - int(codes.flatten().l0[0])
    html = codes.to(dtype=torch.bfloat16)._repr_html_()
    assert html.count("<span") == len(frame)
    assert "rgba(240,130,30,0.75)" in html
    assert "position 0" not in codes[:0]._repr_html_()
    assert "SparseCodes([], k=2 of 5, float32)" in codes[0, 0]._repr_html_()


def test_empty_batches(codes: SparseCodes) -> None:
    empty = codes[:0]
    assert empty.shape == (0, 3)
    assert empty.to_dense().shape == (0, 3, 5)
    assert empty.to_scipy_csr().shape == (0, 5)
    assert SparseCodes.cat([empty, codes]) == codes


def test_gradients_reach_the_values(codes: SparseCodes) -> None:
    values = codes.values.clone().requires_grad_()
    SparseCodes(values, codes.indices, 5).to_dense().sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, torch.ones_like(values))


def test_from_dense_gives_ties_to_the_lower_feature() -> None:
    codes = SparseCodes.from_dense(torch.tensor([1.0, 2, 2, 2, -1]), 2)
    assert codes.indices.tolist() == [1, 2]


def test_bad_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        SparseCodes(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int32), 5)
    with pytest.raises(ValueError, match="integers"):
        SparseCodes(torch.zeros(2), torch.zeros(2), 5)
