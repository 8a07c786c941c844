"""SSD one position after the other, in a fixed order: the forward kernel of `statewise.deterministic`.

A task is one head of one row. Channels lie across the lanes and states are added up one after the other, so that
neither the length of the call nor anything else in the batch enters the result of a position.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._simd import LANES, LOG2E, exp2, fill, lanes, load, multiply_add, put, store, zeros

_F = np.float32
_NONE2, _NONE4 = np.zeros((0, 0), np.float32), np.zeros((0, 0, 0, 0), np.float32)
_NO_MARKS = np.zeros((0, 0), np.uint8)


@common.kernel
def _forward(
    start, stop, worker, x, xb, xl, dt, A, B, bb, bl, C, cb, cl, D, state, marks, chunk, P, N, G, keep, y, last,
    boundaries,
):  # fmt: skip
    L, H = dt.shape[1:]
    P16 = (P + LANES - 1) // LANES * LANES
    states = np.zeros((N, P16), np.float32)
    flat = states.reshape(-1)
    for task in range(start, stop):
        b, h = task // H, task % H
        g = h // (H // G)
        states[:] = _F(0)
        if state.size:
            for p in range(P):
                for n in range(N):
                    states[n, p] = state[b, h, p, n]
        for t in range(L):
            if keep and t % chunk == 0:
                for p in range(P):
                    for n in range(N):
                        boundaries[b, t // chunk, h, p, n] = states[n, p]
            to = ((b * L + t) * H + h) * P
            mark = marks[b, t] if marks.size else np.uint8(0)
            if mark == 2:
                for j in range(0, P, LANES):
                    put(y, to + j, P - j, zeros())
                continue
            if mark == 1:
                states[:] = _F(0)
            step = dt[b, t, h]
            decay = exp2(fill(step * A[h] * LOG2E))
            value, into, out = b * xb + t * xl + h * P, b * bb + t * bl + g * N, b * cb + t * cl + g * N
            for j in range(0, P, LANES):
                u = lanes(x, value + j, P - j)
                v = u * step
                acc = zeros()
                for n in range(N):
                    s = multiply_add(load(flat, n * P16 + j), decay, v * B[into + n])
                    store(flat, n * P16 + j, s)
                    acc = multiply_add(s, fill(C[out + n]), acc)
                if D.size:
                    acc = multiply_add(lanes(D, h * P + j, P - j), u, acc)
                put(y, to + j, P - j, acc)
        for p in range(P):
            for n in range(N):
                last[b, h, p, n] = states[n, p]


def _memory(t: Tensor) -> tuple[np.ndarray, int, int]:
    """A tensor (B, L, ...) as flat float32 memory with its strides over batch and time."""
    memory, (batch, time) = common.rows(t.to(torch.float32).flatten(2))
    return memory, batch, time


def _or(array: np.ndarray | None, empty: np.ndarray) -> np.ndarray:
    return empty if array is None else array


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    marks: Tensor | None, chunk: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments as `statewise::ssd_recurrent` in the package's __init__."""
    (rows, L, H, P), (G, N) = x.shape, B.shape[2:]
    y, last = common.empty(*x.shape), common.empty(rows, H, P, N)
    boundaries = common.empty(rows, -(-L // chunk) if keep else 0, H, P, N)
    f = common.f32
    common.run(
        _forward, rows * H, *_memory(x), f(dt), f(A), *_memory(B), *_memory(C), _or(f(D), _NONE2).reshape(-1),
        _or(f(state), _NONE4), _NO_MARKS if marks is None else marks.contiguous().numpy(), chunk, P, N, G, keep,
        y.numpy().reshape(-1), last.numpy(), boundaries.numpy(), inline=rows * L * H * P * N < 500_000,
    )  # fmt: skip
    return y.to(x.dtype), last, boundaries
