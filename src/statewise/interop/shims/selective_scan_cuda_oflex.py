"""The compiled extension of VMamba: the selective scan without a gate, whose output may be float32."""

from __future__ import annotations

from torch import Tensor

from ...ops._checks import compute_dtype
from . import selective_scan_cuda_core
from ._missing import missing
from .selective_scan_cuda_core import bwd

__all__ = ["bwd", "fwd"]

__getattr__ = missing(__name__)


def fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, nrows: int = 1, out_float: bool = True,
) -> list[Tensor]:  # fmt: skip
    """[y, x] as `selective_scan_cuda_core.fwd`; with `out_float` y is float32 (rounded nowhere on the way)."""
    u = u.to(compute_dtype(u)) if out_float else u
    return selective_scan_cuda_core.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)
