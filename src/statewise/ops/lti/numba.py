"""CPU kernels of the long convolution: Fourier transforms across sixteen channels at a time.

Channels lie side by side in memory, so each vector holds the same point of sixteen transforms and no butterfly has to
move a lane. Two rows of the batch share one complex transform as its real and imaginary part: a convolution with a real
kernel keeps them apart. The forward transform leaves its result in scrambled order and the inverse one starts from it,
so nothing is ever sorted; the zeros that pad a row to twice its length are never loaded, and what would be cut off is
never computed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._simd import LANES, inlined, lanes, load, put, store, zeros
from .convolution import least_points

_F = np.float32
# Points of a block whose transforms are finished one after the other: at 128 bytes a point, an eighth of a megabyte.
_BLOCK = 1024


@lru_cache(maxsize=8)
def _circle(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of -2 pi j / points."""
    angle = -2 * np.pi * np.arange(points) / points
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@inlined
def _times(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@common.kernel
def _split_four(re, im, start, n, cosine, sine, stride):
    """One step of the forward transform of n points: four transforms of n / 4 points side by side.

    re, im hold sixteen lanes a point; a turn by 2 pi / n is entry `stride` of the circle.
    """
    q = n // 4
    for j in range(q):
        a, b, c, d = (
            (start + j) * LANES,
            (start + j + q) * LANES,
            (start + j + 2 * q) * LANES,
            (start + j + 3 * q) * LANES,
        )
        ar, ai, br, bi = load(re, a), load(im, a), load(re, b), load(im, b)
        cr, ci, dr, di = load(re, c), load(im, c), load(re, d), load(im, d)
        er, ei, fr, fi = ar + cr, ai + ci, ar - cr, ai - ci
        gr, gi, hr, hi = br + dr, bi + di, bi - di, dr - br  # h = -i (b - d)
        store(re, a, er + gr)
        store(im, a, ei + gi)
        w = 2 * j * stride
        vr, vi = _times(er - gr, ei - gi, cosine[w], sine[w])
        store(re, b, vr)
        store(im, b, vi)
        w = j * stride
        vr, vi = _times(fr + hr, fi + hi, cosine[w], sine[w])
        store(re, c, vr)
        store(im, c, vi)
        w = 3 * j * stride
        vr, vi = _times(fr - hr, fi - hi, cosine[w], sine[w])
        store(re, d, vr)
        store(im, d, vi)


@common.kernel
def _join_four(re, im, start, n, cosine, sine, stride):
    """The inverse of `_split_four`, but for a factor 4."""
    q = n // 4
    for j in range(q):
        a, b, c, d = (
            (start + j) * LANES,
            (start + j + q) * LANES,
            (start + j + 2 * q) * LANES,
            (start + j + 3 * q) * LANES,
        )
        ar, ai = load(re, a), load(im, a)
        w = 2 * j * stride
        br, bi = _times(load(re, b), load(im, b), cosine[w], -sine[w])
        w = j * stride
        cr, ci = _times(load(re, c), load(im, c), cosine[w], -sine[w])
        w = 3 * j * stride
        dr, di = _times(load(re, d), load(im, d), cosine[w], -sine[w])
        er, ei, gr, gi = ar + br, ai + bi, ar - br, ai - bi
        fr, fi, hr, hi = cr + dr, ci + di, di - ci, cr - dr  # h = i (c - d)
        store(re, a, er + fr)
        store(im, a, ei + fi)
        store(re, c, er - fr)
        store(im, c, ei - fi)
        store(re, b, gr + hr)
        store(im, b, gi + hi)
        store(re, d, gr - hr)
        store(im, d, gi - hi)


@common.kernel
def _split_two(re, im, start):
    a, b = start * LANES, (start + 1) * LANES
    ar, ai, br, bi = load(re, a), load(im, a), load(re, b), load(im, b)
    store(re, a, ar + br)
    store(im, a, ai + bi)
    store(re, b, ar - br)
    store(im, b, ai - bi)


@common.kernel
def _transform(re, im, start, n, points, cosine, sine):
    """Forward, in scrambled order. Large blocks are split step by step; small ones are finished while in cache."""
    m = n
    while m > _BLOCK:
        for s in range(start, start + n, m):
            _split_four(re, im, s, m, cosine, sine, points // m)
        m //= 4
    for block in range(start, start + n, m):
        size = m
        while size >= 4:
            for s in range(block, block + m, size):
                _split_four(re, im, s, size, cosine, sine, points // size)
            size //= 4
        if size == 2:
            for s in range(block, block + m, 2):
                _split_two(re, im, s)


@common.kernel
def _back(re, im, start, n, points, cosine, sine):
    """The inverse of `_transform`, but for a factor n."""
    m = n
    while m > _BLOCK:
        m //= 4
    for block in range(start, start + n, m):
        size = m
        while size >= 4:
            size //= 4
        if size == 2:
            for s in range(block, block + m, 2):
                _split_two(re, im, s)
        size *= 4
        while size <= m:
            for s in range(block, block + m, size):
                _join_four(re, im, s, size, cosine, sine, points // size)
            size *= 4
    while m < n:
        m *= 4
        for s in range(start, start + n, m):
            _join_four(re, im, s, m, cosine, sine, points // m)


@common.kernel
def _load_rows(u, first, second, two, row, c, count, length, re, im, points, cosine, sine):
    """Two rows as one complex sequence, padded with zeros to `points`, after the first step of its transform."""
    half = points // 2
    for t in range(half):
        a, b = t * LANES, (t + half) * LANES
        if t >= length:
            store(re, a, zeros())
            store(im, a, zeros())
            store(re, b, zeros())
            store(im, b, zeros())
            continue
        x = lanes(u, first + t * row + c, count)
        y = lanes(u, second + t * row + c, count) if two else zeros()
        store(re, a, x)
        store(im, a, y)
        x, y = _times(x, y, cosine[t], sine[t])
        store(re, b, x)
        store(im, b, y)


@common.kernel
def _spectrum(u, first, second, two, row, c, count, length, re, im, points, cosine, sine):
    half = points // 2
    _load_rows(u, first, second, two, row, c, count, length, re, im, points, cosine, sine)
    _transform(re, im, 0, half, points, cosine, sine)
    _transform(re, im, half, half, points, cosine, sine)


@common.kernel
def _taps_to_spectrum(kernel, taps, future, ahead, channels, c, count, re, im, points, cosine, sine):
    """Both kernels on one circle, the past in its first half, the future in its second: lag -1 is the last point."""
    half = points // 2
    for t in range(half):
        a, b = t * LANES, (t + half) * LANES
        later = half - 1 - t
        x = lanes(kernel, t * channels + c, count) if t < taps else zeros()
        y = lanes(future, later * channels + c, count) if later < ahead else zeros()
        store(re, a, x + y)
        store(im, a, zeros())
        x, y = _times(x - y, zeros(), cosine[t], sine[t])
        store(re, b, x)
        store(im, b, y)
    _transform(re, im, 0, half, points, cosine, sine)
    _transform(re, im, half, half, points, cosine, sine)


@common.kernel
def _spectrum_to_taps(re, im, points, cosine, sine, taps, kernel, ahead, future, channels, c, count):
    half = points // 2
    _back(re, im, 0, half, points, cosine, sine)
    _back(re, im, half, half, points, cosine, sine)
    scale = _F(1) / _F(points)
    for t in range(half):
        a, b = t * LANES, (t + half) * LANES
        later = half - 1 - t
        x, _ = _times(load(re, b), load(im, b), cosine[t], -sine[t])
        if t < taps:
            put(kernel, t * channels + c, count, (load(re, a) + x) * scale)
        if later < ahead:
            put(future, later * channels + c, count, (load(re, a) - x) * scale)


@common.kernel
def _sequence(re, im, points, cosine, sine, length, out, first, second, two, row, c, count):
    """Back to time; the first `length` positions go to two rows of `out`."""
    half = points // 2
    _back(re, im, 0, half, points, cosine, sine)
    _back(re, im, half, half, points, cosine, sine)
    scale = _F(1) / _F(points)
    for t in range(length):
        a, b = t * LANES, (t + half) * LANES
        x, y = _times(load(re, b), load(im, b), cosine[t], -sine[t])
        put(out, first + t * row + c, count, (load(re, a) + x) * scale)
        if two:
            put(out, second + t * row + c, count, (load(im, a) + y) * scale)


@common.kernel
def _forward(start, stop, worker, rows, L, channels, u, ub, ul, kernel, taps, future, ahead, points, cosine, sine, y):
    kr, ki = np.empty(points * LANES, np.float32), np.empty(points * LANES, np.float32)
    re, im = np.empty(points * LANES, np.float32), np.empty(points * LANES, np.float32)
    for task in range(start, stop):
        c = task * LANES
        n = channels - c
        _taps_to_spectrum(kernel, taps, future, ahead, channels, c, n, kr, ki, points, cosine, sine)
        for b in range(0, rows, 2):
            two = b + 1 < rows
            _spectrum(u, b * ub, (b + 1) * ub, two, ul, c, n, L, re, im, points, cosine, sine)
            for k in range(0, points * LANES, LANES):
                x, z = _times(load(re, k), load(im, k), load(kr, k), load(ki, k))
                store(re, k, x)
                store(im, k, z)
            first = b * L * channels
            _sequence(re, im, points, cosine, sine, L, y, first, first + L * channels, two, channels, c, n)


@common.kernel
def _backward(
    start, stop, worker, rows, L, channels, dy, gb, gl, u, ub, ul, kernel, taps, future, ahead, points, cosine, sine,
    du, dkernel, dfuture,
):  # fmt: skip
    kr, ki = np.empty(points * LANES, np.float32), np.empty(points * LANES, np.float32)
    re, im = np.empty(points * LANES, np.float32), np.empty(points * LANES, np.float32)
    gr, gi = np.empty(points * LANES, np.float32), np.empty(points * LANES, np.float32)
    sr, si = np.empty(points * LANES, np.float32), np.empty(points * LANES, np.float32)
    for task in range(start, stop):
        c = task * LANES
        n = channels - c
        _taps_to_spectrum(kernel, taps, future, ahead, channels, c, n, kr, ki, points, cosine, sine)
        sr[:] = _F(0)
        si[:] = _F(0)
        for b in range(0, rows, 2):
            two = b + 1 < rows
            _spectrum(u, b * ub, (b + 1) * ub, two, ul, c, n, L, re, im, points, cosine, sine)
            _spectrum(dy, b * gb, (b + 1) * gb, two, gl, c, n, L, gr, gi, points, cosine, sine)
            for k in range(0, points * LANES, LANES):
                # A conjugated spectrum runs backwards in time: it correlates. The part that mixes the two rows comes
                # out imaginary and is dropped.
                ar, ai, br, bi = load(gr, k), load(gi, k), load(re, k), load(im, k)
                store(sr, k, load(sr, k) + (ar * br + ai * bi))
                store(si, k, load(si, k) + (ai * br - ar * bi))
                br, bi = load(kr, k), load(ki, k)
                store(gr, k, ar * br + ai * bi)
                store(gi, k, ai * br - ar * bi)
            first = b * L * channels
            _sequence(gr, gi, points, cosine, sine, L, du, first, first + L * channels, two, channels, c, n)
        _spectrum_to_taps(sr, si, points, cosine, sine, taps, dkernel, ahead, dfuture, channels, c, n)


_NONE = np.empty(0, np.float32)


def _points(L: int, kernel: Tensor, future: Tensor | None) -> int:
    # A row has to fit into the first half of the points: see `_load_rows` and `_sequence`.
    return max(4, 1 << (max(least_points(L, kernel, future), 2 * L - 1) - 1).bit_length())


def _ahead(future: Tensor | None) -> tuple[np.ndarray, int]:
    return _NONE if future is None else common.words(future.mT), _taps(future)


def _taps(kernel: Tensor | None) -> int:
    return 0 if kernel is None else kernel.shape[1]


def forward(u: Tensor, kernel: Tensor, future: Tensor | None) -> Tensor:
    """u (B, L, D), kernel (D, K) with K <= L, future (D, F) with F < L."""
    rows, L, channels = u.shape
    y = common.empty(*u.shape)
    points = _points(L, kernel, future)
    memory, (ub, ul) = common.rows(u)
    common.run(
        _forward, -(-channels // LANES), rows, L, channels, memory, ub, ul, common.words(kernel.mT), _taps(kernel),
        *_ahead(future), points, *_circle(points), common.words(y), inline=u.numel() < 1 << 15,
    )  # fmt: skip
    return y


def backward(dy: Tensor, u: Tensor, kernel: Tensor, future: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, kernel and future (empty if there is none)."""
    rows, L, channels = u.shape
    du = common.empty(*u.shape)
    dkernel, dfuture = torch.empty(_taps(kernel), channels), torch.empty(_taps(future), channels)
    points = _points(L, kernel, future)
    (grad, (gb, gl)), (memory, (ub, ul)) = common.rows(dy), common.rows(u)
    common.run(
        _backward, -(-channels // LANES), rows, L, channels, grad, gb, gl, memory, ub, ul, common.words(kernel.mT),
        _taps(kernel), *_ahead(future), points, *_circle(points), common.words(du), common.words(dkernel),
        common.words(dfuture), inline=u.numel() < 1 << 15,
    )  # fmt: skip
    return du, dkernel.mT.contiguous(), u.new_empty(0) if future is None else dfuture.mT.contiguous()
