"""Writing SAELens folders: streamed in bounded memory, whole or not at all, hashed.

Shared by the converters; knows the two file formats' bytes and nothing of where sources come from.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from qwen_scope_lens.errors import CannotWrite
from qwen_scope_lens.saes.checkpoint import SAETensors

__all__ = ["HASHES_NAME", "PARTIAL_SUFFIX", "exclusive", "file_sha256", "whole_folder", "write_saelens_folder"]

HASHES_NAME = "SHA256SUMS"  # readable by `sha256sum --check`
PARTIAL_SUFFIX = ".partial"
BLOCK_BYTES = 16 * 2**20
PAGE = 4096
MADV_PAGEOUT = 21  # Linux 5.4 and later
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """One writer for a folder. The lock goes with the process, so a killed one leaves none."""
    lock = target / ".lock"
    with _named_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CannotWrite(
                f"another process is converting into {target}: wait for it, or choose another folder"
            ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it is written."""
    partial = folder.with_name(f".{folder.name}{PARTIAL_SUFFIX}")
    with _named_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir(parents=True)
        try:
            yield partial
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _named_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(
            f"cannot write {target}: {error.strerror or error}. Nothing is left under that name and"
            " what was finished before stays; make room or choose another --out, then run the same"
            " command again"
        ) from error


def write_saelens_folder(
    folder: Path,
    tensors: SAETensors,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    source: Path,
) -> None:
    """`cfg.json`, `sae_weights.safetensors` and their hashes, as `SAE.load_from_disk` reads them.

    The matrices may be views of a file of any size: they are read block by block, each once, in
    the order of their rows in that file, and its pages are given back at once. The source's own
    hash (the one that the hub shows) is computed beside the copying and kept in the metadata.
    """
    with ThreadPoolExecutor(1) as pool:
        source_hash = pool.submit(file_sha256, source)
        weights = folder / SAE_WEIGHTS_FILENAME
        _write_safetensors(weights, tensors, dtype)
        weights_hash: Future[str] = pool.submit(file_sha256, weights)
        metadata = {
            **config["metadata"],
            "source_file": source.name,
            "source_sha256": source_hash.result(),
        }
        text = json.dumps({**config, "metadata": metadata}, indent=2)
        (folder / SAE_CFG_FILENAME).write_text(text, encoding="utf-8")
        hashes = {
            SAE_CFG_FILENAME: hashlib.sha256(text.encode()).hexdigest(),
            SAE_WEIGHTS_FILENAME: weights_hash.result(),
        }
        lines = [f"{digest}  {name}\n" for name, digest in hashes.items()]
        (folder / HASHES_NAME).write_text("".join(lines), encoding="utf-8")


def _write_safetensors(path: Path, tensors: SAETensors, dtype: torch.dtype) -> None:
    named = {name: getattr(tensors, name) for name in ("W_dec", "W_enc", "b_dec", "b_enc")}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in named.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)  # the data begins on a page: views stay aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        base = 8 + len(text)
        os.truncate(file.fileno(), base + end)
        for name, tensor in named.items():
            _write_tensor(file.fileno(), base + header[name]["data_offsets"][0], tensor, dtype)
        os.fsync(file.fileno())


def _write_tensor(fd: int, offset: int, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Row-major at `offset`, whatever the strides: sequential reads, strided writes if transposed."""
    if tensor.ndim == 1:
        _pwrite(fd, _bytes_of(tensor.to(dtype)), offset)
    elif tensor.is_contiguous():
        rows = max(1, BLOCK_BYTES // (tensor.shape[1] * tensor.element_size()))
        for start in range(0, tensor.shape[0], rows):
            block = tensor[start : start + rows]
            at = offset + start * tensor.shape[1] * dtype.itemsize
            _pwrite(fd, _bytes_of(block.to(dtype)), at)
            _give_back_pages(block)
    else:
        stored = tensor.T  # row-major in the source: [columns of the target, rows of the target]
        columns = max(1, BLOCK_BYTES // (stored.shape[1] * stored.element_size()))
        row_bytes = tensor.shape[1] * dtype.itemsize
        for start in range(0, stored.shape[0], columns):
            block = stored[start : start + columns]
            strip = block.to(dtype).T.contiguous()  # [rows of the target, columns in this block]
            _give_back_pages(block)
            at = offset + start * dtype.itemsize
            data, width = _bytes_of(strip), strip.shape[1] * dtype.itemsize
            for row in range(strip.shape[0]):
                _pwrite(fd, data[row * width : (row + 1) * width], at + row * row_bytes)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _give_back_pages(block: torch.Tensor) -> None:
    """Tell the kernel that these mapped pages are not needed soon, so that memory stays bounded.
    A hint that never changes contents; where it is not understood or not allowed, nothing happens."""
    start = -(-block.data_ptr() // PAGE) * PAGE
    end = (block.data_ptr() + block.numel() * block.element_size()) // PAGE * PAGE
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if end > start and madvise is not None:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
