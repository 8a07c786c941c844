"""Inputs for the laws and the benchmark of `dplr_ssm`."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _checks

VARIANTS = ("rank 1", "rank 2")
# Matrix products and Fourier transforms sum in another order than the definition, and powers by squaring round
# otherwise than one step after the other.
FACTOR = 4.0

_DECAY = {"slow": (1e-4, 1e-2), "mixed": (1e-3, 1.0), "fast": (1.0, 8.0)}


def sample(
    variant: str,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype,
    decay: str,
    generator: torch.Generator,
    size: tuple[int, int] = (5, 4),
) -> dict[str, Any]:
    """Inputs without state and seg; `size` is (D, N). The low-rank part is as strong as the decay, as in HiPPO."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: want one of {', '.join(VARIANTS)}, got {variant!r}")
    D, rank = size[0], int(variant[-1])
    # Coefficients are parameters, which stay in float32 beside half-precision activations.
    real = _checks.compute_dtype(torch.empty(0, dtype=dtype))

    def normal(*shape: int, kind: torch.dtype = real) -> torch.Tensor:
        wide = torch.complex128 if kind.is_complex else torch.float64
        return torch.randn(shape, dtype=wide, generator=generator).to(kind)

    low, high = _DECAY[decay]
    rate = low * (high / low) ** torch.rand(size, dtype=torch.float64, generator=generator)
    angle = 2 * math.pi * torch.rand(size, dtype=torch.float64, generator=generator)
    kind = real.to_complex()
    return {
        "u": normal(batch, length, D).to(dtype),
        "w": torch.complex(-rate, angle).to(kind),
        "p": (normal(rank, *size, kind=torch.complex128) * rate.sqrt()).to(kind),
        "b": normal(*size, kind=kind),
        "c": normal(*size, kind=kind),
        "D": normal(D),
    }


def flops(inputs: dict[str, Any]) -> int:
    """Of the Fourier form: powers of the dense step, the kernel, the transforms and the last state."""
    (B, L, D), M = inputs["u"].shape, 2 * inputs["w"].shape[1]
    squarings = 2 * M**3 * math.log2(max(L, 2))
    return int(D * (squarings + 2 * M * L + B * L * (2 * M + 15 * math.log2(2 * L + 1))))


def bytes_moved(inputs: dict[str, Any]) -> int:
    """One read of u and one write of y."""
    return 2 * inputs["u"].numel() * inputs["u"].element_size()
