"""CPU kernel of the recurrence of a diagonal-plus-low-rank system: all tokens of a row in one loop.

In float64, sixteen modes at a time: real parts, then imaginary parts. A step is an increment of the state,
x += d x + sum_r out_r (into_r . x) + b u, so that modes which decay slowly keep the digits of their decay.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...segments import INVALID, RESET
from .. import _numba as common
from .._simd import LANES, load_wide, store_wide, total
from .reference import resolvent, solve

_GROUP = 2 * LANES
_NO_MARKS = np.empty(0, np.uint8)


@common.kernel
def _fill(x, state, at, N, given):
    """From pairs to groups, which are filled up with zeros."""
    for n in range(0, x.size, _GROUP):
        for j in range(LANES):
            inside = given and n // 2 + j < N
            x[n + j] = state[at + n + 2 * j] if inside else 0.0
            x[n + LANES + j] = state[at + n + 2 * j + 1] if inside else 0.0


@common.kernel
def _forward(start, stop, worker, u, ub, ul, marks, marked, table, state, given, D, N, R, length, y, last):
    """`table` holds for each channel d, b, c, into_0 ... and out_0 ..., each in `width` numbers."""
    width = (N + LANES - 1) // LANES * _GROUP
    x, weights = np.empty(width), np.empty(R)
    for block in range(start, stop):
        d, row = block % D, block // D
        base = d * (3 + 2 * R) * width
        first = base + 3 * width
        _fill(x, state, 2 * block * N, N, given)
        for r in range(R):
            weights[r] = 0.0
            for j in range(width):
                weights[r] += table[first + r * width + j] * x[j]
        for t in range(length):
            mark = marks[row * length + t] if marked else 0
            if mark == INVALID:
                y[(row * length + t) * D + d] = 0.0
                continue
            if mark == RESET:
                for j in range(width):
                    x[j] = 0.0
                for r in range(R):
                    weights[r] = 0.0
            v = np.float64(u[row * ub + t * ul + d])
            for n in range(0, width, _GROUP):
                at = base + n
                xr, xi = load_wide(x, n), load_wide(x, n + LANES)
                dr, di = load_wide(table, at), load_wide(table, at + LANES)
                hr = xr + (dr * xr - di * xi) + load_wide(table, at + width) * v
                hi = xi + (dr * xi + di * xr) + load_wide(table, at + width + LANES) * v
                for r in range(R):
                    out = first + (R + r) * width + n
                    hr = hr + load_wide(table, out) * weights[r]
                    hi = hi + load_wide(table, out + LANES) * weights[r]
                store_wide(x, n, hr)
                store_wide(x, n + LANES, hi)
            read = 0.0
            for r in range(R):
                weights[r] = 0.0
            for n in range(0, width, _GROUP):
                hr, hi = load_wide(x, n), load_wide(x, n + LANES)
                at = base + 2 * width + n
                read += total(load_wide(table, at) * hr + load_wide(table, at + LANES) * hi)
                for r in range(R):
                    at = first + r * width + n
                    weights[r] += total(load_wide(table, at) * hr + load_wide(table, at + LANES) * hi)
            y[(row * length + t) * D + d] = read
        for n in range(N):
            at = n // LANES * _GROUP + n % LANES
            last[2 * (block * N + n)], last[2 * (block * N + n) + 1] = x[at], x[at + LANES]


def _grouped(t: Tensor) -> Tensor:
    """(..., N) complex128 as (..., width) float64, modes filled up with zeros to whole groups."""
    t = torch.nn.functional.pad(t, (0, -t.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    return torch.stack([t.real, t.imag], -2).flatten(-3)


def prepare(w: Tensor, p: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What the loop needs of the coefficients, (D, 3 + 2 R, width)."""
    w, p, b, c = (t.to(torch.complex128) for t in (w, p, b, c))
    g, inner = resolvent(w, p)
    # The step of `forms.increment`; the parts of conj(z) dotted with those of x are Re(z x).
    into = torch.einsum("drs,sdn->rdn", inner.to(w.dtype), 2 * p * torch.conj_physical(g))
    return _grouped(torch.stack([w * g, solve(p, g, inner, b), 2 * torch.conj_physical(c), *into, *(-2 * g * p)], 1))


def run(table: Tensor, u: Tensor, state: Tensor | None, marks: Tensor | None, N: int) -> tuple[Tensor, Tensor]:
    """`reference.dplr_ssm` without the skip, and without gradients: y float32, the state complex64."""
    (B, length, D), R = u.shape, table.shape[1] // 2 - 1
    y, last = common.empty(B, length, D), torch.empty(B, D, N, dtype=torch.complex64)
    memory, (ub, ul) = common.rows(u.to(torch.float32))
    common.run(
        _forward, B * D, memory, ub, ul, _NO_MARKS if marks is None else common.array(marks.flatten()),
        marks is not None, common.array(table).reshape(-1), common.pairs(last[:0] if state is None else state),
        state is not None, D, N, R, length, common.words(y), common.pairs(last), inline=B * D * N * length < 1 << 15,
    )  # fmt: skip
    return y, last
