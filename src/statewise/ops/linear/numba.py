"""Products of a few rows with a large matrix: every weight is read once, at the speed of memory.

Two threads that each read a row after the other do not fill a memory bus; four rows at a time do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._simd import (
    LANES,
    REGISTERS,
    address,
    first_half,
    halves,
    inlined,
    lanes,
    load,
    memory,
    prefetch,
    put,
    second_half,
    store,
    total,
    zeros,
)  # fmt: skip

_F = np.float32
# Outputs of a task: few enough to share evenly, enough to be worth fetching the rows of x.
BLOCK = 16
_PAIR = 2 * LANES
_WIDE = REGISTERS >= 32
LIKE: dict[torch.dtype, Any] = {torch.float32: np.zeros(0, np.float32), torch.bfloat16: np.zeros(0, np.uint16)}


@common.kernel
def fetch(x, row, rows, depth, groups, norm, normed, eps, like, into, ld):
    """Rows of x as float32, padded with zeros to `ld` numbers; if `normed`, their RMS norm over groups of channels.

    Numbers are put into the order in which `dots` takes those of weights such as `like`.
    """
    part = depth // groups
    for r in range(rows):
        for k in range(depth // LANES * LANES, ld, LANES):
            store(into, r * ld + k, zeros())
        if normed:
            for g in range(groups):
                lo = g * part
                squares = zeros()
                for k in range(0, part, LANES):
                    v = lanes(x, r * row + lo + k, part - k)
                    squares = squares + v * v
                scale = _F(1) / np.sqrt(total(squares) / _F(part) + eps)
                for k in range(0, part, LANES):
                    v = lanes(x, r * row + lo + k, part - k) * scale * lanes(norm, lo + k, part - k)
                    put(into, r * ld + lo + k, part - k, v)
        else:
            for k in range(0, depth, LANES):
                put(into, r * ld + k, depth - k, lanes(x, r * row + k, depth - k))
        for k in range(0, depth - _PAIR + 1, _PAIR):
            halves(into[r * ld + k : r * ld + k + _PAIR], like)


@inlined
def _one_row(x, i, w, at, depth, outputs, o, sums, r):
    """One row of x with four rows of w."""
    w0, w1, w2, w3 = _starts(at, depth, outputs, o)
    s0, s1, s2, s3 = zeros(), zeros(), zeros(), zeros()
    whole = depth // _PAIR * _PAIR
    for k in range(0, whole, _PAIR):
        # The four rows that follow: rows are short, and the processor itself does not look past the page.
        p = address(w, w0 + 4 * depth + k)
        for line in range(0, _PAIR * w.itemsize, 64):
            prefetch(p + line)
            prefetch(p + line + depth * w.itemsize)
            prefetch(p + line + 2 * depth * w.itemsize)
            prefetch(p + line + 3 * depth * w.itemsize)
        u, v = load(x, i + k), load(x, i + k + LANES)
        s0 = s0 + first_half(w, w0 + k) * u + second_half(w, w0 + k) * v
        s1 = s1 + first_half(w, w1 + k) * u + second_half(w, w1 + k) * v
        s2 = s2 + first_half(w, w2 + k) * u + second_half(w, w2 + k) * v
        s3 = s3 + first_half(w, w3 + k) * u + second_half(w, w3 + k) * v
    for k in range(whole, depth, LANES):
        u, left = load(x, i + k), depth - k
        s0, s1 = s0 + lanes(w, w0 + k, left) * u, s1 + lanes(w, w1 + k, left) * u
        s2, s3 = s2 + lanes(w, w2 + k, left) * u, s3 + lanes(w, w3 + k, left) * u
    sums[r, o], sums[r, o + 1], sums[r, o + 2], sums[r, o + 3] = total(s0), total(s1), total(s2), total(s3)


@inlined
def _two_rows(x, i, ld, w, at, depth, outputs, o, sums, r):
    """Two rows of x with two rows of w: what fits the registers of AVX2."""
    w0, w1 = at + o * depth, at + min(o + 1, outputs - 1) * depth
    s00, s01, s10, s11 = zeros(), zeros(), zeros(), zeros()
    whole = depth // _PAIR * _PAIR
    for k in range(0, whole, _PAIR):
        u, v = load(x, i + k), load(x, i + ld + k)
        a, b = first_half(w, w0 + k), first_half(w, w1 + k)
        s00, s01, s10, s11 = s00 + a * u, s01 + a * v, s10 + b * u, s11 + b * v
        u, v = load(x, i + k + LANES), load(x, i + ld + k + LANES)
        a, b = second_half(w, w0 + k), second_half(w, w1 + k)
        s00, s01, s10, s11 = s00 + a * u, s01 + a * v, s10 + b * u, s11 + b * v
    for k in range(whole, depth, LANES):
        u, v, left = load(x, i + k), load(x, i + ld + k), depth - k
        a, b = lanes(w, w0 + k, left), lanes(w, w1 + k, left)
        s00, s01, s10, s11 = s00 + a * u, s01 + a * v, s10 + b * u, s11 + b * v
    sums[r, o], sums[r, o + 1], sums[r + 1, o], sums[r + 1, o + 1] = total(s00), total(s10), total(s01), total(s11)


@inlined
def _four_rows(x, i, ld, w, at, depth, outputs, o, sums, r):
    """Four rows of x with four rows of w: sixteen sums for the registers of AVX-512."""
    w0, w1, w2, w3 = _starts(at, depth, outputs, o)
    s00, s01, s02, s03 = zeros(), zeros(), zeros(), zeros()
    s10, s11, s12, s13 = zeros(), zeros(), zeros(), zeros()
    s20, s21, s22, s23 = zeros(), zeros(), zeros(), zeros()
    s30, s31, s32, s33 = zeros(), zeros(), zeros(), zeros()
    whole = depth // _PAIR * _PAIR
    for k in range(0, depth, LANES):
        m = i + k
        u0, u1, u2, u3 = load(x, m), load(x, m + ld), load(x, m + 2 * ld), load(x, m + 3 * ld)
        if k < whole:
            if k % _PAIR == 0:
                a, b, c, d = first_half(w, w0 + k), first_half(w, w1 + k), first_half(w, w2 + k), first_half(w, w3 + k)
            else:
                p = k - LANES
                a, b = second_half(w, w0 + p), second_half(w, w1 + p)
                c, d = second_half(w, w2 + p), second_half(w, w3 + p)
        else:
            left = depth - k
            a, b, c, d = lanes(w, w0 + k, left), lanes(w, w1 + k, left), lanes(w, w2 + k, left), lanes(w, w3 + k, left)
        s00, s01, s02, s03 = s00 + a * u0, s01 + a * u1, s02 + a * u2, s03 + a * u3
        s10, s11, s12, s13 = s10 + b * u0, s11 + b * u1, s12 + b * u2, s13 + b * u3
        s20, s21, s22, s23 = s20 + c * u0, s21 + c * u1, s22 + c * u2, s23 + c * u3
        s30, s31, s32, s33 = s30 + d * u0, s31 + d * u1, s32 + d * u2, s33 + d * u3
    sums[r, o], sums[r, o + 1], sums[r, o + 2], sums[r, o + 3] = total(s00), total(s10), total(s20), total(s30)
    r += 1
    sums[r, o], sums[r, o + 1], sums[r, o + 2], sums[r, o + 3] = total(s01), total(s11), total(s21), total(s31)
    r += 1
    sums[r, o], sums[r, o + 1], sums[r, o + 2], sums[r, o + 3] = total(s02), total(s12), total(s22), total(s32)
    r += 1
    sums[r, o], sums[r, o + 1], sums[r, o + 2], sums[r, o + 3] = total(s03), total(s13), total(s23), total(s33)


@inlined
def _starts(at, depth, outputs, o):
    """Where four rows of w start. Past the last output the last one is taken again; nobody reads its sum."""
    return (
        at + o * depth,
        at + min(o + 1, outputs - 1) * depth,
        at + min(o + 2, outputs - 1) * depth,
        at + min(o + 3, outputs - 1) * depth,
    )


@common.kernel
def dots(x, rows, ld, w, at, depth, outputs, sums):
    """sums[r, o] = x[r, :] . w[o, :] for 16 outputs or fewer; x is as `fetch` leaves it, its rows `ld` apart.

    Row o of w starts at `at + o depth`.
    """
    for o in range(0, outputs, 4):
        r = 0
        while r < rows:
            if _WIDE and rows - r >= 4:
                _four_rows(x, r * ld, ld, w, at, depth, outputs, o, sums, r)
                r += 4
            elif rows - r >= 2:
                _two_rows(x, r * ld, ld, w, at, depth, outputs, o, sums, r)
                _two_rows(x, r * ld, ld, w, at, depth, outputs, min(o + 2, outputs - 1), sums, r)
                r += 2
            else:
                _one_row(x, r * ld, w, at, depth, outputs, o, sums, r)
                r += 1


@common.kernel
def rows_times_matrix(
    start, stop, worker, x_like, x_at, x_row, rows, depth, groups, norm_like, norm_at, eps, like, w_at, bias_at,
    outputs, y_like, add_at, y_at, y_row,
):  # fmt: skip
    """y[r, o] = x[r, :] . w[o, :] + bias[o] + add[r, o], for `start <= o / BLOCK < stop`; x through an RMS norm first.

    What is absent stands at address 0. `add` is laid out like y.
    """
    x, w, bias = memory(x_at, x_like), memory(w_at, like), memory(bias_at, like)
    add, y = memory(add_at, y_like), memory(y_at, y_like)
    ld = (depth + LANES - 1) // LANES * LANES
    wide = np.empty(rows * ld, np.float32)
    sums = np.empty((rows, BLOCK + 4), np.float32)
    flat = sums.reshape(-1)
    fetch(x, x_row, rows, depth, groups, memory(norm_at, norm_like), norm_at != 0, eps, w, wide, ld)
    for block in range(start, stop):
        o = block * BLOCK
        count = min(BLOCK, outputs - o)
        dots(wide, rows, ld, w, o * depth, depth, count, sums)
        for r in range(rows):
            s = load(flat, r * (BLOCK + 4))
            if bias_at != 0:
                s = s + lanes(bias, o, count)
            if add_at != 0:
                s = s + lanes(add, r * y_row + o, count)
            put(y, r * y_row + o, count, s)


def blocks(outputs: int) -> int:
    return -(-outputs // BLOCK)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, K), weight (O, K), bias (O,), all dense and of one dtype, float32 or bfloat16 -> (rows, O)."""
    (rows, depth), outputs, like = x.shape, weight.shape[0], LIKE[x.dtype]
    y = torch.empty((rows, outputs), dtype=x.dtype)
    common.run(
        rows_times_matrix, blocks(outputs), like, x.data_ptr(), depth, rows, depth, 1, like, 0, _F(0), like,
        weight.data_ptr(), 0 if bias is None else bias.data_ptr(), outputs, like, 0, y.data_ptr(), outputs,
        inline=rows * outputs * depth < 40_000,
    )  # fmt: skip
    return y
