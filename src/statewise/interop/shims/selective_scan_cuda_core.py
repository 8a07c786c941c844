"""The compiled extension of VMamba: the selective scan without a gate, in its first form."""

from __future__ import annotations

from torch import Tensor

from . import selective_scan_cuda
from ._missing import missing

__all__ = ["bwd", "fwd"]

__getattr__ = missing(__name__)


def fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, nrows: int = 1,
) -> list[Tensor]:  # fmt: skip
    """[y, x] as `selective_scan_cuda.fwd`; `nrows` tunes the original and has no effect."""
    return selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dout: Tensor, x: Tensor | None, delta_softplus: bool, nrows: int = 1,
) -> list[Tensor | None]:  # fmt: skip
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    return selective_scan_cuda.bwd(u, delta, A, B, C, D, None, delta_bias, dout, x, None, None, delta_softplus, False)
