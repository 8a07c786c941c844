"""Matrix products and sums whose order of addition is fixed: the kernels of `statewise.deterministic`.

A library picks the kernel of a matrix product, and with it the order of addition, by the shape of its arguments. Here
each output is one chain of multiply-adds along the inner axis. So a row of the result depends on its own row and on the
other matrix only: not on how many rows there are, where it stands among them, or how many threads work.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _numba as common
from ._simd import LANES, fill, lanes, load, multiply_add, put, store, total, transpose, zeros

_F = np.float32
_COLUMNS = 64  # of a panel: four vectors
_ROWS = 256  # of a task
# Longer products and sums are made in pieces of this length, so that rounding does not pile up.
_PIECE, _STRETCH = 512, 4096


@common.kernel
def _pack(b, at, along, across, k0, steps, j0, width, panel):
    """b[k0 : k0 + steps, j0 : j0 + width] into (steps, 64), with zeros past `width`.

    Element (k, j) lies at `at + k along + j across`; one of the two strides is 1.
    """
    if across == 1:
        for k in range(steps):
            row = at + (k0 + k) * along + j0
            for j in range(0, _COLUMNS, LANES):
                store(panel, k * _COLUMNS + j, lanes(b, row + j, width - j) if j < width else zeros())
        return
    for k in range(0, steps, LANES):
        for j in range(0, _COLUMNS, LANES):
            if k + LANES <= steps and j + LANES <= width:
                transpose(b, at + (j0 + j) * across + k0 + k, across, panel, k * _COLUMNS + j, _COLUMNS)
            else:
                for i in range(k, min(k + LANES, steps)):
                    for l in range(j, j + LANES):
                        panel[i * _COLUMNS + l] = b[at + (j0 + l) * across + k0 + i] if l < width else _F(0)


@common.kernel
def _product(start, stop, worker, a, a_batch, a_row, b, b_batch, along, across, y, rows, depth, columns, chain):
    panels, groups = (columns + _COLUMNS - 1) // _COLUMNS, (rows + _ROWS - 1) // _ROWS
    panel = np.zeros((_PIECE + LANES) * _COLUMNS, np.float32)
    part = np.zeros(4 * _COLUMNS, np.float32)
    for task in range(start, stop):
        m, group, j0 = task // (panels * groups), task // panels % groups, task % panels * _COLUMNS
        width = columns - j0
        first, last = group * _ROWS, min(rows, group * _ROWS + _ROWS)
        for k0 in range(0, depth, _PIECE):
            steps = min(_PIECE, depth - k0)
            _pack(b, m * b_batch, along, across, k0, steps, j0, width, panel)
            for r in range(first, last, 4):
                count = min(4, last - r)
                out = (m * rows + r) * columns + j0
                if chain and k0 > 0:
                    for i in range(count):
                        for j in range(0, _COLUMNS, LANES):
                            if j < width:
                                store(part, i * _COLUMNS + j, lanes(y, out + i * columns + j, width - j))
                else:
                    part[:] = _F(0)
                i0 = m * a_batch + r * a_row + k0
                if count == 4:
                    _four_rows(a, i0, a_row, panel, steps, part)
                else:
                    for i in range(count):
                        _one_row(a, i0 + i * a_row, panel, steps, part, i * _COLUMNS)
                for i in range(count):
                    for j in range(0, _COLUMNS, LANES):
                        if j < width:
                            to = out + i * columns + j
                            s = load(part, i * _COLUMNS + j)
                            if k0 > 0 and not chain:
                                s = s + lanes(y, to, width - j)
                            put(y, to, width - j, s)


@common.kernel
def _four_rows(a, i0, row, panel, steps, part):
    i1, i2, i3 = i0 + row, i0 + 2 * row, i0 + 3 * row
    s00, s01, s02, s03 = load(part, 0), load(part, 16), load(part, 32), load(part, 48)
    s10, s11, s12, s13 = load(part, 64), load(part, 80), load(part, 96), load(part, 112)
    s20, s21, s22, s23 = load(part, 128), load(part, 144), load(part, 160), load(part, 176)
    s30, s31, s32, s33 = load(part, 192), load(part, 208), load(part, 224), load(part, 240)
    for k in range(steps):
        m = k * _COLUMNS
        b0, b1, b2, b3 = load(panel, m), load(panel, m + 16), load(panel, m + 32), load(panel, m + 48)
        e = fill(a[i0 + k])
        s00, s01 = multiply_add(b0, e, s00), multiply_add(b1, e, s01)
        s02, s03 = multiply_add(b2, e, s02), multiply_add(b3, e, s03)
        e = fill(a[i1 + k])
        s10, s11 = multiply_add(b0, e, s10), multiply_add(b1, e, s11)
        s12, s13 = multiply_add(b2, e, s12), multiply_add(b3, e, s13)
        e = fill(a[i2 + k])
        s20, s21 = multiply_add(b0, e, s20), multiply_add(b1, e, s21)
        s22, s23 = multiply_add(b2, e, s22), multiply_add(b3, e, s23)
        e = fill(a[i3 + k])
        s30, s31 = multiply_add(b0, e, s30), multiply_add(b1, e, s31)
        s32, s33 = multiply_add(b2, e, s32), multiply_add(b3, e, s33)
    store(part, 0, s00), store(part, 16, s01), store(part, 32, s02), store(part, 48, s03)
    store(part, 64, s10), store(part, 80, s11), store(part, 96, s12), store(part, 112, s13)
    store(part, 128, s20), store(part, 144, s21), store(part, 160, s22), store(part, 176, s23)
    store(part, 192, s30), store(part, 208, s31), store(part, 224, s32), store(part, 240, s33)


@common.kernel
def _one_row(a, i0, panel, steps, part, at):
    s0, s1, s2, s3 = load(part, at), load(part, at + 16), load(part, at + 32), load(part, at + 48)
    for k in range(steps):
        m = k * _COLUMNS
        e = fill(a[i0 + k])
        s0, s1 = multiply_add(load(panel, m), e, s0), multiply_add(load(panel, m + 16), e, s1)
        s2, s3 = multiply_add(load(panel, m + 32), e, s2), multiply_add(load(panel, m + 48), e, s3)
    store(part, at, s0), store(part, at + 16, s1), store(part, at + 32, s2), store(part, at + 48, s3)


@common.kernel
def _sums(start, stop, worker, x, width, y):
    for r in range(start, stop):
        far = zeros()
        for j0 in range(0, width, _STRETCH):
            near = zeros()
            for j in range(j0, min(width, j0 + _STRETCH), LANES):
                near = near + lanes(x, r * width + j, width - j)
            far = far + near
        y[r] = total(far)


@common.kernel
def _plain_sums(start, stop, worker, x, y):
    for r in range(start, stop):
        s = 0.0
        for j in range(x.shape[1]):
            s += x[r, j]
        y[r] = s


def _flat(t: Tensor) -> np.ndarray:
    """The memory under a float32 tensor (n, R, C) whose last axis is dense, from its first element on."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return np.from_dlpack(t.detach().as_strided((span,), (1,)))


def product(a: Tensor, b: Tensor, chain: bool) -> Tensor:
    """Arguments as `statewise::fixed_product` in `_fixed`."""
    (n, rows, depth), columns = a.shape, b.shape[2]
    a, b = a.to(torch.float32), b.to(torch.float32)
    y = common.empty(n, rows, columns)
    if 0 in (n, rows, columns):
        return y
    if depth == 0:
        return y.zero_()
    if depth > 1 and a.stride(2) != 1:
        a = a.contiguous()
    if columns > 1 and b.stride(2) != 1 and b.stride(1) != 1:
        b = b.contiguous()
    dense = columns == 1 or b.stride(2) == 1
    along, across = (b.stride(1), 1) if dense else (1, b.stride(2))
    tasks = n * -(-rows // _ROWS) * -(-columns // _COLUMNS)
    common.run(
        _product, tasks, _flat(a), a.stride(0), a.stride(1), _flat(b if dense else b.mT), b.stride(0), along, across,
        y.numpy().reshape(-1), rows, depth, columns, chain, inline=n * rows * depth * columns < 100_000,
    )  # fmt: skip
    return y


def sums(x: Tensor) -> Tensor:
    """(rows, width) -> (rows,), both float32, or both float64."""
    if x.dtype == torch.float64:
        wide = torch.empty(len(x), dtype=torch.float64)
        common.run(_plain_sums, len(x), x.contiguous().numpy(), wide.numpy(), inline=x.numel() < 16384)
        return wide
    y = common.empty(len(x))
    common.run(_sums, len(x), common.array(x.contiguous()).reshape(-1), x.shape[1], y.numpy(), inline=x.numel() < 16384)
    return y
