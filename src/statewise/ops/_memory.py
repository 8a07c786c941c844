"""Memory for large results, kept when a result is gone and used for the next one of the same size.

The system zeroes each page of new memory when it is first written, and a processor fetches a line before it writes it:
for a kernel that waits for memory, new memory costs twice what the kernel costs. PyTorch keeps memory on a GPU for this
reason; on CPU it does not.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch.utils import deterministic

# The setting is an attribute that torch makes by replacing the module's class: mypy must not look.
_torch: Any = deterministic

_SMALL = 4 << 20  # bytes; the C library itself keeps memory of smaller results
_LARGE = 8 * 2**20  # bytes; worth asking for large pages: 50 MB were written first in 2.4 ms instead of 9.6
_PAGE = 2 * 2**20
_MADV_HUGEPAGE = 14


def _advice() -> Callable[[int, int], None] | None:
    """A function that asks Linux for large pages, if this is Linux."""
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda start, size: madvise(start, size, _MADV_HUGEPAGE)


_advise = _advice()


def _limit() -> int:
    """Bytes to keep at most: STATEWISE_KEEP_MB, or a sixteenth of the machine's memory, but no more than 1 GB."""
    told = os.environ.get("STATEWISE_KEEP_MB")
    if told is not None:
        if not told.isascii() or not told.isdigit():
            raise ValueError(f"environment variable STATEWISE_KEEP_MB: want a number of megabytes, got {told!r}")
        return int(told) << 20
    try:
        # A container may have less than the machine.
        return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16, 1 << 30)
    except (AttributeError, ValueError, OSError):  # Windows
        return 1 << 29


class Recycler:
    """Blocks of memory that were used and are free again.

    Args:
        limit: bytes of free blocks that are kept; the block that waited longest is given back first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free: list[np.ndarray] = []
        self._lent: dict[int, tuple[weakref.ref, np.ndarray]] = {}
        # Reentrant: freeing a result, which may happen anywhere, even while this lock is held, comes back here.
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """Bytes of free blocks."""
        with self._lock:
            return sum(block.size for block in self._free)

    def take(self, size: int) -> np.ndarray:
        """An array of `size` bytes, not initialised. When nothing refers to it any more, its memory is free."""
        block = self._block(size)
        lent = block[:]
        reference = weakref.ref(lent, self._returned)
        with self._lock:
            self._lent[id(reference)] = reference, block
        return lent

    def _block(self, size: int) -> np.ndarray:
        with self._lock:
            # The last that came back is the likeliest to be in a cache.
            for i in reversed(range(len(self._free))):
                # Collecting garbage in this loop may come back here and give blocks away.
                if i < len(self._free) and self._free[i].size == size:
                    return self._free.pop(i)
        block = np.empty(size, np.uint8)
        if size >= _LARGE and _advise is not None:
            start = -(-block.ctypes.data // _PAGE) * _PAGE
            _advise(start, (block.ctypes.data + size - start) // _PAGE * _PAGE)
        return block

    def _returned(self, reference: weakref.ref) -> None:
        with self._lock:
            self._free.append(self._lent.pop(id(reference))[1])
            total = sum(block.size for block in self._free)
            while total > self.limit and self._free:
                total -= self._free.pop(0).size

    def clear(self) -> None:
        """Give all free blocks back to the system."""
        with self._lock:
            self._free.clear()


_recycler = Recycler(_limit())


def _after_fork() -> None:
    # Another thread may have held the lock. What is lent lives on with its tensors, and does not come back.
    global _recycler
    _recycler._lent.clear()
    _recycler = Recycler(_recycler.limit)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An uninitialised tensor on CPU; a large one on memory of an earlier result, where there is one of this size."""
    size = prod(shape) * dtype.itemsize
    # Where PyTorch fills new memory, the one asking wants to see what is not written.
    if size < _SMALL or (_torch.fill_uninitialized_memory and torch.are_deterministic_algorithms_enabled()):
        return torch.empty(shape, dtype=dtype)
    memory = torch.from_numpy(_recycler.take(size)).untyped_storage()
    # Not a view of another tensor, which autograd would have to know of.
    return torch.empty(0, dtype=dtype).set_(memory, 0, shape, _dense(shape))


def _dense(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return strides[::-1]


def empty_cache() -> None:
    """Give memory that is kept for the results of kernels on CPU back to the system."""
    _recycler.clear()
