"""Root-mean-square norms, plain and gated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from ._checks import compute_dtype


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, groups: int = 1) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 for half-precision x.

    Args:
        x: (..., D). weight: (D,). groups: statistics are taken over each of `groups` equal parts of D.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467).
    """
    y = x.to(compute_dtype(x))
    if groups > 1:
        if x.shape[-1] % groups:
            raise ValueError(f"rms_norm: groups: want a divisor of the width {x.shape[-1]}, got {groups}")
        y = y.unflatten(-1, (groups, -1))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if groups > 1:
        y = y.flatten(-2)
    return (y if weight is None else y * weight).to(x.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor | None = None, eps: float = 1e-5, groups: int = 1) -> Tensor:
    """rms_norm(x * silu(z)): the gate comes before the norm, as in Mamba-2. x, z: (..., D)."""
    dtype = compute_dtype(x)
    return rms_norm(x.to(dtype) * silu(z.to(dtype)), weight, eps, groups).to(x.dtype)
