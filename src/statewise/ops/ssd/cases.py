"""Inputs for the laws and the benchmark of `ssd`."""

from __future__ import annotations

from typing import Any

import torch

VARIANTS = ("plain", "groups", "gated", "small_chunk", "skip_per_channel")
# With a skip weight per channel each channel has a matrix of its own, which `ssd_matrix` refuses.
MATRIX_VARIANTS = ("plain", "groups", "gated", "small_chunk")
# Sums run in another order than in the definition (matrix products), so rounding differs: three times is honest.
FACTOR = 3.0

# Step sizes for which the decay of one step is near 1, ordinary, or near 0 (A is about -1 ... -16).
_DT = {"slow": (1e-5, 1e-4), "mixed": (1e-3, 1e-1), "fast": (1.0, 4.0)}


def sample(
    variant: str,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype,
    decay: str,
    generator: torch.Generator,
    size: tuple[int, int, int] = (4, 5, 3),
) -> dict[str, Any]:
    """`size` is (H, P, N)."""
    H, P, N = size
    G = 2 if variant == "groups" else 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(dtype)

    low, high = _DT[decay]
    inputs: dict[str, Any] = {
        "x": normal(batch, length, H, P),
        "dt": uniform(low, high, batch, length, H),
        "A": -uniform(1.0, 16.0, H),
        "B": normal(batch, length, G, N),
        "C": normal(batch, length, G, N),
    }
    if variant == "plain":
        inputs["D"] = normal(H)
    if variant == "small_chunk":
        inputs["chunk_size"] = 7
    if variant == "gated":
        # softplus(dt + bias) is the step: draw what gives a step in the same range.
        bias = torch.log(torch.expm1(torch.tensor((low + high) / 2, dtype=torch.float64)))
        inputs |= {
            "dt": 0.3 * normal(batch, length, H),
            "dt_bias": bias.to(dtype) + 0.1 * normal(H),
            "dt_softplus": True,
            "z": normal(batch, length, H, P),
            "D": normal(H),
        }
    if variant == "skip_per_channel":
        inputs["D"] = normal(H, P)
    return inputs


def flops(inputs: dict[str, Any], chunk: int = 64) -> int:
    """Multiply-adds count as two; the decay matrix's exponentials as one each."""
    (B, L, H, P), (G, N) = inputs["x"].shape, inputs["B"].shape[2:]
    inside = 2 * B * L * chunk * (G * N + H * P)
    between = 4 * B * L * H * P * N
    return inside + between + B * L * H * chunk


def bytes_moved(inputs: dict[str, Any]) -> int:
    """Inputs read once, y written once."""
    tensors = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) + inputs["x"].numel() * inputs["x"].element_size()
