"""Root-mean-square norms, plain and gated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .._backend import numba_reason, resolve, triton_reason
from .._checks import compute_dtype
from .._register import recomputing_kernels

# A row is held in the registers of one program.
_WIDEST = 32768


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, groups: int = 1, *, backend: str | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 for half-precision x.

    Args:
        x: (..., D). weight: (D,). groups: statistics are taken over each of `groups` equal parts of D.
        backend: "numba" (CPU) or "triton" (GPUs), both added up in float32; "reference" or None; see
            `statewise.ops.use_backend`.

    Raises:
        ValueError: `groups` does not divide D.
        BackendError: the back-end asked for cannot serve.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467).
    """
    return _norm("rms_norm", x, None, weight, eps, groups, backend)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """rms_norm(x * silu(z)): the gate comes before the norm, as in Mamba-2. x, z: (..., D)."""
    return _norm("gated_rms_norm", x, z, weight, eps, groups, backend)


def reasons(x: Tensor, z: Tensor | None, weight: Tensor | None, groups: int) -> dict[str, str | None]:
    """For each back-end, None if it serves these inputs and else why not, in order of preference."""
    alike = None
    if z is not None and z.shape != x.shape:
        alike = f"kernels do not broadcast: x is {tuple(x.shape)}, z {tuple(z.shape)}"
    gpu = triton_reason(x, z, weight) or alike
    if gpu is None and x.shape[-1] // groups > _WIDEST:
        gpu = f"Triton kernels hold a row of {_WIDEST} numbers at most, got {x.shape[-1] // groups}"
    return {"numba": numba_reason(x, z, weight) or alike, "triton": gpu, "reference": None}


def _norm(
    op: str, x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int, backend: str | None
) -> Tensor:
    if x.shape[-1] % groups:
        raise ValueError(f"{op}: groups: want a divisor of the width {x.shape[-1]}, got {groups}")
    chosen = resolve(op, reasons(x, z, weight, groups), backend)
    if chosen != "reference":
        return (_numba if chosen == "numba" else _triton)(x, z, weight, eps, groups)
    return _definition(x, z, weight, eps, groups)


def _definition(x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int) -> Tensor:
    y = x.to(compute_dtype(x))
    if z is not None:
        y = y * silu(z.to(y.dtype))
    if groups > 1:
        y = y.unflatten(-1, (groups, -1))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if groups > 1:
        y = y.flatten(-2)
    return (y if weight is None else y * weight).to(x.dtype)


_numba, _triton = recomputing_kernels(
    "rms_norm_{}", "Tensor x, Tensor? z, Tensor? weight, float eps, int groups", 1, "statewise.ops.norm.{}",
    lambda x, z, weight, eps, groups: x.new_empty(x.shape), _definition,
)  # fmt: skip
