"""One position of a whole layer, as few kernels in turn: every weight is read once, everything else stays in cache.

Stages hand over float32 rows. Channels of a convolution are finished by the thread that made their input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._parallel_numba import address, fork
from .._simd import LANES, LOG2E, clamp, exp2, fill, lanes, load, memory, put, sigmoid, softplus, store, zeros
from .._simd import total as sum_of
from ..linear.numba import BLOCK, LIKE, dots, fetch, rows_times_matrix
from .layer import Layer

_F = np.float32
_WIDE = LIKE[torch.float32]
# Below this many weights of a projection other threads cost more than they give.
_INLINE = 30_000


@common.kernel
def _project(
    start, stop, worker, x_like, like, small, x_at, rows, depth, norm_at, eps, w_at, bias_at, outputs, first, last,
    conv_w_at, conv_b_at, width, window_at, new_at, out_at, out_row,
):  # fmt: skip
    """out[r, o] = norm(x[r, :]) . w[o, :] + bias[o]; outputs first ... last - 1 then pass convolution and SiLU.

    window (rows, width - 1, last - first) holds the last inputs of the convolution, new those after this position.
    Blocks of outputs are counted before, inside and after the convolved ones, so that none is both.
    """
    x, w, bias = memory(x_at, x_like), memory(w_at, like), memory(bias_at, like)
    conv_b = memory(conv_b_at, small)
    window, new, out = memory(window_at, _WIDE), memory(new_at, _WIDE), memory(out_at, _WIDE)
    ld = (depth + LANES - 1) // LANES * LANES
    wide = np.empty(rows * ld, np.float32)
    sums = np.empty((rows, BLOCK + 4), np.float32)
    flat = sums.reshape(-1)
    taps = np.zeros(width * LANES, np.float32)
    as_stored = np.empty(width * LANES + LANES, np.float32)
    channels = last - first
    before, inside = (first + BLOCK - 1) // BLOCK, (channels + BLOCK - 1) // BLOCK
    fetch(x, depth, rows, depth, 1, memory(norm_at, like), norm_at != 0, eps, w, wide, ld)
    for block in range(start, stop):
        if block < before:
            o, end = block * BLOCK, first
        elif block < before + inside:
            o, end = first + (block - before) * BLOCK, last
        else:
            o, end = last + (block - before - inside) * BLOCK, outputs
        count = min(BLOCK, end - o)
        dots(wide, rows, ld, w, o * depth, depth, count, sums)
        convolved = before <= block < before + inside
        c = o - first
        if convolved:
            conv_w = memory(conv_w_at + c * width * small.itemsize, small)
            for k in range(0, count * width, LANES):
                store(as_stored, k, lanes(conv_w, k, count * width - k))
            for l in range(count):
                for k in range(width):
                    taps[k * LANES + l] = as_stored[l * width + k]
        for r in range(rows):
            v = load(flat, r * (BLOCK + 4))
            if bias_at != 0:
                v = v + lanes(bias, o, count)
            if convolved:
                acc = v * load(taps, (width - 1) * LANES)
                if conv_b_at != 0:
                    acc = acc + lanes(conv_b, c, count)
                row = r * (width - 1) * channels + c
                for k in range(width - 1):
                    old = lanes(window, row + k * channels, count)
                    acc = acc + old * load(taps, k * LANES)
                    if k > 0:
                        put(new, row + (k - 1) * channels, count, old)
                if width > 1:
                    put(new, row + (width - 2) * channels, count, v)
                v = acc * sigmoid(acc)
            put(out, r * out_row + o, count, v)


@common.kernel
def _selective(
    start, stop, worker, like, small, rows, channels, N, rank, proj_at, proj_row, low_at, low_row, dt_w_at, dt_b_at,
    A_log_at, D_at, state_at, new_at, y_at, y_row,
):  # fmt: skip
    """The selective scan of one position and its gate; proj = (u, z), low = (dt before its projection, B, C)."""
    proj, low, dt_w, dt_b = memory(proj_at, _WIDE), memory(low_at, _WIDE), memory(dt_w_at, like), memory(dt_b_at, small)
    A_log, D = memory(A_log_at, small), memory(D_at, small)
    state, new, y = memory(state_at, _WIDE), memory(new_at, _WIDE), memory(y_at, _WIDE)
    ld = (rank + LANES - 1) // LANES * LANES
    wide = np.empty(rows * ld, np.float32)
    sums = np.empty((rows, BLOCK + 4), np.float32)
    flat = sums.reshape(-1)
    steps, inputs, out = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    fetch(low, low_row, rows, rank, 1, low, False, _F(0), dt_w, wide, ld)
    for block in range(start, stop):
        c0 = block * BLOCK
        count = min(BLOCK, channels - c0)
        dots(wide, rows, ld, dt_w, c0 * rank, rank, count, sums)
        for r in range(rows):
            dt = load(flat, r * (BLOCK + 4))
            if dt_b_at != 0:
                dt = dt + lanes(dt_b, c0, count)
            dt = softplus(dt)
            store(steps, 0, dt)
            u = lanes(proj, r * proj_row + c0, count)
            store(inputs, 0, u * dt)
            for l in range(count):
                at = ((r * channels) + c0 + l) * N
                acc = zeros()
                for n in range(0, N, LANES):
                    left = N - n
                    # -exp(A_log) is the rate; both exponentials are taken to base 2.
                    rate = exp2(lanes(A_log, (c0 + l) * N + n, left) * LOG2E) * -LOG2E
                    h = exp2(rate * steps[l]) * lanes(state, at + n, left)
                    h = h + lanes(low, r * low_row + rank + n, left) * inputs[l]
                    put(new, at + n, left, h)
                    acc = acc + h * lanes(low, r * low_row + rank + N + n, left)
                out[l] = sum_of(acc)
            o = load(out, 0)
            if D_at != 0:
                o = o + lanes(D, c0, count) * u
            z = lanes(proj, r * proj_row + channels + c0, count)
            put(y, r * y_row + c0, count, o * z * sigmoid(z))


@common.kernel
def _heads(
    start, stop, worker, small, H, P, N, G, proj_at, proj_row, dt_b_at, A_log_at, D_at, per_channel, low, high,
    state_at, new_at, y_at, y_row,
):  # fmt: skip
    """SSD of one position and its gate, a task a head of a row; proj = (z, x, B, C, dt)."""
    proj, dt_b, A_log, D = memory(proj_at, _WIDE), memory(dt_b_at, small), memory(A_log_at, small), memory(D_at, small)
    state, new, y = memory(state_at, _WIDE), memory(new_at, _WIDE), memory(y_at, _WIDE)
    out = np.zeros(P + LANES, np.float32)
    one = np.zeros(LANES, np.float32)
    width = H * P
    for task in range(start, stop):
        r, h = task // H, task % H
        at = r * proj_row
        x, b = at + width + h * P, at + 2 * width + h // (H // G) * N
        c = b + G * N
        raw = lanes(proj, at + 2 * width + 2 * G * N + h, 1)
        if dt_b_at != 0:
            raw = raw + lanes(dt_b, h, 1)
        # A lane more than the first is never read.
        store(one, 0, clamp(softplus(raw), low, high))
        dt = one[0]
        store(one, 0, exp2(exp2(lanes(A_log, h, 1) * LOG2E) * (dt * -LOG2E)))
        decay = one[0]
        for p in range(P):
            v = proj[x + p] * dt
            row = (task * P + p) * N
            acc = zeros()
            for n in range(0, N, LANES):
                s = lanes(state, row + n, N - n) * decay + lanes(proj, b + n, N - n) * v
                put(new, row + n, N - n, s)
                acc = acc + s * lanes(proj, c + n, N - n)
            out[p] = sum_of(acc)
        for p in range(0, P, LANES):
            o, z = load(out, p), lanes(proj, at + h * P + p, P - p)
            if D_at != 0:
                if per_channel != 0:
                    skip = lanes(D, h * P + p, P - p)
                else:
                    skip = fill(sum_of(lanes(D, h, 1)))
                o = o + skip * lanes(proj, x + p, P - p)
            put(y, r * y_row + h * P + p, P - p, o * z * sigmoid(z))


@common.driver
def _mamba(team, threads, kernels, x_like, like, small, tables, numbers, rows, x_at, states, y_at):
    """Layers after each other: tables and numbers of `Layer`, states (layers, 4) old and new ones of conv and ssm."""
    depth = tables[0, 11]
    streams = np.empty(2 * rows * depth, x_like.dtype)  # between layers, taken in turn
    failed, alive = 0, streams.size
    for i in range(len(tables)):
        at, eps = tables[i], numbers[i, 0]
        channels, N, rank, width, norm_at = at[12], at[13], at[14], at[15], at[16]
        to_at = streams.ctypes.data + i % 2 * rows * depth * x_like.itemsize if i + 1 < len(tables) else y_at
        outputs, low = 2 * channels, rank + 2 * N
        low_row = (low + LANES - 1) // LANES * LANES
        work = np.empty(rows * (outputs + low_row + channels) + LANES, np.float32)
        proj_at = np.int64(work.ctypes.data)
        low_at = proj_at + 4 * rows * outputs
        gated_at = low_at + 4 * rows * low_row
        failed += fork(
            kernels[0], team, 2 * ((channels + BLOCK - 1) // BLOCK), threads, threads,
            (x_like, like, small, x_at, rows, depth, norm_at, eps, at[0], at[1], outputs, 0, channels, at[2], at[3],
             width, states[i, 0], states[i, 2], proj_at, outputs),
        )  # fmt: skip
        failed += fork(
            kernels[1], team, (low + BLOCK - 1) // BLOCK, threads, threads,
            (_WIDE, proj_at, outputs, rows, channels, 1, _WIDE, 0, eps, like, at[4], 0, low, _WIDE, 0, low_at, low_row),
        )  # fmt: skip
        failed += fork(
            kernels[2], team, (channels + BLOCK - 1) // BLOCK, threads, threads,
            (like, small, rows, channels, N, rank, proj_at, outputs, low_at, low_row, at[5], at[6], at[7], at[8],
             states[i, 1], states[i, 3], gated_at, channels),
        )  # fmt: skip
        failed += fork(
            kernels[3], team, (depth + BLOCK - 1) // BLOCK, threads, threads,
            (_WIDE, gated_at, channels, rows, channels, 1, _WIDE, 0, eps, like, at[9], at[10], depth, x_like,
             x_at if norm_at != 0 else 0, to_at, depth),
        )  # fmt: skip
        x_at = to_at
        alive += work.size
    return failed * (alive + streams.size)  # named last, so that their memory lives until here


@common.driver
def _mamba2(team, threads, kernels, x_like, like, small, tables, numbers, rows, x_at, states, y_at):
    """As `_mamba`."""
    depth = tables[0, 10]
    streams = np.empty(2 * rows * depth, x_like.dtype)
    failed, alive = 0, streams.size
    for i in range(len(tables)):
        at, eps, gated_eps, least, most = tables[i], numbers[i, 0], numbers[i, 1], numbers[i, 2], numbers[i, 3]
        H, P, N, G, width, groups, per_channel, norm_at = at[11], at[12], at[13], at[14], at[15], at[16], at[17], at[18]
        to_at = streams.ctypes.data + i % 2 * rows * depth * x_like.itemsize if i + 1 < len(tables) else y_at
        inner = H * P
        channels = inner + 2 * G * N
        outputs = inner + channels + H
        work = np.empty(rows * (outputs + inner) + LANES, np.float32)
        proj_at = np.int64(work.ctypes.data)
        gated_at = proj_at + 4 * rows * outputs
        blocks_in = (inner + BLOCK - 1) // BLOCK + (channels + BLOCK - 1) // BLOCK + (H + BLOCK - 1) // BLOCK
        failed += fork(
            kernels[0], team, blocks_in, threads, threads,
            (x_like, like, small, x_at, rows, depth, norm_at, eps, at[0], at[1], outputs, inner, inner + channels,
             at[2], at[3], width, states[i, 0], states[i, 2], proj_at, outputs),
        )  # fmt: skip
        failed += fork(
            kernels[1], team, rows * H, threads, threads,
            (small, H, P, N, G, proj_at, outputs, at[4], at[5], at[6], per_channel, least, most, states[i, 1],
             states[i, 3], gated_at, inner),
        )  # fmt: skip
        failed += fork(
            kernels[2], team, (depth + BLOCK - 1) // BLOCK, threads, threads,
            (_WIDE, gated_at, inner, rows, inner, groups, small, at[7], gated_eps, like, at[8], at[9], depth, x_like,
             x_at if norm_at != 0 else 0, to_at, depth),
        )  # fmt: skip
        x_at = to_at
        alive += work.size
    return failed * (alive + streams.size)  # named last, so that their memory lives until here


_N, _E = 0, _F(0)  # samples of the types of arguments


@lru_cache
def _kernels(name: str, x: torch.dtype, large: torch.dtype, vectors: torch.dtype) -> np.ndarray:
    """Addresses of the stages, for x, matrices and vectors of these dtypes."""
    x_like, like, small = LIKE[x], LIKE[large], LIKE[vectors]

    def times(x_like: np.ndarray, norm_like: np.ndarray, y_like: np.ndarray) -> tuple:
        arguments = (x_like, _N, _N, _N, _N, _N, norm_like, _N, _E, like, _N, _N, _N, y_like, _N, _N, _N)
        return rows_times_matrix, arguments

    stages: list[tuple[Any, tuple]] = [(_project, (x_like, like, small, _N, _N, _N, _N, _E, *(_N,) * 12))]
    if name == "mamba":
        stages += [times(_WIDE, _WIDE, _WIDE), (_selective, (like, small, *(_N,) * 16)), times(_WIDE, _WIDE, x_like)]
    else:
        stages += [(_heads, (small, *(_N,) * 10, _E, _E, *(_N,) * 4)), times(_WIDE, small, x_like)]
    return np.array([address(function, arguments) for function, arguments in stages])


def run(layers: Sequence[Layer], x: Tensor, states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list]:
    """x (B, D) through layers of one kind, and their new states."""
    first, rows = layers[0], x.shape[0]
    name, large, vectors, depth = first.kind
    wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [("x", x, (rows, depth))]
    for layer, (conv, ssm) in zip(layers, states):
        wanted += [("conv", conv, (rows, *layer.shapes[0])), ("ssm", ssm, (rows, *layer.shapes[1]))]
    for what, t, want in wanted:
        if t.shape != want:
            raise ValueError(f"{name}: {what}: want {want}, got {tuple(t.shape)}")
    y, new = torch.empty_like(x), [(torch.empty_like(conv), torch.empty_like(ssm)) for conv, ssm in states]
    addresses = [
        [conv.data_ptr(), ssm.data_ptr(), new_conv.data_ptr(), new_ssm.data_ptr()]
        for (conv, ssm), (new_conv, new_ssm) in zip(states, new)
    ]
    team, threads = common.team(rows * first.size, _INLINE)
    if (_mamba if name == "mamba" else _mamba2)(
        team, threads, _kernels(name, x.dtype, large, vectors), LIKE[x.dtype], LIKE[large], LIKE[vectors],
        *first.stacked(layers), rows, x.data_ptr(), np.array(addresses, np.int64), y.data_ptr(),
    ):  # fmt: skip
        raise RuntimeError(f"a kernel of {name} failed")
    return y, new
