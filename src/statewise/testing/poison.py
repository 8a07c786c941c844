"""Fill uninitialised memory with NaN, so that an output that a kernel forgets to write cannot hide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic

# The setting is an attribute that torch makes by replacing the module's class: mypy must not look.
_torch: Any = deterministic


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside the block `torch.empty`, `empty_like`, `new_empty` ... give NaN (integers their largest value).

    NumPy's functions are left alone: Numba knows them by identity, and a kernel first compiled inside the block would
    not compile. Kernels get their outputs from torch.
    """
    fill, mode = _torch.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    # torch fills new memory only while deterministic algorithms are asked for; "warn" keeps it from refusing any.
    torch.set_deterministic_debug_mode("warn")
    _torch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        _torch.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)
