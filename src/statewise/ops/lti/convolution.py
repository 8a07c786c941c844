"""The causal convolution of a row with a long kernel, by Fourier transform."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import numba_reason, resolve
from .._register import differentiable, operator

# Points of a transform for which the kernels keep scratch memory, 128 bytes a point, several times per thread.
_MOST = 1 << 17


def fast_length(n: int) -> int:
    """The smallest even 2^i 3^j 5^k >= n, for which Fourier transforms are quick."""
    best = 1 << max(1, (n - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            size = three * max(2, 1 << max(0, -(-n // three) - 1).bit_length())
            if n <= size < best:
                best = size
            three *= 3
        five *= 5
    return best


def reasons(u: Tensor, kernel: Tensor) -> dict[str, str | None]:
    """For each back-end, None if it serves these inputs and else why not, in order of preference."""
    reason = numba_reason(u, kernel)
    if reason is None and (u.ndim, kernel.ndim) != (3, 2):
        reason = f"Numba kernels take rows (B, D, L) and kernels (D, K), got {tuple(u.shape)} and {tuple(kernel.shape)}"
    if reason is None and 2 * u.shape[-1] > _MOST:
        reason = f"Numba kernels take up to {_MOST // 2} positions, got {u.shape[-1]}"
    return {"numba": reason, "reference": None}


def convolve(u: Tensor, kernel: Tensor, backend: str | None = None) -> Tensor:
    """Causal convolution along the last axis: u (..., L), kernel (..., K) -> (..., L), real, in their dtype."""
    length = u.shape[-1]
    if length == 0:
        return u * 1
    kernel = kernel[..., :length]
    if resolve("lti_conv", reasons(u, kernel), backend) == "numba":
        return _forward(u.mT, kernel).mT
    n = fast_length(length + kernel.shape[-1] - 1)
    return torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(kernel, n), n)[..., :length]


_forward = operator(
    "long_conv_numba(Tensor u, Tensor kernel) -> Tensor",
    "statewise.ops.lti.numba:forward",
    lambda u, kernel: u.new_empty(u.shape),
)
_backward = operator(
    "long_conv_numba_backward(Tensor dy, Tensor u, Tensor kernel) -> (Tensor, Tensor)",
    "statewise.ops.lti.numba:backward",
    lambda dy, u, kernel: (u.new_empty(u.shape), kernel.new_empty(kernel.shape)),
)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy):
    return _backward(dy, *ctx.saved_tensors)


differentiable(_forward, _gradients, _save)
