"""CPU kernels of the Vandermonde product: positions across the lanes.

A block of 64 powers of one mode is made exactly at the start of each segment, and turned by a^64 from block to block,
at most sixteen times: so errors do not pile up, and no power of a is kept. The backward pass does the same walk.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .vandermonde import BLOCK, SEGMENT

_F = np.float32


@common.kernel
def _begin(cr, ci, fr, fi, zr, zi):
    for j in range(BLOCK):
        zr[j] = cr * fr[j] - ci * fi[j]
        zi[j] = cr * fi[j] + ci * fr[j]


@common.kernel
def _turn(zr, zi, sr, si):
    for j in range(BLOCK):
        t = zr[j] * sr - zi[j] * si
        zi[j] = zr[j] * si + zi[j] * sr
        zr[j] = t


@common.kernel
def _forward(start, stop, worker, c_r, c_i, fine_r, fine_i, coarse_r, coarse_i, step_r, step_i, out):
    D, N, padded = c_r.shape[1], c_r.shape[2], out.shape[2]
    zr, zi = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for task in range(start, stop):
        k, d = task // D, task % D
        out[k, d] = _F(0)
        for segment in range(coarse_r.shape[2]):
            first = segment * SEGMENT
            last = min(first + SEGMENT, padded)
            for n in range(N):
                cr, ci, pr, pi = c_r[k, d, n], c_i[k, d, n], coarse_r[d, n, segment], coarse_i[d, n, segment]
                _begin(cr * pr - ci * pi, cr * pi + ci * pr, fine_r[d, n], fine_i[d, n], zr, zi)
                sr, si = step_r[d, n], step_i[d, n]
                for l in range(first, last, BLOCK):
                    row = out[k, d, l : l + BLOCK]
                    for j in range(BLOCK):
                        row[j] += zr[j]
                        t = zr[j] * sr - zi[j] * si
                        zi[j] = zr[j] * si + zi[j] * sr
                        zr[j] = t


@common.kernel
def _backward(
    start, stop, worker, dk, c_r, c_i, fine_r, fine_i, coarse_r, coarse_i, step_r, step_i, d_log_r, d_log_i, d_r, d_i
):
    K, N, padded = c_r.shape[0], c_r.shape[2], dk.shape[2]
    zr, zi = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sums, lagged = np.empty((2, BLOCK), np.float32), np.empty((2, BLOCK), np.float32)
    late = np.empty(SEGMENT, np.float32)
    for d in range(start, stop):
        for k in range(K):
            for segment in range(coarse_r.shape[2]):
                first = segment * SEGMENT
                last = min(first + SEGMENT, padded)
                for j in range(last - first):
                    late[j] = dk[k, d, first + j] * _F(j)
                for n in range(N):
                    _begin(coarse_r[d, n, segment], coarse_i[d, n, segment], fine_r[d, n], fine_i[d, n], zr, zi)
                    sr, si = step_r[d, n], step_i[d, n]
                    sums[:] = _F(0)
                    lagged[:] = _F(0)
                    ar, ai, br, bi = sums[0], sums[1], lagged[0], lagged[1]
                    for l in range(first, last, BLOCK):
                        row, other = dk[k, d, l : l + BLOCK], late[l - first : l - first + BLOCK]
                        for j in range(BLOCK):
                            ar[j] += row[j] * zr[j]
                            ai[j] += row[j] * zi[j]
                            br[j] += other[j] * zr[j]
                            bi[j] += other[j] * zi[j]
                        _turn(zr, zi, sr, si)
                    # Sums of g a^l and l g a^l over this segment.
                    gr, gi, hr, hi = 0.0, 0.0, 0.0, 0.0
                    for j in range(BLOCK):
                        gr += ar[j]
                        gi += ai[j]
                        hr += br[j]
                        hi += bi[j]
                    hr += first * gr
                    hi += first * gi
                    cr, ci = c_r[k, d, n], c_i[k, d, n]
                    d_r[k, d, n] += gr
                    d_i[k, d, n] -= gi
                    d_log_r[d, n] += cr * hr - ci * hi
                    d_log_i[d, n] -= cr * hi + ci * hr


def forward(
    log_a: Tensor, c_r: Tensor, c_i: Tensor, fine_r: Tensor, fine_i: Tensor, coarse_r: Tensor, coarse_i: Tensor,
    step_r: Tensor, step_i: Tensor, length: int,
) -> Tensor:  # fmt: skip
    """c (K, D, N), a^j for j < 64 and at the starts of segments (D, N, ...), a^64 (D, N): (K, D, length)."""
    K, D, N = c_r.shape
    out = common.empty(K, D, -(-length // BLOCK) * BLOCK)
    inputs = (c_r, c_i, fine_r, fine_i, coarse_r, coarse_i, step_r, step_i)
    common.run(_forward, K * D, *(common.f32(t.detach()) for t in inputs), out.numpy(),
               inline=K * D * N * length < 1 << 18)  # fmt: skip
    return out[..., :length].contiguous()


def backward(
    dk: Tensor, c_r: Tensor, c_i: Tensor, fine_r: Tensor, fine_i: Tensor, coarse_r: Tensor, coarse_i: Tensor,
    step_r: Tensor, step_i: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of log_a (D, N) complex, and of the parts of c (K, D, N). Sums over segments are in float64."""
    (K, D, N), length = c_r.shape, dk.shape[2]
    padded = torch.nn.functional.pad(dk, (0, -length % BLOCK))
    grads = [torch.zeros(D, N, dtype=torch.float64) for _ in range(2)]
    grads += [torch.zeros(K, D, N, dtype=torch.float64) for _ in range(2)]
    inputs = (padded, c_r, c_i, fine_r, fine_i, coarse_r, coarse_i, step_r, step_i)
    common.run(_backward, D, *(common.f32(t.detach()) for t in inputs), *(t.numpy() for t in grads),
               inline=K * D * N * length < 1 << 17)  # fmt: skip
    return torch.complex(grads[0], grads[1]).to(torch.complex64), grads[2].float(), grads[3].float()
