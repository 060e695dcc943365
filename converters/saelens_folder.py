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
ROWS, COLUMNS = 1024, 4096  # of a tile in the target, which has 16 MB in float32
FLUSH = 2**28  # this many bytes are sent to the disk at a time
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
    with path.open("wb") as target, source.open("rb") as read, ThreadPoolExecutor(1) as pool:
        target.write(len(text).to_bytes(8, "little") + text)
        target.flush()
        os.posix_fallocate(target.fileno(), 0, base + end)  # fails now if the disk is too full
        flushed = _Flusher(target.fileno(), pool)

        def finished(place: int) -> None:
            reached(place)
            flushed.reach(place)

        for name, tensor in wanted.items():
            place = base + header[name]["data_offsets"][0]
            if tensor.ndim == 1:
                rounded = tensor.to(dtype)
                _check_range(rounded, dtype)
                _pwrite(target.fileno(), _bytes_of(rounded), place)
                finished(base + header[name]["data_offsets"][1])
            else:
                matrix = _Matrix(stored[name], transposed=not tensor.is_contiguous())
                matrix.copy(read.fileno(), target.fileno(), place, dtype, progress, finished)
        flushed.wait()
        os.fsync(target.fileno())


class _Flusher:
    """Sends a file to the disk while it is written, so that little is left for the end."""

    def __init__(self, fd: int, pool: ThreadPoolExecutor) -> None:
        self._fd, self._pool, self._end = fd, pool, 0
        self._flushes: list[Future[None]] = []

    def reach(self, end: int) -> None:
        """Everything before byte `end` is written."""
        if end - self._end >= FLUSH:
            self._flushes.append(self._pool.submit(os.fdatasync, self._fd))
            self._end = end

    def wait(self) -> None:
        """Raise what went wrong, which the system says only once."""
        for flush in self._flushes:
            flush.result()


class _Matrix:
    """A matrix that is copied from one file to another."""

    def __init__(self, extent: Extent, transposed: bool) -> None:
        self.extent, self.transposed = extent, transposed

    def copy(
        self,
        source: int,
        target: int,
        place: int,
        dtype: torch.dtype,
        progress: Progress,
        finished: Callable[[int], None],
    ) -> None:
        """Copy tile by tile. Each is read in short runs, transposed in memory, written in runs.

        The rows of the target are finished from the first to the last.
        """
        shape = self.extent.shape
        height, width = reversed(shape) if self.transposed else shape
        row_bytes = width * dtype.itemsize
        read_buffer = torch.empty(ROWS * COLUMNS, dtype=self.extent.dtype)
        write_buffer = torch.empty(ROWS * COLUMNS, dtype=dtype)
        for top in range(0, height, ROWS):
            rows = slice(top, min(top + ROWS, height))
            for left in range(0, width, COLUMNS):
                columns = slice(left, min(left + COLUMNS, width))
                if self.transposed:
                    tile = self.extent.read_tile(source, columns, rows, into=read_buffer).T
                else:
                    tile = self.extent.read_tile(source, rows, columns, into=read_buffer)
                turned = write_buffer[: tile.numel()].view(tile.shape).copy_(tile)
                _check_range(turned, dtype)
                data, run = _bytes_of(turned), turned.shape[1] * dtype.itemsize
                run = len(data) if run == row_bytes else run  # whole rows follow each other
                start = place + top * row_bytes + left * dtype.itemsize
                for row in range(len(data) // run):
                    _pwrite(target, data[row * run : (row + 1) * run], start + row * row_bytes)
                progress(len(data))
            finished(place + rows.stop * row_bytes)


def _check_range(rounded: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and not rounded.isfinite().all():
        raise NotFinite("the weights overflow float16: convert to bfloat16 or float32")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
