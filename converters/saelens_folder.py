"""Write a SAELens folder from a checkpoint of any size in bounded memory.

The converters share this module. It writes into the folder that it is given; their callers use
`files.whole_folder`, so that the folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qwen_scope_lens.errors import NotFinite
from qwen_scope_lens.files import file_sha256
from qwen_scope_lens.saes.byte_ranges import Extent, extents
from qwen_scope_lens.saes.checkpoint import SAETensors, open_layer
from qwen_scope_lens.saes.locate import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, LayerFile

__all__ = ["HASHES_NAME", "write_saelens_folder"]

HASHES_NAME = "SHA256SUMS"  # as `sha256sum --check` reads it
PAGE = 4096
TILE = 2048  # a float32 tile is 16 MB, and its runs are two pages long
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Progress = Callable[[int], object]  # it is called with the bytes written since the last call


def write_saelens_folder(
    folder: Path,
    source: LayerFile,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    progress: Progress = lambda count: None,
) -> None:
    """Write `cfg.json`, `sae_weights.safetensors` and their hashes, for `SAE.load_from_disk`.

    The source is validated and then copied tile by tile, so memory does not grow with its size. Its
    own hash (the one that the hub shows) is computed during the copying and kept in the metadata.
    """
    tensors = open_layer(source)
    weights = folder / SAE_WEIGHTS_FILENAME
    with ThreadPoolExecutor(1) as pool:
        source_hash = pool.submit(file_sha256, source.path)
        weights_hash = _Follower(weights, pool)
        write_safetensors(weights, source.path, tensors, dtype, progress, weights_hash.reach)
        metadata = {
            **config["metadata"],
            "source_file": source.path.name,
            "source_sha256": source_hash.result(),
        }
        text = json.dumps({**config, "metadata": metadata}, indent=2)
        (folder / SAE_CFG_FILENAME).write_text(text, encoding="utf-8")
        hashes = {
            SAE_CFG_FILENAME: hashlib.sha256(text.encode()).hexdigest(),
            SAE_WEIGHTS_FILENAME: weights_hash.hexdigest(),
        }
    lines = [f"{digest}  {name}\n" for name, digest in hashes.items()]
    (folder / HASHES_NAME).write_text("".join(lines), encoding="utf-8")


class _Follower:
    """Hashes a file while it is written: another thread reads each piece once it is finished."""

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self._path, self._pool = path, pool
        self._hash, self._end = hashlib.sha256(), 0
        self._pieces: list[Future[None]] = []

    def reach(self, end: int) -> None:
        """Hash up to byte `end`: everything before it is written."""
        self._pieces.append(self._pool.submit(self._read, self._end, end))
        self._end = end

    def hexdigest(self) -> str:
        """Wait for all pieces and return the hash."""
        for piece in self._pieces:
            piece.result()
        return self._hash.hexdigest()

    def _read(self, start: int, end: int) -> None:
        with self._path.open("rb") as file:
            file.seek(start)
            while start < end:
                data = file.read(min(2**20, end - start))
                self._hash.update(data)
                start += len(data)


def write_safetensors(
    path: Path,
    source: Path,
    tensors: SAETensors,
    dtype: torch.dtype,
    progress: Progress,
    reached: Callable[[int], None],
) -> None:
    wanted = {name: getattr(tensors, name) for name in ("W_dec", "W_enc", "b_dec", "b_enc")}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in wanted.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)  # the data begins on a page
    base, stored = 8 + len(text), extents(source, ("W_dec", "W_enc"))
    with path.open("wb") as target, source.open("rb") as read:
        target.write(len(text).to_bytes(8, "little") + text)
        target.flush()
        os.posix_fallocate(target.fileno(), 0, base + end)  # fails now if the disk is too full
        for name, tensor in wanted.items():
            place = base + header[name]["data_offsets"][0]
            if tensor.ndim == 1:
                rounded = tensor.to(dtype)
                _check_range(rounded, dtype)
                _pwrite(target.fileno(), _bytes_of(rounded), place)
            else:
                matrix = _Matrix(stored[name], transposed=not tensor.is_contiguous())
                matrix.copy(read.fileno(), target.fileno(), place, dtype, progress)
            reached(base + header[name]["data_offsets"][1])
        os.fsync(target.fileno())


class _Matrix:
    """A matrix that is copied from one file to another."""

    def __init__(self, extent: Extent, transposed: bool) -> None:
        self.extent, self.transposed = extent, transposed

    def copy(
        self, source: int, target: int, place: int, dtype: torch.dtype, progress: Progress
    ) -> None:
        """Copy tile by tile. Each is read in short runs, transposed in memory, written in runs."""
        height, width = self.extent.shape
        row_bytes = (height if self.transposed else width) * dtype.itemsize
        read_buffer = torch.empty(TILE * TILE, dtype=self.extent.dtype)
        write_buffer = torch.empty(TILE * TILE, dtype=dtype)
        for top in range(0, height, TILE):
            rows = slice(top, min(top + TILE, height))
            for left in range(0, width, TILE):
                columns = slice(left, min(left + TILE, width))
                tile = self.extent.read_tile(source, rows, columns, into=read_buffer)
                first, at = top, left
                if self.transposed:
                    tile, first, at = tile.T, left, top
                turned = write_buffer[: tile.numel()].view(tile.shape).copy_(tile)
                _check_range(turned, dtype)
                data, run = _bytes_of(turned), turned.shape[1] * dtype.itemsize
                start = place + first * row_bytes + at * dtype.itemsize
                for row in range(turned.shape[0]):
                    _pwrite(target, data[row * run : (row + 1) * run], start + row * row_bytes)
                progress(len(data))


def _check_range(rounded: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and not rounded.isfinite().all():
        raise NotFinite("the weights overflow float16: convert to bfloat16 or float32")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
