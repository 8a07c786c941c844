"""Inputs for the laws and the benchmark of `diagonal_ssm`."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _checks

VARIANTS = ("conjugate", "real", "single", "mixed")
# Matrix products and Fourier transforms sum in another order than the definition.
FACTOR = 4.0

_LOG_DECAY = {"slow": (1e-4, 1e-2), "mixed": (1e-3, 3.0), "fast": (4.0, 12.0)}


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
    """Inputs without state and seg; `size` is (D, N). "mixed" has real log_a and b beside a complex c."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: want one of {', '.join(VARIANTS)}, got {variant!r}")
    D = size[0]
    # Coefficients are parameters, which stay in float32 beside half-precision activations.
    real = _checks.compute_dtype(torch.empty(0, dtype=dtype))

    def normal(*shape: int, kind: torch.dtype = real) -> torch.Tensor:
        wide = torch.complex128 if kind.is_complex else torch.float64
        return torch.randn(shape, dtype=wide, generator=generator).to(kind)

    low, high = _LOG_DECAY[decay]
    rate = low * (high / low) ** torch.rand(size, dtype=torch.float64, generator=generator)
    angle = 2 * math.pi * torch.rand(size, dtype=torch.float64, generator=generator)
    is_complex = variant in ("conjugate", "single")
    log_a = torch.complex(-rate, angle) if is_complex else -rate
    kind = real.to_complex() if is_complex else real
    inputs: dict[str, Any] = {
        "u": normal(batch, length, D).to(dtype),
        "log_a": log_a.to(kind),
        "b": normal(*size, kind=kind),
        "c": normal(*size, kind=real.to_complex() if variant == "mixed" else kind),
    }
    if variant != "single":
        inputs["D"] = normal(D)
    else:
        inputs["conjugate"] = False
    return inputs


def flops(inputs: dict[str, Any], chunk: int = 64) -> int:
    """Of the chunked form: products inside chunks, and in and out of the states; a multiply-add counts as two."""
    B, L, D = inputs["u"].shape
    parts = 2 if any(inputs[k].is_complex() for k in ("log_a", "b", "c")) else 1
    return 2 * B * L * D * (min(chunk, L) + 2 * parts * inputs["log_a"].shape[1])


def bytes_moved(inputs: dict[str, Any]) -> int:
    """One read of u and one write of y."""
    return 2 * inputs["u"].numel() * inputs["u"].element_size()
