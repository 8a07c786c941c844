"""CPU kernels of the Vandermonde product: powers in float64 by multiplication, products of small matrices in float32.

With l = q Q + r the kernel of a channel is (c a^(q Q)) times a^r. Both tables of powers are made in float64, one factor
after the other, and rounded once: L roundings of float64 are nothing in float32, and no sine or exponential is taken
but those of a itself. The tables of one channel stay in the nearest caches; the backward pass makes them again.

Modes come in groups of sixteen: their real parts, then their imaginary parts. The last group is filled up with zeros.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._simd import LANES, fill, load, load_wide, multiply_add, narrow, put, store, store_wide, transpose, zeros
from .modes import split
from .reference import NOTHING

_F = np.float32
GROUP = 2 * LANES
# What `_walk` works on: p of a group from 0 on, the factor z from here on; real parts, then imaginary parts.
_FACTOR = GROUP


@common.kernel
def _begin(walk, at, values, first, count, sign):
    """Numbers of a group, which stand in pairs from `first` on; sign -1: their conjugates."""
    for j in range(LANES):
        inside = j < count
        walk[at + j] = np.float64(values[first + 2 * j]) if inside else 0.0
        walk[at + LANES + j] = sign * np.float64(values[first + 2 * j + 1]) if inside else 0.0


@common.kernel
def _exponentials(walk, count):
    """From log a in the place of z to p = 1 and z = a."""
    for j in range(LANES):
        modulus = math.exp(max(walk[_FACTOR + j], NOTHING)) if j < count else 0.0
        angle = walk[_FACTOR + LANES + j]
        walk[_FACTOR + j], walk[_FACTOR + LANES + j] = modulus * math.cos(angle), modulus * math.sin(angle)
        walk[j], walk[LANES + j] = 1.0 if j < count else 0.0, 0.0


@common.kernel
def _walk(walk, count, table, at, gap, stride):
    """p, p z, p z^2 ..., `count` of them and `stride` numbers apart; imaginary parts `gap` after real ones.

    p goes on to p z^count.
    """
    pr, pi = load_wide(walk, 0), load_wide(walk, LANES)
    zr, zi = load_wide(walk, _FACTOR), load_wide(walk, _FACTOR + LANES)
    for _ in range(count):
        store(table, at, narrow(pr))
        store(table, at + gap, narrow(pi))
        pr, pi = pr * zr - pi * zi, pr * zi + pi * zr
        at += stride
    store_wide(walk, 0, pr)
    store_wide(walk, LANES, pi)


@common.kernel
def _fine_powers(log_a, first, N, Q, length, walk, table, ends):
    """a^r for r < Q of one channel, (groups, 2, Q, LANES), and a^Q, (groups, 2, LANES).

    Past the length there are zeros: a mode that grows could be infinite there.
    """
    count = min(Q, length)
    for n in range(0, N, LANES):
        _begin(walk, _FACTOR, log_a, first + 2 * n, N - n, 1.0)
        _exponentials(walk, N - n)
        for at in range(2 * n * Q, 2 * (n + LANES) * Q if count < Q else 0):
            table[at] = 0.0
        _walk(walk, count, table, 2 * n * Q, Q * LANES, LANES)
        for j in range(GROUP):
            ends[2 * n + j] = walk[j]


@common.kernel
def _coarse_powers(walk, ends, n, sign, chunks, table, wide):
    """p a^(q Q) for q < chunks of the group that begins with mode n, in rows of `wide` numbers; p stands in `walk`.

    With sign -1, a is conjugated.
    """
    for j in range(LANES):
        walk[_FACTOR + j], walk[_FACTOR + LANES + j] = ends[2 * n + j], sign * ends[2 * n + LANES + j]
    _walk(walk, chunks, table, 2 * n, LANES, wide)


@common.kernel
def tables(log_a, d, N, Q, length, walk, ends, fine, coarse, chunks, wide):
    """Powers of channel d: a^r as `_fine_powers` gives them, a^(q Q) as `_coarse_powers` does."""
    _fine_powers(log_a, 2 * d * N, N, Q, length, walk, fine, ends)
    for n in range(0, N, LANES):
        for j in range(LANES):
            walk[j], walk[LANES + j] = 1.0, 0.0
        _coarse_powers(walk, ends, n, 1.0, chunks, coarse, wide)


@common.kernel
def _product(left, wide, chunks, right, Q, out, first, length):
    """left (chunks, wide) times right (Q / LANES, wide, LANES): a row of `length` numbers, four chunks at a time."""
    for r in range(0, Q, LANES):
        for q in range(0, chunks, 4):
            a, b, c, d = zeros(), zeros(), zeros(), zeros()
            at = q * wide
            for m in range(wide):
                v = load(right, r * wide + m * LANES)
                a = multiply_add(v, fill(left[at + m]), a)
                b = multiply_add(v, fill(left[at + wide + m]), b)
                c = multiply_add(v, fill(left[at + 2 * wide + m]), c)
                d = multiply_add(v, fill(left[at + 3 * wide + m]), d)
            l = q * Q + r
            put(out, first + l, length - l, a)
            put(out, first + l + Q, length - l - Q, b)
            put(out, first + l + 2 * Q, length - l - 2 * Q, c)
            put(out, first + l + 3 * Q, length - l - 3 * Q, d)


@common.kernel
def _forward(start, stop, worker, log_a, coeff, K, D, N, Q, length, out):
    wide, chunks = (N + LANES - 1) // LANES * GROUP, (length + Q - 1) // Q
    walk, ends = np.empty(2 * GROUP), np.empty(wide)
    fine, right = np.empty(Q * wide, np.float32), np.empty(Q * wide, np.float32)
    left = np.zeros((chunks + 3) // 4 * 4 * wide, np.float32)
    for d in range(start, stop):
        _fine_powers(log_a, 2 * d * N, N, Q, length, walk, fine, ends)
        for m in range(0, wide, LANES):
            for r in range(0, Q, LANES):
                transpose(fine, m * Q + r * LANES, LANES, right, r * wide + m * LANES, LANES)
        for k in range(K):
            row = k * D + d
            for n in range(0, N, LANES):
                # Conjugated, as Re(c a) is the product of parts with those of the conjugate.
                _begin(walk, 0, coeff, 2 * (row * N + n), N - n, -1.0)
                _coarse_powers(walk, ends, n, -1.0, chunks, left, wide)
            _product(left, wide, chunks, right, Q, out, row * length, length)


@common.kernel
def _sums(slope, late, chunks, Q, fine, coarse, wide, n, sums):
    """Of the group that begins with mode n: the sums over l of g_l a^l and of l g_l a^l.

    With T_q and U_q, the sums of g a^r and r g a^r over chunk q, they are those of a^(q Q) T_q and a^(q Q) (q Q T_q +
    U_q).
    """
    gr, gi, hr, hi = zeros(), zeros(), zeros(), zeros()
    real, imag = 2 * n * Q, 2 * n * Q + Q * LANES
    for q in range(chunks):
        tr, ti, ur, ui = zeros(), zeros(), zeros(), zeros()
        for r in range(Q):
            fr, fi = load(fine, real + r * LANES), load(fine, imag + r * LANES)
            now, then = fill(slope[q * Q + r]), fill(late[q * Q + r])
            tr = multiply_add(fr, now, tr)
            ti = multiply_add(fi, now, ti)
            ur = multiply_add(fr, then, ur)
            ui = multiply_add(fi, then, ui)
        pr, pi = load(coarse, q * wide + 2 * n), load(coarse, q * wide + 2 * n + LANES)
        before = fill(_F(q * Q))
        ur = multiply_add(tr, before, ur)
        ui = multiply_add(ti, before, ui)
        gr, gi = gr + (pr * tr - pi * ti), gi + (pr * ti + pi * tr)
        hr, hi = hr + (pr * ur - pi * ui), hi + (pr * ui + pi * ur)
    store(sums, 0, gr)
    store(sums, LANES, gi)
    store(sums, 2 * LANES, hr)
    store(sums, 3 * LANES, hi)


@common.kernel
def _backward(start, stop, worker, grad, log_a, coeff, K, D, N, Q, length, d_log, d_coeff):
    wide, chunks = (N + LANES - 1) // LANES * GROUP, (length + Q - 1) // Q
    walk, ends, sums = np.empty(2 * GROUP), np.empty(wide), np.empty(2 * GROUP, np.float32)
    fine, coarse = np.empty(Q * wide, np.float32), np.empty(chunks * wide, np.float32)
    slope, late = np.zeros(chunks * Q, np.float32), np.zeros(chunks * Q, np.float32)
    for d in range(start, stop):
        tables(log_a, d, N, Q, length, walk, ends, fine, coarse, chunks, wide)
        for k in range(K):
            row = k * D + d
            for l in range(length):
                slope[l] = grad[row * length + l]
                late[l] = slope[l] * _F(l & (Q - 1))
            for n in range(0, N, LANES):
                _sums(slope, late, chunks, Q, fine, coarse, wide, n, sums)
                for j in range(min(LANES, N - n)):
                    at, of = 2 * (row * N + n + j), 2 * (d * N + n + j)
                    gr, gi, hr, hi = sums[j], sums[LANES + j], sums[2 * LANES + j], sums[3 * LANES + j]
                    cr, ci = coeff[at], coeff[at + 1]
                    d_coeff[at], d_coeff[at + 1] = gr, -gi
                    d_log[of] += cr * hr - ci * hi
                    d_log[of + 1] -= cr * hi + ci * hr


def chunk(length: int) -> int:
    """Q: at least a vector, at most what keeps the powers of a group in the first-level cache."""
    return min(max(split(length)[0], LANES), 128)


def forward(log_a: Tensor, coeff: Tensor, length: int) -> Tensor:
    """log_a (D, N), coeff (..., D, N): (..., D, length)."""
    D, N = log_a.shape
    K, out = math.prod(coeff.shape[:-2]), common.empty(*coeff.shape[:-1], length)
    common.run(
        _forward, D, common.pairs(log_a), common.pairs(coeff), K, D, N, chunk(length), length, common.words(out),
        inline=K * D * N * length < 1 << 19,
    )  # fmt: skip
    return out


def backward(grad: Tensor, log_a: Tensor, coeff: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Gradients of log_a and coeff."""
    (D, N), K = log_a.shape, math.prod(coeff.shape[:-2])
    d_log, d_coeff = torch.zeros(D, N, dtype=torch.complex64), torch.empty(coeff.shape, dtype=torch.complex64)
    common.run(
        _backward, D, common.words(grad), common.pairs(log_a), common.pairs(coeff), K, D, N, chunk(length), length,
        common.pairs(d_log), common.pairs(d_coeff), inline=K * D * N * length < 1 << 18,
    )  # fmt: skip
    return tuple(g if t.is_complex() else g.real.contiguous() for g, t in ((d_log, log_a), (d_coeff, coeff)))  # type: ignore[return-value]
