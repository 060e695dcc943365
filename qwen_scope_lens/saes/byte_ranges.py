"""Where each tensor's bytes lie in a checkpoint file, for readers that must not map all of it.

Mapping is enough for use; copying gigabytes through a mapping makes the process look (and on a
small machine be) as large as the file. Reading known byte ranges does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_scope_lens.errors import WrongKeys, WrongShape
from qwen_scope_lens.saes.pt_archive import Unknown, stored_tensors

__all__ = ["Extent", "extents"]

_SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Extent:
    """A row-major tensor inside a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read_tile(
        self, fd: int, rows: slice, columns: slice, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A rectangle of a matrix, read straight from the file. `into`: a buffer to reuse."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        buffer = torch.empty(height * width, dtype=self.dtype) if into is None else into
        tile = buffer[: height * width]
        data = tile.view(torch.uint8).numpy().data.cast("B")
        size, stride = width * self.dtype.itemsize, self.shape[1] * self.dtype.itemsize
        start = self.offset + rows.start * stride + columns.start * self.dtype.itemsize
        if size == stride:
            _pread(fd, data, start)
        else:
            for row in range(height):
                _pread(fd, data[row * size : (row + 1) * size], start + row * stride)
        return tile.view(height, width)

    def read_rows(self, fd: int, rows: Sequence[int]) -> torch.Tensor:
        """`[m] -> [m, width]`"""
        whole = slice(0, self.shape[1])
        found = [self.read_tile(fd, slice(row, row + 1), whole) for row in rows]
        return torch.cat([torch.empty((0, self.shape[1]), dtype=self.dtype), *found])

    def read_columns(self, fd: int, columns: Sequence[int]) -> torch.Tensor:
        """`[m] -> [m, height]`: one number from each row, so the disk reads a page for it."""
        out = torch.empty((len(columns), self.shape[0]), dtype=self.dtype)
        size, stride = self.dtype.itemsize, self.shape[1] * self.dtype.itemsize
        data = bytearray(size * self.shape[0])
        for into, column in zip(out, columns, strict=True):
            start = self.offset + column * size
            for row in range(self.shape[0]):
                data[row * size : (row + 1) * size] = os.pread(fd, size, start + row * stride)
            into.copy_(torch.frombuffer(data, dtype=self.dtype))
        return out


def extents(path: Path, names: Iterable[str]) -> dict[str, Extent]:
    """The extents of some tensors of a valid `.pt` or safetensors checkpoint."""
    read = _of_safetensors if path.suffix == ".safetensors" else _of_pt
    return read(path, set(names))


def _of_safetensors(path: Path, names: set[str]) -> dict[str, Extent]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: Extent(
            8 + length + entry["data_offsets"][0],
            tuple(entry["shape"]),
            _SAFETENSORS_DTYPES[entry["dtype"]],
        )
        for name, entry in header.items()
        if name in names
    }


def _of_pt(path: Path, names: set[str]) -> dict[str, Extent]:
    try:
        tensors = stored_tensors(path)
    except Unknown as error:
        raise WrongKeys(f"{path} holds {error}: expected a dict of tensors by name") from error
    found = {}
    for name in names:
        tensor = tensors[name] if isinstance(tensors, dict) else tensors
        if not tensor.is_contiguous:
            raise WrongShape(
                f"{path}: {name} is stored as a strided view; save it once more with .contiguous()"
            )
        found[name] = Extent(tensor.offset, tensor.shape, tensor.dtype)
    return found


def _pread(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.preadv(fd, [data], offset)
        if count == 0:
            raise EOFError("the file ended while it was being read: was it replaced?")
        data, offset = data[count:], offset + count
