"""The convolution kernel of a diagonal-plus-low-rank system, made again in the backward pass.

The generating function at L roots of unity folds the taps past L onto the first L. In double precision c (1 - A^L)
takes them away, which needs dense powers of A. In single precision the system is damped instead, so that they are too
small to matter, and the taps are scaled back (Abate and Whitt 1992 invert transforms so).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._tracing import transformed
from .cauchy import damped, generating
from .forms import System

ALGORITHMS = ("cauchy", "powers")
# What is left after L steps of a damped system, of which a kernel in single precision is made: it is taken for nothing,
# and rounding in double precision grows by its inverse.
_LEFT = 1e-8
# About how many numbers the graph of one block of channels may hold in the backward pass: 128 megabytes.
_NUMBERS = 1 << 24


def kernel(
    w: Tensor, p: Tensor, b: Tensor, c: Tensor, length: int, algorithm: str, backend: str | None
) -> Tensor:  # fmt: skip
    """2 Re(c A^l B), l < length, for K read-outs c (K, D, N): (K, D, length), real, in the precision of w."""
    precision = w.real.dtype
    if length == 0:
        return w.real.new_zeros(*c.shape[:2], 0) * c.real.sum()
    exact = w.dtype == torch.complex128
    w, p, b, c = (t.to(torch.complex128) for t in (w, p, b, c))
    if algorithm == "powers":
        taps = System(w, p, b, c).kernel(length)
    elif exact:
        taps = generating(w, p, b, System(w, p, b, c).truncated(length), length, backend)
    else:
        r = _LEFT ** (1 / length)
        w, p, q, b = damped(w, p, b, r)
        grown = torch.arange(length, dtype=torch.float64, device=w.device).mul(-math.log(r)).exp()
        taps = generating(w, p, b, c, length, backend, q) * grown
    return taps.to(precision)


class _Recomputed(torch.autograd.Function):
    """Keeps the coefficients only. Block by block of channels the backward pass makes the kernel once more."""

    @staticmethod
    def forward(ctx: Any, w, p, b, c, length, algorithm, backend) -> Tensor:
        ctx.save_for_backward(w, p, b, c)
        ctx.options = length, algorithm, backend
        return torch.cat(
            [kernel(part[0], part[1], part[2], part[3], *ctx.options) for part in _blocks((w, p, b, c), length)], -2
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dk,), length, again = grads, ctx.options[0], torch.is_grad_enabled()
        found, start = [], 0
        for part in _blocks(ctx.saved_tensors, length):
            with torch.enable_grad():
                # For second derivatives they stay in the graph of the whole; what they come from stays out of this one.
                w, p, b, c = leaves = [
                    t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in part
                ]
                taps = kernel(w, p, b, c, *ctx.options)
            part_grad = dk[:, start : start + taps.shape[1]]
            found.append(
                torch.autograd.grad(
                    taps, leaves, part_grad, create_graph=again, allow_unused=True, materialize_grads=True
                )
            )
            start += taps.shape[1]
        return *(torch.cat(parts, -2) for parts in zip(*found)), None, None, None


def _blocks(coefficients: Sequence[Tensor], length: int) -> list[tuple[Tensor, ...]]:
    """w, p, b and c of blocks of channels."""
    w, p, _, c = coefficients
    D, N = w.shape
    products = (len(c) + len(p)) * (1 + len(p))
    size = max(1, _NUMBERS // (4 * N * N * max(length, 1).bit_length() + 16 * products * max(length, 1)))
    count = max(1, -(-D // size))
    # Of equal size, so that no thread waits for the last one.
    return list(zip(*(t.tensor_split(count, -2) for t in coefficients)))


def recomputed(
    w: Tensor, p: Tensor, b: Tensor, c: Tensor, length: int, algorithm: str, backend: str | None
) -> Tensor:  # fmt: skip
    """As `kernel`. Memory of the backward pass is a constant plus what inputs and result need."""
    if torch.compiler.is_compiling() or transformed():
        return kernel(w, p, b, c, length, algorithm, backend)
    return _Recomputed.apply(w, p, b, c, length, algorithm, backend)
