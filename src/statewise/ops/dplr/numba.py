"""CPU kernels of the Cauchy product, in float64, with frequencies across the lanes.

Four modes at a time go through a block of frequencies that stays in the first-level cache: their reciprocals, then all
sums over them. The backward pass makes the reciprocals again. Nothing of size D N L is kept.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _numba as common
from .cauchy import nodes

_BLOCK = 256  # frequencies
_MODES = 4


@common.kernel
def _reciprocals(a, x, sin, cos, first, count, e, g):
    """Real part, and minus the imaginary part, of 1 / (dr + i di)."""
    for j in range(count):
        s, c = sin[first + j], cos[first + j]
        dr = (a * c - 2 * s) * (a * c + 2 * s)
        di = -4 * x * s * c
        scale = 1 / (dr * dr + di * di)
        e[j] = dr * scale
        g[j] = di * scale


@common.kernel
def _forward(start, stop, worker, alpha, beta, a, x, sin, cos, real, imag):
    M, N, frequencies = alpha.shape[0], alpha.shape[2], len(sin)
    e, g = np.empty((_MODES, _BLOCK)), np.empty((_MODES, _BLOCK))
    sums = np.empty((M, 4, _BLOCK))
    for d in range(start, stop):
        for first in range(0, frequencies, _BLOCK):
            count = min(_BLOCK, frequencies - first)
            sums[:] = 0
            for n in range(0, N, _MODES):
                for k in range(_MODES):
                    _reciprocals(a[d, n + k], x[d, n + k], sin, cos, first, count, e[k], g[k])
                e0, e1, e2, e3 = e[0], e[1], e[2], e[3]
                g0, g1, g2, g3 = g[0], g[1], g[2], g[3]
                for m in range(M):
                    a0, a1, a2, a3 = alpha[m, d, n], alpha[m, d, n + 1], alpha[m, d, n + 2], alpha[m, d, n + 3]
                    b0, b1, b2, b3 = beta[m, d, n], beta[m, d, n + 1], beta[m, d, n + 2], beta[m, d, n + 3]
                    ae, bg, be, ag = sums[m, 0], sums[m, 1], sums[m, 2], sums[m, 3]
                    for j in range(count):
                        ae[j] += (a0 * e0[j] + a1 * e1[j]) + (a2 * e2[j] + a3 * e3[j])
                        bg[j] += (b0 * g0[j] + b1 * g1[j]) + (b2 * g2[j] + b3 * g3[j])
                        be[j] += (b0 * e0[j] + b1 * e1[j]) + (b2 * e2[j] + b3 * e3[j])
                        ag[j] += (a0 * g0[j] + a1 * g1[j]) + (a2 * g2[j] + a3 * g3[j])
            for m in range(M):
                for j in range(count):
                    s, c = sin[first + j], cos[first + j]
                    real[m, d, first + j] = c * sums[m, 0, j] + s * sums[m, 1, j]
                    imag[m, d, first + j] = s * sums[m, 2, j] - c * sums[m, 3, j]


@common.reducing_kernel
def _weights(e, g, cr, si, sr, ci, count):
    """Gradients of alpha and beta from a block of frequencies."""
    d_alpha, d_beta = 0.0, 0.0
    for j in range(count):
        d_alpha += cr[j] * e[j] - ci[j] * g[j]
        d_beta += sr[j] * g[j] + si[j] * e[j]
    return d_alpha, d_beta


@common.reducing_kernel
def _poles(e, g, de, dg, sin, cos, first, count):
    """Gradients of a (but for a factor 2 a) and x, from those of e and g."""
    d_a, d_x = 0.0, 0.0
    for j in range(count):
        s, c = sin[first + j], cos[first + j]
        square, twice = e[j] * e[j] - g[j] * g[j], 2 * e[j] * g[j]
        d_a -= (de[j] * square + dg[j] * twice) * (c * c)
        d_x -= 4 * (dg[j] * square - de[j] * twice) * (s * c)
    return d_a, d_x


@common.kernel
def _backward(start, stop, worker, d_real, d_imag, alpha, beta, a, x, sin, cos, d_alpha, d_beta, d_a, d_x):
    M, N, frequencies = alpha.shape[0], alpha.shape[2], len(sin)
    e, g, de, dg = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    scaled = np.empty((M, 4, _BLOCK))
    for d in range(start, stop):
        for first in range(0, frequencies, _BLOCK):
            count = min(_BLOCK, frequencies - first)
            for m in range(M):
                for j in range(count):
                    s, c = sin[first + j], cos[first + j]
                    real, imag = d_real[m, d, first + j], d_imag[m, d, first + j]
                    scaled[m, 0, j] = c * real
                    scaled[m, 1, j] = s * imag
                    scaled[m, 2, j] = s * real
                    scaled[m, 3, j] = c * imag
            for n in range(N):
                _reciprocals(a[d, n], x[d, n], sin, cos, first, count, e, g)
                de[:] = 0
                dg[:] = 0
                for m in range(M):
                    cr, si, sr, ci = scaled[m, 0], scaled[m, 1], scaled[m, 2], scaled[m, 3]
                    am, bm = alpha[m, d, n], beta[m, d, n]
                    for j in range(count):
                        de[j] += am * cr[j] + bm * si[j]
                        dg[j] += bm * sr[j] - am * ci[j]
                    one, other = _weights(e, g, cr, si, sr, ci, count)
                    d_alpha[m, d, n] += one
                    d_beta[m, d, n] += other
                one, other = _poles(e, g, de, dg, sin, cos, first, count)
                d_a[d, n] += 2 * a[d, n] * one
                d_x[d, n] += other


def _padded(alpha: Tensor, beta: Tensor, a: Tensor, x: Tensor) -> list[np.ndarray]:
    """With modes that weigh nothing, up to a multiple of four."""
    more = -a.shape[1] % _MODES
    values = (0.0, 0.0, 1.0, -1.0)
    return [F.pad(t.detach(), (0, more), value=v).contiguous().numpy() for t, v in zip((alpha, beta, a, x), values)]


def forward(alpha: Tensor, beta: Tensor, a: Tensor, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """alpha, beta (M, D, N), a and x (D, N), float64: real and imaginary part (M, D, length // 2 + 1)."""
    sin, cos = (t.numpy() for t in nodes(length, a.device))
    M, D, N = alpha.shape
    real, imag = (common.empty(M, D, len(sin), dtype=torch.float64) for _ in range(2))
    common.run(
        _forward, D, *_padded(alpha, beta, a, x), sin, cos, real.numpy(), imag.numpy(),
        inline=M * D * N * length < 1 << 16,
    )  # fmt: skip
    return real, imag


def backward(
    d_real: Tensor, d_imag: Tensor, alpha: Tensor, beta: Tensor, a: Tensor, x: Tensor, length: int
) -> tuple[Tensor, ...]:
    """Gradients of alpha, beta, a and x."""
    sin, cos = (t.numpy() for t in nodes(length, a.device))
    M, D, N = alpha.shape
    grads = tuple(torch.zeros(t.shape, dtype=torch.float64) for t in (alpha, beta, a, x))
    inputs = [t.detach().contiguous().numpy() for t in (d_real, d_imag, alpha, beta, a, x)]
    common.run(
        _backward, D, *inputs, sin, cos, *(t.numpy() for t in grads), inline=M * D * N * length < 1 << 15
    )  # fmt: skip
    return grads
