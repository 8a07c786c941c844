"""The diagonal recurrence one token after the other, in a fixed order: the kernel of `statewise.deterministic`.

A task is one row and one block of channels; the modes of a channel lie across the lanes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._simd import LANES, lanes, load, multiply_add, put, store, total, zeros

_BLOCK = 16  # channels of a task
_NO_MARKS = np.zeros((0, 0), np.uint8)


@common.kernel
def _forward(start, stop, worker, u, ar, ai, br, bi, cr, ci, state, marks, L, D, N, y, last):
    # state and last (B, 2, D, N): real parts, then imaginary parts.
    N16, blocks = (N + LANES - 1) // LANES * LANES, (D + _BLOCK - 1) // _BLOCK
    real, imaginary = np.zeros(_BLOCK * N16, np.float32), np.zeros(_BLOCK * N16, np.float32)
    for task in range(start, stop):
        b, first = task // blocks, task % blocks * _BLOCK
        count = min(_BLOCK, D - first)
        for d in range(count):
            re = (b * 2 * D + first + d) * N
            im = re + D * N
            for n in range(0, N, LANES):
                store(real, d * N16 + n, lanes(state, re + n, N - n))
                store(imaginary, d * N16 + n, lanes(state, im + n, N - n))
        for t in range(L):
            mark = marks[b, t] if marks.size else np.uint8(0)
            if mark == 1:
                real[:] = np.float32(0)
                imaginary[:] = np.float32(0)
            for d in range(count):
                at = (b * L + t) * D + first + d
                if mark == 2:
                    y[at] = np.float32(0)
                    continue
                v = u[at]
                acc = zeros()
                for n in range(0, N, LANES):
                    k, m = (first + d) * N + n, d * N16 + n
                    hr, hi = load(real, m), load(imaginary, m)
                    er, ei = lanes(ar, k, N - n), lanes(ai, k, N - n)
                    nr = multiply_add(er, hr, multiply_add(ei, hi * np.float32(-1), lanes(br, k, N - n) * v))
                    ni = multiply_add(er, hi, multiply_add(ei, hr, lanes(bi, k, N - n) * v))
                    store(real, m, nr)
                    store(imaginary, m, ni)
                    acc = multiply_add(lanes(cr, k, N - n), nr, acc)
                    acc = multiply_add(lanes(ci, k, N - n), ni * np.float32(-1), acc)
                y[at] = total(acc)
        for d in range(count):
            re = (b * 2 * D + first + d) * N
            im = re + D * N
            for n in range(0, N, LANES):
                put(last, re + n, N - n, load(real, d * N16 + n))
                put(last, im + n, N - n, load(imaginary, d * N16 + n))


def _flat(t: Tensor) -> np.ndarray:
    return common.array(t.contiguous()).reshape(-1)


def forward(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, marks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = a h_{t-1} + b u_t and y_t = Re(sum_n c_n h_tn): u (B, L, D) float32; a, b, c (D, N) and state (B, D, N)
    complex64; marks as in `Segments`. Returns y (B, L, D) and the last state."""
    (rows, L, D), N = u.shape, b.shape[1]
    parts = [_flat(t) for w in (a, b, c) for t in torch.view_as_real(w.detach().resolve_conj()).unbind(-1)]
    if state is None:
        start = np.zeros(rows * 2 * D * N, np.float32)
    else:
        start = _flat(torch.view_as_real(state.detach().resolve_conj()).movedim(-1, 1))
    y, last = common.empty(rows, L, D), common.empty(rows, 2, D, N)
    common.run(
        _forward, rows * -(-D // _BLOCK), _flat(u.detach()), *parts, start,
        _NO_MARKS if marks is None else marks.contiguous().numpy(), L, D, N, y.numpy().reshape(-1),
        last.numpy().reshape(-1), inline=rows * L * D * N < 100_000,
    )  # fmt: skip
    return y, torch.view_as_complex(last.movedim(1, -1).contiguous())
