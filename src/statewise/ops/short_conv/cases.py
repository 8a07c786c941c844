"""Inputs for the laws and the benchmark."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

VARIANTS = ("plain", "bias", "silu", "one", "wide")
# At most eight products are summed, in a fixed order; the sigmoid of the kernel is another polynomial than torch's.
FACTOR = 4.0

_OPTIONS: dict[str, tuple[int, bool, str | None]] = {
    "plain": (4, False, None),
    "bias": (3, True, None),
    "silu": (4, True, "silu"),
    "one": (1, True, None),
    "wide": (8, False, "silu"),
}


def sample(
    variant: str,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype,
    decay: str,
    generator: torch.Generator,
    size: int = 7,
) -> dict[str, Any]:
    """Inputs without state and seg; `size` is D. There is nothing here that decays, so `decay` changes nothing."""
    if variant not in _OPTIONS:
        raise ValueError(f"variant: want one of {', '.join(VARIANTS)}, got {variant!r}")
    taps, with_bias, activation = _OPTIONS[variant]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    return {
        "x": normal(batch, length, size),
        "weight": normal(size, taps) / taps**0.5,
        "bias": normal(size) if with_bias else None,
        "activation": activation,
    }


def flops(inputs: dict[str, Any]) -> int:
    """A multiply and an add per tap, and six operations for silu."""
    return prod(inputs["x"].shape) * (2 * inputs["weight"].shape[1] + (6 if inputs["activation"] else 0))


def bytes_moved(inputs: dict[str, Any]) -> int:
    """One read of x and one write of y."""
    return 2 * prod(inputs["x"].shape) * inputs["x"].element_size()
