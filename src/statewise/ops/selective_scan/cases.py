"""Inputs for the laws and the benchmark of `selective_scan`."""

from __future__ import annotations

from typing import Any

import torch

VARIANTS = ("plain", "groups", "gated", "limited", "complex")
# The kernel fuses multiply and add and sums in another order than the definition: three times is honest.
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
    size: tuple[int, int] = (6, 4),
) -> dict[str, Any]:
    """`size` is (D, N)."""
    D, N = size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(dtype)

    low, high = _DT[decay]
    grouped = (2, N) if variant == "groups" else (N,)
    inputs: dict[str, Any] = {
        "x": normal(batch, length, D),
        "dt": uniform(low, high, batch, length, D),
        "A": -uniform(1.0, 16.0, D, N),
        "B": normal(batch, length, *grouped),
        "C": normal(batch, length, *grouped),
    }
    if variant == "plain":
        inputs["D"] = normal(D)
    if variant == "gated":
        # softplus(dt + bias) is the step: draw what gives a step in the same range.
        bias = torch.log(torch.expm1(torch.tensor((low + high) / 2, dtype=torch.float64)))
        inputs |= {
            "dt": 0.3 * normal(batch, length, D),
            "dt_bias": bias.to(dtype) + 0.1 * normal(D),
            "dt_softplus": True,
            "z": normal(batch, length, D),
            "D": normal(D),
        }
    if variant == "limited":
        inputs["dt_limit"] = (low + 0.2 * (high - low), low + 0.8 * (high - low))
    if variant == "complex":
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        for name in ("A", "B", "C"):
            real = inputs[name].to(wide)
            inputs[name] = torch.complex(real, normal(*real.shape).to(wide))
    return inputs


def flops(inputs: dict[str, Any]) -> int:
    """Multiply-adds count as two, an exponential as one: 6 per state and position."""
    (B, L, D), N = inputs["x"].shape, inputs["A"].shape[1]
    return 6 * B * L * D * N


def bytes_moved(inputs: dict[str, Any]) -> int:
    """Inputs read once, y written once."""
    tensors = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) + inputs["x"].numel() * inputs["x"].element_size()
