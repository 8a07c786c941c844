"""Whether a call is only a computation: nothing records, traces or replaces it.

Then a kernel can be called right away. The way through torch.library costs 10 to 30 microseconds, as much as a small
kernel itself, and a decoded token makes hundreds of calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._tracing import untraced
from . import _deterministic
from ._backend import chosen

_PLAIN = (Tensor, torch.nn.Parameter)


def plain(*args: Any) -> bool:
    """True if the tensors among `args` are ordinary ones on CPU."""
    return all(not isinstance(t, Tensor) or (type(t) in _PLAIN and t.is_cpu) for t in args)


def direct(*args: Any) -> bool:
    """True if the tensors among `args` are ordinary ones on CPU, none of them wants a gradient, and no mode or
    transform of PyTorch is active."""
    if not untraced() or torch._C._len_torch_function_stack() > 0:
        return False
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
        return False
    return plain(*args)


def free(*args: Any) -> bool:
    """`direct`, and nobody asked for other numbers: no autocast, no other back-end, no fixed order of additions."""
    return (
        not torch.is_autocast_enabled("cpu")
        and chosen() in (None, "numba")
        and not _deterministic.active()
        and direct(*args)
    )
