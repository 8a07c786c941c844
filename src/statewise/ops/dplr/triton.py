"""GPU kernels of the Cauchy product, in float64: one program is a block of frequencies of one channel.

All M products share the reciprocals, which live in registers and are made again in the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cauchy import nodes

_BLOCK = 64


@triton.jit
def _reciprocal(a, x, s, c):
    dr = (a * c - 2 * s) * (a * c + 2 * s)
    di = -4 * x * s * c
    scale = 1 / (dr * dr + di * di)
    return dr * scale, di * scale


@triton.jit
def _forward(
    alpha, beta, a, x, sin, cos, real, imag, M, D, N, F, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = tl.arange(0, ROWS)
    s = tl.load(sin + f, mask=f < F, other=0.5)
    c = tl.load(cos + f, mask=f < F, other=0.5)
    ae = tl.zeros([ROWS, BLOCK], tl.float64)
    bg = tl.zeros([ROWS, BLOCK], tl.float64)
    be = tl.zeros([ROWS, BLOCK], tl.float64)
    ag = tl.zeros([ROWS, BLOCK], tl.float64)
    for n in range(N):
        e, g = _reciprocal(tl.load(a + d * N + n), tl.load(x + d * N + n), s, c)
        at = (m * D + d) * N + n
        am = tl.load(alpha + at, mask=m < M, other=0.0)[:, None]
        bm = tl.load(beta + at, mask=m < M, other=0.0)[:, None]
        ae += am * e[None, :]
        bg += bm * g[None, :]
        be += bm * e[None, :]
        ag += am * g[None, :]
    to = (m[:, None] * D + d) * F + f[None, :]
    inside = (m < M)[:, None] & (f < F)[None, :]
    tl.store(real + to, c[None, :] * ae + s[None, :] * bg, mask=inside)
    tl.store(imag + to, s[None, :] * be - c[None, :] * ag, mask=inside)


@triton.jit
def _backward(
    d_real, d_imag, alpha, beta, a, x, sin, cos, d_alpha, d_beta, d_a, d_x, M, D, N, F,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One mode of one channel; sums over frequencies stay in one program and so in a fixed order."""
    d = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    m = tl.arange(0, ROWS)
    at = (m * D + d) * N + n
    am = tl.load(alpha + at, mask=m < M, other=0.0)[:, None]
    bm = tl.load(beta + at, mask=m < M, other=0.0)[:, None]
    modulus, decay = tl.load(a + d * N + n), tl.load(x + d * N + n)
    sum_alpha = tl.zeros([ROWS, BLOCK], tl.float64)
    sum_beta = tl.zeros([ROWS, BLOCK], tl.float64)
    sum_a = tl.zeros([BLOCK], tl.float64)
    sum_x = tl.zeros([BLOCK], tl.float64)
    for first in range(0, F, BLOCK):
        f = first + tl.arange(0, BLOCK)
        s = tl.load(sin + f, mask=f < F, other=0.5)
        c = tl.load(cos + f, mask=f < F, other=0.5)
        of = (m[:, None] * D + d) * F + f[None, :]
        inside = (m < M)[:, None] & (f < F)[None, :]
        gr = tl.load(d_real + of, mask=inside, other=0.0)
        gi = tl.load(d_imag + of, mask=inside, other=0.0)
        e, g = _reciprocal(modulus, decay, s, c)
        cr, ci, sr, si = gr * c[None, :], gi * c[None, :], gr * s[None, :], gi * s[None, :]
        sum_alpha += cr * e[None, :] - ci * g[None, :]
        sum_beta += sr * g[None, :] + si * e[None, :]
        de = tl.sum(am * cr + bm * si, 0)
        dg = tl.sum(bm * sr - am * ci, 0)
        square, twice = e * e - g * g, 2 * e * g
        sum_a -= (de * square + dg * twice) * (c * c)
        sum_x -= 4 * (dg * square - de * twice) * (s * c)
    tl.store(d_alpha + at, tl.sum(sum_alpha, 1), mask=m < M)
    tl.store(d_beta + at, tl.sum(sum_beta, 1), mask=m < M)
    tl.store(d_a + d * N + n, 2 * modulus * tl.sum(sum_a, 0))
    tl.store(d_x + d * N + n, tl.sum(sum_x, 0))


def forward(alpha: Tensor, beta: Tensor, a: Tensor, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """alpha, beta (M, D, N), a and x (D, N), float64: real and imaginary part (M, D, length // 2 + 1)."""
    (M, D, N), F = alpha.shape, length // 2 + 1
    real, imag = (torch.empty(M, D, F, dtype=torch.float64, device=a.device) for _ in range(2))
    _forward[(D, triton.cdiv(F, _BLOCK))](
        *(t.contiguous() for t in (alpha, beta, a, x)), *nodes(length, a.device), real, imag, M, D, N, F,
        ROWS=triton.next_power_of_2(M), BLOCK=_BLOCK, num_warps=2,
    )  # fmt: skip
    return real, imag


def backward(
    d_real: Tensor, d_imag: Tensor, alpha: Tensor, beta: Tensor, a: Tensor, x: Tensor, length: int
) -> tuple[Tensor, ...]:
    """Gradients of alpha, beta, a and x."""
    (M, D, N), F = alpha.shape, length // 2 + 1
    grads = tuple(torch.empty(t.shape, dtype=torch.float64, device=t.device) for t in (alpha, beta, a, x))
    _backward[(D, N)](
        *(t.contiguous() for t in (d_real, d_imag, alpha, beta, a, x)), *nodes(length, a.device), *grads, M, D, N, F,
        ROWS=triton.next_power_of_2(M), BLOCK=_BLOCK, num_warps=2,
    )  # fmt: skip
    return grads
