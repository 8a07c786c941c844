"""The convolution of a row with long kernels over the past and the future, by Fourier transform."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import numba_reason, resolve
from .._register import recomputing

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


def convolve(u: Tensor, kernel: Tensor, backend: str | None = None, future: Tensor | None = None) -> Tensor:
    """Convolution along the last axis: u (..., L), kernel (..., K), future (..., F) -> (..., L), real, in their dtype.

    `kernel` acts on this position and earlier ones, `future` on the next and later ones.
    """
    length = u.shape[-1]
    if length == 0:
        return u * 1
    kernel = kernel[..., :length]
    future = None if future is None else future[..., : length - 1]
    if resolve("lti_conv", reasons(u, kernel), backend) == "numba":
        return _forward(u.mT, kernel, future).mT
    return _transforms(u, kernel, future)


def _transforms(u: Tensor, kernel: Tensor, future: Tensor | None) -> Tensor:
    length = u.shape[-1]
    n = fast_length(least_points(length, kernel, future))
    return torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(circle(kernel, future, n), n), n)[..., :length]


def least_points(length: int, kernel: Tensor, future: Tensor | None) -> int:
    """So many points that what leaves a row at one end does not come in at the other."""
    return length + max(kernel.shape[-1] - 1, 0 if future is None else future.shape[-1])


def circle(kernel: Tensor, future: Tensor | None, points: int) -> Tensor:
    """Both kernels as one on a circle of `points`, where lag -1 is the last point."""
    if future is None:
        return kernel
    gap = kernel.new_zeros(*kernel.shape[:-1], points - kernel.shape[-1] - future.shape[-1])
    return torch.cat([kernel, gap, future.flip(-1)], -1)


_forward = recomputing(
    "long_conv_numba",
    "Tensor u, Tensor kernel, Tensor? future",
    1,
    "statewise.ops.lti.numba",
    lambda u, kernel, future: u.new_empty(u.shape),
    lambda u, kernel, future: _transforms(u.mT, kernel, future).mT,
)
