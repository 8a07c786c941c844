"""Inputs for the laws and the benchmark."""

from __future__ import annotations

from math import prod

import torch

VARIANTS = ("plain", "complex", "shared", "constant", "grid")
# One multiply-add per token and channel: kernel and reference round in the same places, but in the chunked reference
# the product of decays is rounded too, and errors of the two then differ by a small factor either way.
FACTOR = 3.0

_LOG_DECAY = {"slow": (1e-4, 1e-2), "mixed": (1e-3, 3.0), "fast": (4.0, 12.0)}


def decays(shape: tuple[int, ...], decay: str, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """exp(-s), with s log-uniform in the range that `decay` names."""
    low, high = _LOG_DECAY[decay]
    u = torch.rand(shape, dtype=torch.float64, generator=generator)
    return torch.exp(-low * (high / low) ** u).to(dtype)


def sample(
    variant: str,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype,
    decay: str,
    generator: torch.Generator,
    size: int = 7,
) -> dict[str, torch.Tensor]:
    """Inputs without state and seg; "complex" gives the complex partner of `dtype`. `size` is the number of channels of
    "plain", "complex" and "constant"."""
    channels = (3, 5) if variant == "grid" else (size,)

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        wide = torch.complex128 if kind.is_complex else torch.float64
        return torch.randn(shape, dtype=wide, generator=generator).to(kind)

    full = (batch, length, *channels)
    if variant == "complex":
        a = decays(full, decay, dtype, generator).to(torch.float64)
        angle = 3.0 * torch.randn(full, dtype=torch.float64, generator=generator)
        return {"a": torch.polar(a, angle).to(dtype.to_complex()), "x": normal(*full, kind=dtype.to_complex())}
    if variant == "shared":
        # One decay for a row of channels that is long enough for the kernel to keep it shared.
        return {"a": decays((batch, length, 1), decay, dtype, generator), "x": normal(batch, length, 11)}
    if variant == "constant":
        return {"a": decays(channels, decay, dtype, generator).expand(full), "x": normal(*full)}
    if variant == "grid":
        return {"a": decays((batch, length, 3, 1), decay, dtype, generator), "x": normal(*full)}
    if variant == "plain":
        return {"a": decays(full, decay, dtype, generator), "x": normal(*full)}
    raise ValueError(f"variant: want one of {', '.join(VARIANTS)}, got {variant!r}")


def flops(inputs: dict[str, torch.Tensor]) -> int:
    """A multiply and an add per token and channel, four times as many for complex numbers."""
    x = inputs["x"]
    return prod(x.shape) * (8 if x.is_complex() else 2)


def bytes_moved(inputs: dict[str, torch.Tensor]) -> int:
    """Reads of `a` and x and the write of h."""
    a, x = inputs["a"], inputs["x"]
    stored = prod(n for n, s in zip(a.shape, a.stride()) if s)
    return stored * a.element_size() + 2 * prod(x.shape) * x.element_size()
