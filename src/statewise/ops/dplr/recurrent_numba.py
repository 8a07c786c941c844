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
from .reference import resolvent, stepper

_GROUP = 2 * LANES


@common.kernel
def _forward(start, stop, worker, u, ub, ul, marks, marked, table, x0, given, D, width, R, length, y, last):
    """`table` holds for each channel d, b, c, into_0 ... and out_0 ..., each in `width` numbers."""
    x, weights = np.empty(width), np.empty(R)
    each = (3 + 2 * R) * width
    for block in range(start, stop):
        d, row = block % D, block // D
        base = d * each
        first = base + 3 * width
        for j in range(width):
            x[j] = x0[block * width + j] if given else 0.0
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
        for j in range(width):
            last[block * width + j] = x[j]


def _grouped(t: Tensor) -> Tensor:
    """(..., N) complex as (..., width) float64, modes filled up with zeros to whole groups."""
    t = t.to(torch.complex128)
    N = t.shape[-1]
    t = torch.nn.functional.pad(t, (0, -N % LANES)).unflatten(-1, (-1, LANES))
    return torch.stack([t.real, t.imag], -2).flatten(-3)


def _whole(t: Tensor, N: int) -> Tensor:
    """The inverse of `_grouped`."""
    real, imag = t.unflatten(-1, (-1, 2, LANES)).unbind(-2)
    return torch.complex(real, imag).flatten(-2)[..., :N]


def run(
    u: Tensor, w: Tensor, p: Tensor, b: Tensor, c: Tensor, state: Tensor | None, marks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.dplr_ssm` without the skip, and without gradients: y float32, the state complex64."""
    (B, length, D), N, R = u.shape, w.shape[1], len(p)
    w, p, b, c = (t.to(torch.complex128) for t in (w, p, b, c))
    g, inner = resolvent(w, p)
    # The step of `forms.increment`; the parts of conj(z) dotted with those of x are Re(z x).
    into = torch.einsum("drs,sdn->rdn", inner.to(w.dtype), 2 * p * torch.conj_physical(g))
    table = _grouped(torch.stack([w * g, stepper(w, p)(b), 2 * torch.conj_physical(c), *into, *(-2 * g * p)], 1))
    width = table.shape[-1]
    y, last = common.empty(B, length, D), torch.empty(B, D, width, dtype=torch.float64)
    memory, (ub, ul) = common.rows(u.to(torch.float32))
    start, no_marks = last[:0] if state is None else _grouped(state), torch.empty(0, dtype=torch.uint8)
    common.run(
        _forward, B * D, memory, ub, ul, common.array((no_marks if marks is None else marks).flatten()),
        marks is not None, common.array(table.flatten()), common.array(start.flatten()), state is not None,
        D, width, R, length, common.words(y), common.array(last).reshape(-1), inline=B * D * N * length < 1 << 15,
    )  # fmt: skip
    return y, _whole(last, N).to(torch.complex64)
