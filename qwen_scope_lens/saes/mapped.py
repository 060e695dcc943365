"""Give the pages of a mapped weight back after its turn. They are read again at the next use.

A weight that is a view of a file counts as memory of the process from the moment it is read, and
stays there until the system needs the room. Where several SAEs take turns, only the pages of one of
them are needed at a time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache
from typing import Any

import numpy as np
import torch

__all__ = ["WORTH", "give_back"]

WORTH = 16 * 2**20
"""Weights of fewer bytes keep their pages."""

_PRESENT, _SWAPPED, _OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
"""What Linux's /proc/self/pagemap says of a page."""

_DONTNEED = 4
"""Linux's MADV_DONTNEED: a page of a file is mapped again at the next use, any other is lost."""


def give_back(weight: torch.Tensor) -> int:
    """Give the pages of a mapped weight back to the system, and return how many bytes those were.

    All pages stay, and the result is 0, if one of them is not the file's own: the weight is a copy
    in memory, or something was written to it. So no number ever changes. All pages stay on other
    systems than Linux, too. No other thread may write to the weight meanwhile.
    """
    dense = weight.is_contiguous() or weight.T.is_contiguous()
    if weight.device.type != "cpu" or not dense or weight.nbytes < WORTH:
        return 0
    first = -(-weight.data_ptr() // mmap.PAGESIZE)
    count = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE - first
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            pages = np.frombuffer(os.pread(file.fileno(), 8 * count, 8 * first), dtype=np.uint64)
    except OSError:
        return 0
    present = (pages & _PRESENT) != 0
    mine = (present & ((pages & _OF_A_FILE) == 0)) | ((pages & _SWAPPED) != 0)
    if len(pages) != count or mine.any():
        return 0
    place = (ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE))
    if _libc().madvise(*place, _DONTNEED) != 0:
        return 0
    return int(present.sum()) * mmap.PAGESIZE


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
