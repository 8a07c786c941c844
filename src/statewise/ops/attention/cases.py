"""Inputs for the laws and the benchmark."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

VARIANTS = ("plain", "groups", "window", "scale")
# torch picks another kernel for each shape and mask; they sum the same products in different orders.
FACTOR = 4.0
# PyTorch has no second derivatives of its fused kernels.
TWICE = partial(sdpa_kernel, SDPBackend.MATH)

# How sharp the softmax is: decays near 1 correspond to an even spread, near 0 to looking at one token.
_SHARPNESS = {"slow": 0.1, "mixed": 1.0, "fast": 3.0}


def sample(
    variant: str, batch: int, length: int, *, dtype: torch.dtype, decay: str, generator: torch.Generator
) -> dict[str, Any]:
    """Inputs without state and seg."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: want one of {', '.join(VARIANTS)}, got {variant!r}")
    heads, kv_heads, size = (4, 2, 8) if variant == "groups" else (2, 2, 8)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    sharp = _SHARPNESS[decay]
    inputs: dict[str, Any] = {
        "q": (sharp * normal(batch, length, heads, size)).to(dtype),
        "k": normal(batch, length, kv_heads, size).to(dtype),
        "v": normal(batch, length, kv_heads, size).to(dtype),
    }
    if variant == "window":
        inputs["window"] = 4
    if variant == "scale":
        inputs["scale"] = 0.5
    return inputs


def flops(inputs: dict[str, Any]) -> int:
    """Two products of L squared per head, half of them masked away."""
    batch, length, heads, size = inputs["q"].shape
    return 2 * batch * heads * length * length * size


def bytes_moved(inputs: dict[str, Any]) -> int:
    """Reads of q, k and v and the write of y."""
    q, k = inputs["q"], inputs["k"]
    return (2 * prod(q.shape) + 2 * prod(k.shape)) * q.element_size()
