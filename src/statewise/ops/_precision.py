"""Keeping recurrences of long memory out of half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ._checks import compute_dtype


def widen(t: Tensor) -> Tensor:
    """`t` in the dtype in which recurrences run: float32 for half precision, otherwise its own."""
    return t.to(compute_dtype(t))


def no_autocast(t: Tensor) -> AbstractContextManager:
    """Autocast off on the device of `t`: it would run the matrix products of a recurrence in half precision."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
