"""The recurrence of a diagonal-plus-low-rank system as one loop of a kernel, where nobody wants a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...segments import Segments
from .. import _checks
from .._backend import chosen
from .._eager import free


class Loop(NamedTuple):
    """What the loop needs of the coefficients."""

    table: Tensor
    skip: Tensor | None  # (D,)
    modes: int


def serves(*tensors: Tensor | None) -> bool:
    """Whether tokens, coefficients and state, or those of them that are given, may go through the loop."""
    single = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
    return chosen() is None and free(*tensors) and all(t is None or t.dtype in single for t in tensors)


def prepare(w: Tensor, p: Tensor, b: Tensor, c: Tensor, D: Tensor | None) -> Loop:
    from . import loop_numba

    return Loop(loop_numba.prepare(w, p, b, c), D, w.shape[1])


def run(loop: Loop, u: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
    """`ops.dplr_ssm`: u (B, L, D) -> y (B, L, D) in its dtype, and the state after it (B, D, N), complex64.

    The state of the loop is in float64.
    """
    from . import loop_numba

    if state is not None:
        _checks.shape("dplr_ssm", "state", state, ("B", "D", "N"), {"B": len(u), "D": u.shape[2], "N": loop.modes})
    _checks.segments("dplr_ssm", seg, len(u), u.shape[1], u.device)
    v, marks = (u, None) if seg is None else (seg.mask(u), seg.marks)
    y, last = loop_numba.run(loop.table, v, state, marks, loop.modes)
    return (y if loop.skip is None else y + loop.skip * v).to(u.dtype), last
