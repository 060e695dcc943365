"""Find where each tensor's bytes are in a checkpoint file, and read only those.

To use an SAE it is enough to map its file into memory. Copying gigabytes through a mapping,
however, makes the process look as large as the file (and on a small machine it is). Reading known
byte ranges does not.

Where the numbers of a `.pt` file are is read from the archive itself and never calculated. torch's
own reader, when it maps a file, takes whatever bytes stand where it expects those of a tensor:
compressed bytes, bytes in another order, or those of the next record. So everything is checked here
before a byte of data is used. The pickle inside is read by an interpreter that knows a dozen names
and calls nothing else.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_scope_lens.errors import (
    CheckpointError,
    NotACheckpoint,
    TruncatedCheckpoint,
    WrongKeys,
    WrongShape,
)
from qwen_scope_lens.files import open_regular

__all__ = ["Extent", "Stored", "Unknown", "extents", "refuse_expanded", "stored_tensors"]

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
        """Read a rectangle of a matrix straight from the file. `into` is a buffer to reuse."""
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
        """Read chosen rows. `[m] -> [m, width]`"""
        whole = slice(0, self.shape[1])
        found = [self.read_tile(fd, slice(row, row + 1), whole) for row in rows]
        return torch.cat([torch.empty((0, self.shape[1]), dtype=self.dtype), *found])

    def read_columns(self, fd: int, columns: Sequence[int]) -> torch.Tensor:
        """Read chosen columns. `[m] -> [m, height]`

        Each number is in another row of the file, so the disk reads a page for each.
        """
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
    """Where some tensors of a valid `.pt` or safetensors checkpoint are in its file, by name."""
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


_LOCAL = 30
"""The length of a zip entry's local header before the entry's name, in bytes."""

_PICKLE_BYTES = 2**24

_AGAIN = "torch.save(torch.load(path, weights_only=True), path)"

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a `.pt` file. Its numbers begin at byte `offset` of the file."""

    offset: int
    record: tuple[int, int]  # the first byte and the size of the record that contains it
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_contiguous(self) -> bool:
        """Whether the numbers follow each other in row-major order."""
        size = 1
        for length, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and stride != size:
                return False
            size *= length
        return True

    def view(self, file: torch.UntypedStorage) -> torch.Tensor:
        """The tensor, as a view of the mapped file.

        It is a copy where the numbers do not begin at a multiple of their own size.
        """
        start, size = self.record
        storage = file[start : start + size] if size else torch.UntypedStorage(0)
        first = (self.offset - start) // self.dtype.itemsize
        tensor = torch.empty(0, dtype=self.dtype, device="cpu")
        tensor.set_(storage, first, self.shape, self.stride)
        return tensor.clone() if start % self.dtype.itemsize else tensor


class Unknown(Exception):
    """The pickle does not hold a tensor or a dict of tensors."""


def stored_tensors(path: Path) -> Stored | dict[str, Stored]:
    """The single tensor of a torch zip checkpoint, or its tensors by name.

    Anything else in it raises `Unknown`. A record that cannot be used as it is, and a tensor that
    reaches beyond its record, are refused with the name of the record.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return _read(path, file, archive)
    except (CheckpointError, Unknown):
        raise
    except Exception as error:  # a damaged archive fails in as many ways as it has bytes
        raise NotACheckpoint(f"{path} cannot be read as a torch checkpoint: {error}") from error


def refuse_expanded(path: Path, name: str, tensor: torch.Tensor | Stored, numbers: int) -> None:
    """Raise when a tensor claims more numbers than the file stores for it."""
    claimed = math.prod(tensor.shape)
    strides = tensor.stride if isinstance(tensor, Stored) else tensor.stride()
    repeats = any(n > 1 and s == 0 for n, s in zip(tensor.shape, strides, strict=True))
    if claimed and (claimed > numbers or repeats):
        raise WrongShape(
            f"{path}: {name} claims {' x '.join(map(str, tensor.shape))} numbers, but the file"
            f" holds {numbers:,} for it: a stored number stands for many. Save it .contiguous()"
        )


def _read(path: Path, file: Any, archive: zipfile.ZipFile) -> Stored | dict[str, Stored]:
    records: dict[str, tuple[int, int]] = {}
    whole = path.stat().st_size
    for entry in archive.infolist():
        if entry.filename in records:
            raise NotACheckpoint(f"{path} holds two records {entry.filename}: fetch it again")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise NotACheckpoint(
                f"{path}: the record {entry.filename} is compressed or encrypted. torch.save never"
                f" writes such a record, and it cannot be mapped: write the file again, {_AGAIN}"
            )
        file.seek(entry.header_offset)
        header = file.read(_LOCAL)
        if header[:4] != b"PK\x03\x04":
            raise NotACheckpoint(f"{path}: there is no record where {entry.filename} should begin")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL + names
        if start + entry.file_size > whole:
            raise TruncatedCheckpoint(f"{path} ends within {entry.filename}: fetch it again")
        records[entry.filename] = (start, entry.file_size)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise NotACheckpoint(
            f"{path} is a zip file, but not a torch checkpoint: it has no data.pkl"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in records:
        order = archive.read(f"{folder}byteorder")
        if order != sys.byteorder.encode():
            raise NotACheckpoint(
                f"{path} was written in byte order {order[:9]!r}, this machine reads"
                f" {sys.byteorder}: write it again here, {_AGAIN}"
            )
    if records[pickles[0]][1] > _PICKLE_BYTES:
        raise Unknown(f"a data.pkl of {records[pickles[0]][1]:,} bytes")
    try:
        found = _Reader(path, records, folder, archive.read(pickles[0])).load()
    except CheckpointError:
        raise
    except Exception as error:  # torch's own reader says what is wrong with it
        raise Unknown(str(error)) from error
    if isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(value, Stored) for name, value in found.items()
    ):
        return found
    if isinstance(found, Stored):
        return found
    raise Unknown(type(found).__name__)


class _Reader(pickle._Unpickler):
    """An unpickler in Python: the one in C reserves as much memory as a file asks for."""

    def __init__(
        self, path: Path, records: dict[str, tuple[int, int]], folder: str, data: bytes
    ) -> None:
        super().__init__(io.BytesIO(data))
        self.path, self.records, self.folder = path, records, folder

    def find_class(self, module: str, name: str) -> Callable[..., Any] | torch.dtype:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        raise Unknown(f"{module}.{name}")

    def persistent_load(self, saved: Any) -> tuple[str, torch.dtype, int, int]:
        kind, dtype, key, _, count = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise Unknown(kind)
        name = f"{self.folder}data/{key}"
        if name not in self.records:
            raise NotACheckpoint(f"{self.path}: the record {name} is missing: fetch it again")
        start, size = self.records[name]
        if not _whole(count) or size != count * dtype.itemsize:
            raise NotACheckpoint(
                f"{self.path}: the record {name} has {size:,} bytes, but data.pkl says"
                f" {count!r:.40} numbers of {dtype}: the file contradicts itself, fetch it again"
            )
        return name, dtype, start, size

    def tensor(self, storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> Stored:
        name, dtype, start, size = storage
        if not (
            isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
        ):
            raise Unknown("a tensor's shape")
        if not all(map(_whole, (first, *shape, *stride))):
            raise Unknown("a tensor's shape")
        numbers = size // dtype.itemsize - first
        place = Stored(start + first * dtype.itemsize, (start, size), shape, stride, dtype)
        refuse_expanded(self.path, name, place, max(0, numbers))
        last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= numbers:
            raise WrongShape(
                f"{self.path}: {name} holds {max(0, numbers):,} numbers, but a tensor of shape"
                f" {shape} reaches to number {last + 1:,}: the file contradicts itself"
            )
        return place


def _whole(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**62
