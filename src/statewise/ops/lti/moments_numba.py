"""CPU kernel of the last state of diagonal systems. Its powers and its gradients are those of `vandermonde_numba`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._simd import LANES, fill, load, multiply_add, store, zeros
from . import vandermonde_numba as vandermonde
from .moments import adjoint
from .vandermonde_numba import GROUP, tables


@common.kernel
def _turned(table, at, re, im):
    """The complex product with the group of numbers that stands in the table."""
    pr, pi = load(table, at), load(table, at + LANES)
    return pr * re - pi * im, pr * im + pi * re


@common.kernel
def _sums(line, chunks, Q, fine, coarse, wide, n, sums):
    """Of the group that begins with mode n: the sum over l of line_l a^l, two chunks at a time."""
    gr, gi = zeros(), zeros()
    real, imag = 2 * n * Q, 2 * n * Q + Q * LANES
    for q in range(0, chunks, 2):
        ar, ai, br, bi = zeros(), zeros(), zeros(), zeros()
        at = q * Q
        for r in range(Q):
            fr, fi = load(fine, real + r * LANES), load(fine, imag + r * LANES)
            one, two = fill(line[at + r]), fill(line[at + Q + r])
            ar = multiply_add(fr, one, ar)
            ai = multiply_add(fi, one, ai)
            br = multiply_add(fr, two, br)
            bi = multiply_add(fi, two, bi)
        ar, ai = _turned(coarse, q * wide + 2 * n, ar, ai)
        br, bi = _turned(coarse, (q + 1) * wide + 2 * n, br, bi)
        gr, gi = gr + ar + br, gi + ai + bi
    store(sums, 0, gr)
    store(sums, LANES, gi)


@common.kernel
def _forward(start, stop, worker, u, ub, ul, log_a, B, D, N, Q, length, out):
    wide, chunks = (N + LANES - 1) // LANES * GROUP, (length + Q - 1) // Q
    even = (chunks + 1) // 2 * 2
    walk, ends, sums = np.empty(2 * GROUP), np.empty(wide), np.empty(GROUP, np.float32)
    # Zeros past the end, where a mode that grows could be infinite.
    fine, coarse, line = (
        np.empty(Q * wide, np.float32),
        np.zeros(even * wide, np.float32),
        np.zeros(even * Q, np.float32),
    )
    for d in range(start, stop):
        tables(log_a, d, N, Q, length, walk, ends, fine, coarse, chunks, wide)
        for b in range(B):
            for l in range(length):
                line[l] = u[b * ub + (length - 1 - l) * ul + d]
            for n in range(0, N, LANES):
                _sums(line, even, Q, fine, coarse, wide, n, sums)
                for j in range(min(LANES, N - n)):
                    at = 2 * ((b * D + d) * N + n + j)
                    out[at], out[at + 1] = sums[j], sums[LANES + j]


def forward(u: Tensor, log_a: Tensor) -> Tensor:
    """u (B, L, D), log_a (D, N): (B, D, N)."""
    (B, length, D), N = u.shape, log_a.shape[1]
    out = torch.empty(B, D, N, dtype=torch.complex64)
    memory, (ub, ul) = common.rows(u.to(torch.float32))
    common.run(
        _forward, D, memory, ub, ul, common.pairs(log_a), B, D, N, vandermonde.chunk(length), length, common.pairs(out),
        inline=B * D * N * length < 1 << 19,
    )  # fmt: skip
    return out if log_a.is_complex() else out.real.contiguous()


def backward(grad: Tensor, u: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u and log_a."""
    return adjoint(vandermonde, grad, u, log_a)
