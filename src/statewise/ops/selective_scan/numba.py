"""CPU kernels of the selective scan: forward, backward and one step.

Layout: a task is one batch row and one block of W channels. Inside it time runs in tiles of T positions: the step
sizes of a tile are prepared first, then the recurrence runs with channels in the inner loop (W independent lanes, so
LLVM vectorises it, exponential included), then the gate is applied. The forward pass keeps the state at each tile's
start; the backward pass recomputes a tile's states from there into a scratch buffer that fits the L2 cache. Nothing
of size L x D x N is ever stored.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._numba import LOG2E, exp2

W = 128  # channels of a block: 8 AVX-512 or 16 AVX2 vectors; 64 was a fifth slower, 256 no faster
T = 32  # positions of a tile: two scratch buffers of T * N * W floats are 512 KB at N = 16

_F = np.float32
_EMPTY = np.zeros((0, 0, 0), np.float32)
_EMPTY2 = np.zeros((0, 0), np.float32)
_EMPTY1 = np.zeros(0, np.float32)
_NO_MARKS = np.zeros((0, 0), np.uint8)


@common.kernel
def _softplus(u):
    """log(1 + e^u): max(u, 0) + log1p(e^-|u|), the logarithm as an odd series in t / (2 + t) <= 1/3."""
    t = exp2(-abs(u) * LOG2E)
    s = t / (_F(2) + t)
    q = s * s
    p = _F(2 / 15)
    p = p * q + _F(2 / 13)
    p = p * q + _F(2 / 11)
    p = p * q + _F(2 / 9)
    p = p * q + _F(2 / 7)
    p = p * q + _F(2 / 5)
    p = p * q + _F(2 / 3)
    p = p * q + _F(2)
    return max(u, _F(0)) + s * p


@common.kernel
def _sigmoid(u):
    return _F(1) / (_F(1) + exp2(-u * LOG2E))


@common.kernel
def _steps(dt, bias, softplus, low, high, b, t0, c0, steps, w, tile, slope, want_slope):
    """tile[i, j] = step size, slope[i, j] = its derivative by the raw dt (only if wanted)."""
    for i in range(steps):
        for j in range(w):
            u = dt[b, t0 + i, c0 + j]
            if bias.size:
                u = u + bias[c0 + j]
            tile[i, j] = u
    if softplus:
        if want_slope:
            for i in range(steps):
                for j in range(W):
                    slope[i, j] = _sigmoid(tile[i, j])
        for i in range(steps):
            for j in range(W):
                tile[i, j] = _softplus(tile[i, j])
    elif want_slope:
        slope[:steps] = _F(1)
    if low > -np.inf or high < np.inf:
        for i in range(steps):
            for j in range(W):
                v = tile[i, j]
                if want_slope and (v < low or v > high):
                    slope[i, j] = _F(0)
                tile[i, j] = min(max(v, low), high)


@common.kernel
def _forward(
    start, stop, worker, x, dt, A, B, C, D, z, bias, state, marks, softplus, low, high, keep, y, last, boundaries
):
    _, L, channels = x.shape
    N = A.shape[1]
    groups = B.shape[2]
    per_group = channels // groups
    blocks = (per_group + W - 1) // W
    A2s = np.zeros((groups * blocks, N, W), np.float32)
    hs = np.zeros((groups * blocks, N, W), np.float32)
    step = np.zeros((T, W), np.float32)
    slope = np.zeros((1, 1), np.float32)
    u = np.zeros((T, W), np.float32)
    out = np.zeros((T, W), np.float32)
    task = start
    while task < stop:
        # All our blocks of one row advance together, tile by tile: memory is read in long runs of whole rows.
        b = task // (groups * blocks)
        first = task % (groups * blocks)
        last_block = min(groups * blocks, first + stop - task)
        task += last_block - first
        for block in range(first, last_block):
            g = block // blocks
            c0 = g * per_group + (block % blocks) * W
            w = min(W, (g + 1) * per_group - c0)
            A2s[block] = _F(0)
            hs[block] = _F(0)
            for j in range(w):
                for n in range(N):
                    A2s[block, n, j] = A[c0 + j, n] * LOG2E
                    if state.size:
                        hs[block, n, j] = state[b, c0 + j, n]
        for t0 in range(0, L, T):
            steps = min(T, L - t0)
            for block in range(first, last_block):
                g = block // blocks
                c0 = g * per_group + (block % blocks) * W
                w = min(W, (g + 1) * per_group - c0)
                A2 = A2s[block]
                h = hs[block]
                if keep:
                    boundaries[b, block, t0 // T] = h
                if w < W:
                    step[:] = _F(0)
                    u[:] = _F(0)
                _steps(dt, bias, softplus, low, high, b, t0, c0, steps, w, step, slope, False)
                for i in range(steps):
                    for j in range(w):
                        u[i, j] = step[i, j] * x[b, t0 + i, c0 + j]
                for i in range(steps):
                    mark = marks[b, t0 + i] if marks.size else 0
                    acc = out[i]
                    acc[:] = _F(0)
                    if mark == 2:
                        continue
                    if mark == 1:
                        h[:] = _F(0)
                    step_i = step[i]
                    u_i = u[i]
                    for n in range(N):
                        b_n = B[b, t0 + i, g, n]
                        c_n = C[b, t0 + i, g, n]
                        h_n = h[n]
                        a_n = A2[n]
                        for j in range(W):
                            v = exp2(step_i[j] * a_n[j]) * h_n[j] + u_i[j] * b_n
                            h_n[j] = v
                            acc[j] += v * c_n
                for i in range(steps):
                    if marks.size and marks[b, t0 + i] == 2:
                        for j in range(w):
                            y[b, t0 + i, c0 + j] = _F(0)
                        continue
                    if D.size:
                        for j in range(w):
                            out[i, j] += D[c0 + j] * x[b, t0 + i, c0 + j]
                    if z.size:
                        for j in range(w):
                            gate = z[b, t0 + i, c0 + j]
                            out[i, j] *= gate * _sigmoid(gate)
                    for j in range(w):
                        y[b, t0 + i, c0 + j] = out[i, j]
        for block in range(first, last_block):
            g = block // blocks
            c0 = g * per_group + (block % blocks) * W
            for j in range(min(W, (g + 1) * per_group - c0)):
                for n in range(N):
                    last[b, c0 + j, n] = hs[block, n, j]


# The adjoint of one state index at one position, in four loops. LLVM vectorises a loop only if it needs few run-time
# checks that arrays do not overlap; one loop over all twelve arrays would stay scalar (measured: 3 times slower).


@common.reducing_kernel
def _into_state(g, dy, c_n, h, a, total):
    """total = g + dy c_n; g = total * a for the position before. Returns the term of dC."""
    dc = _F(0)
    for j in range(W):
        dc += dy[j] * h[j]
    for j in range(W):
        v = g[j] + dy[j] * c_n
        total[j] = v
        g[j] = v * a[j]
    return dc


@common.reducing_kernel
def _into_input(total, u, b_n, s):
    """s += total b_n. Returns the term of dB."""
    db = _F(0)
    for j in range(W):
        v = total[j]
        db += v * u[j]
        s[j] += v * b_n
    return db


@common.kernel
def _into_decay(g, before, A, step, q, dA):
    """The gradient of dt A is through = g before: q += through A, dA += through step."""
    for j in range(W):
        q[j] += g[j] * before[j] * A[j]
    for j in range(W):
        dA[j] += g[j] * before[j] * step[j]


@common.kernel
def _backward(
    start, stop, worker, dy, dlast, x, dt, A, B, C, D, z, bias, marks, softplus, low, high, boundaries,
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate,
):  # fmt: skip
    _, L, channels = x.shape
    N = A.shape[1]
    groups = B.shape[2]
    per_group = channels // groups
    blocks = (per_group + W - 1) // W
    A1 = np.zeros((N, W), np.float32)
    A2 = np.zeros((N, W), np.float32)
    h = np.zeros((T + 1, N, W), np.float32)  # h[i] is the state before position i of the tile
    a = np.zeros((T, N, W), np.float32)
    g = np.zeros((N, W), np.float32)
    dA_block = np.zeros((N, W), np.float32)
    step = np.zeros((T, W), np.float32)
    slope = np.zeros((T, W), np.float32)
    xs = np.zeros((T, W), np.float32)
    u = np.zeros((T, W), np.float32)
    grad = np.zeros((T, W), np.float32)
    pre = np.zeros((T, W), np.float32)
    s = np.zeros(W, np.float32)
    q = np.zeros(W, np.float32)
    total = np.zeros(W, np.float32)
    dD_block = np.zeros(W, np.float32)
    dbias_block = np.zeros(W, np.float32)
    for task in range(start, stop):
        b = task // (groups * blocks)
        group = (task // blocks) % groups
        block = task % (groups * blocks)
        c0 = group * per_group + (task % blocks) * W
        w = min(W, (group + 1) * per_group - c0)
        A1[:] = _F(0)
        g[:] = _F(0)
        step[:] = _F(0)
        xs[:] = _F(0)
        grad[:] = _F(0)
        dA_block[:] = _F(0)
        dD_block[:] = _F(0)
        dbias_block[:] = _F(0)
        for j in range(w):
            for n in range(N):
                A1[n, j] = A[c0 + j, n]
                g[n, j] = dlast[b, c0 + j, n]
        A2[:] = A1 * LOG2E
        for tile in range((L + T - 1) // T - 1, -1, -1):
            t0 = tile * T
            steps = min(T, L - t0)
            _steps(dt, bias, softplus, low, high, b, t0, c0, steps, w, step, slope, True)
            for i in range(steps):
                for j in range(w):
                    xs[i, j] = x[b, t0 + i, c0 + j]
                    grad[i, j] = dy[b, t0 + i, c0 + j]
                for j in range(W):
                    u[i, j] = step[i, j] * xs[i, j]
            # Recompute the states of the tile.
            h[0] = boundaries[b, block, tile]
            for i in range(steps):
                mark = marks[b, t0 + i] if marks.size else 0
                acc = pre[i]
                acc[:] = _F(0)
                if mark == 2:
                    h[i + 1] = h[i]
                    continue
                for n in range(N):
                    b_n = B[b, t0 + i, group, n]
                    c_n = C[b, t0 + i, group, n]
                    old = h[i, n]
                    new = h[i + 1, n]
                    a_n = a[i, n]
                    A_n = A2[n]
                    if mark == 1:
                        for j in range(W):
                            a_n[j] = _F(0)
                            new[j] = u[i, j] * b_n
                            acc[j] += new[j] * c_n
                    else:
                        for j in range(W):
                            decay = exp2(step[i, j] * A_n[j])
                            v = decay * old[j] + u[i, j] * b_n
                            a_n[j] = decay
                            new[j] = v
                            acc[j] += v * c_n
            # Through the gate: from the gradient of y to that of the ungated output.
            for i in range(steps):
                if marks.size and marks[b, t0 + i] == 2:
                    grad[i] = _F(0)
                    if z.size:
                        for j in range(w):
                            dz[b, t0 + i, c0 + j] = _F(0)
                    continue
                if z.size:
                    for j in range(w):
                        gate = z[b, t0 + i, c0 + j]
                        open_ = _sigmoid(gate)
                        out = pre[i, j]
                        if D.size:
                            out += D[c0 + j] * xs[i, j]
                        dz[b, t0 + i, c0 + j] = grad[i, j] * out * open_ * (_F(1) + gate * (_F(1) - open_))
                        grad[i, j] *= gate * open_
                if D.size:
                    for j in range(w):
                        dD_block[j] += grad[i, j] * xs[i, j]
            # The adjoint recurrence, backwards in time.
            for i in range(steps - 1, -1, -1):
                if marks.size and marks[b, t0 + i] == 2:
                    for j in range(w):
                        dx[b, t0 + i, c0 + j] = _F(0)
                        ddt[b, t0 + i, c0 + j] = _F(0)
                    continue
                s[:] = _F(0)
                q[:] = _F(0)
                for n in range(N):
                    c_n = C[b, t0 + i, group, n]
                    dC[worker, b, t0 + i, group, n] += _into_state(g[n], grad[i], c_n, h[i + 1, n], a[i, n], total)
                    dB[worker, b, t0 + i, group, n] += _into_input(total, u[i], B[b, t0 + i, group, n], s)
                    _into_decay(g[n], h[i, n], A1[n], step[i], q, dA_block[n])
                for j in range(w):
                    d = s[j] * step[i, j]
                    if D.size:
                        d += D[c0 + j] * grad[i, j]
                    dx[b, t0 + i, c0 + j] = d
                    e = (q[j] + s[j] * xs[i, j]) * slope[i, j]
                    ddt[b, t0 + i, c0 + j] = e
                    dbias_block[j] += e
        for j in range(w):
            if D.size:
                dD[b, c0 + j] = dD_block[j]
            if bias.size:
                dbias[b, c0 + j] = dbias_block[j]
            for n in range(N):
                dA[b, c0 + j, n] = dA_block[n, j]
                dstate[b, c0 + j, n] = g[n, j]


@common.reducing_kernel
def _step(x, dt, A, B, C, D, z, bias, softplus, low, high, state, y, new):
    rows, channels = x.shape
    N = A.shape[1]
    groups = B.shape[1]
    per_group = channels // groups
    for b in range(rows):
        for d in range(channels):
            g = d // per_group
            u = dt[b, d]
            if bias.size:
                u += bias[d]
            if softplus:
                u = _softplus(u)
            u = min(max(u, low), high)
            u2 = u * LOG2E
            v = u * x[b, d]
            acc = _F(0)
            for n in range(N):
                s = exp2(u2 * A[d, n]) * state[b, d, n] + v * B[b, g, n]
                new[b, d, n] = s
                acc += s * C[b, g, n]
            if D.size:
                acc += D[d] * x[b, d]
            if z.size:
                acc *= z[b, d] * _sigmoid(z[b, d])
            y[b, d] = acc


def _or(array, empty):
    return empty if array is None else array


def _blocks(rows: int, channels: int, groups: int) -> tuple[int, int]:
    """(channel blocks of a row, tasks in all)."""
    blocks = groups * -(-(channels // groups) // W)
    return blocks, rows * blocks


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, state: Tensor | None, marks: Tensor | None,
    dt_softplus: bool, low: float, high: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments as `statewise::selective_scan_numba` in the package's __init__; B and C are (B, L, G, N)."""
    (rows, L, channels), N, groups = x.shape, A.shape[1], B.shape[2]
    blocks, tasks = _blocks(rows, channels, groups)
    y = torch.empty(x.shape, dtype=torch.float32)
    last = torch.empty((rows, channels, N), dtype=torch.float32)
    boundaries = torch.empty((rows, blocks, -(-L // T) if keep else 0, N, W), dtype=torch.float32)
    f = common.f32
    common.run(
        _forward, tasks, f(x), f(dt), f(A), f(B), f(C), _or(f(D), _EMPTY1), _or(f(z), _EMPTY),
        _or(f(dt_bias), _EMPTY1), _or(f(state), _EMPTY), _NO_MARKS if marks is None else marks.contiguous().numpy(),
        dt_softplus, _F(low), _F(high), keep, y.numpy(), last.numpy(), boundaries.numpy(),
        inline=rows * L * channels * N < 100_000,
    )  # fmt: skip
    return y.to(x.dtype), last, boundaries


def backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, state: Tensor | None, marks: Tensor | None, boundaries: Tensor,
    dt_softplus: bool, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias, state, in the dtypes of the inputs; empty for absent inputs."""
    (rows, L, channels), N, groups = x.shape, A.shape[1], B.shape[2]
    _, tasks = _blocks(rows, channels, groups)
    inline = rows * L * channels * N < 50_000
    workers = 1 if inline else common.workers(tasks)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32)

    dx, ddt, dz = empty(*x.shape), empty(*x.shape), empty(*(x.shape if z is not None else (0, 0, 0)))
    dA, dstate = empty(rows, channels, N), empty(rows, channels, N)
    dD = empty(*((rows, channels) if D is not None else (0, 0)))
    dbias = empty(*((rows, channels) if dt_bias is not None else (0, 0)))
    dB, dC = torch.zeros((2, workers, *B.shape), dtype=torch.float32)
    f = common.f32
    common.run(
        _backward, tasks, f(dy), f(dlast), f(x), f(dt), f(A), f(B), f(C), _or(f(D), _EMPTY1), _or(f(z), _EMPTY),
        _or(f(dt_bias), _EMPTY1), _NO_MARKS if marks is None else marks.contiguous().numpy(), dt_softplus,
        _F(low), _F(high), boundaries.numpy(), dx.numpy(), ddt.numpy(), dA.numpy(), dB.numpy(), dC.numpy(),
        dD.numpy(), dz.numpy(), dbias.numpy(), dstate.numpy(), inline=inline,
    )  # fmt: skip

    def like(grad: Tensor, t: Tensor | None) -> Tensor:
        return grad.new_empty(0) if t is None else grad.to(t.dtype)

    return (
        like(dx, x), like(ddt, dt), like(dA.sum(0), A), like(dB.sum(0), B), like(dC.sum(0), C), like(dD.sum(0), D),
        like(dz, z), like(dbias.sum(0), dt_bias), like(dstate, state),
    )  # fmt: skip


def step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, low: float, high: float, state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One position: x, dt, z (B, D), B and C (B, G, N), state (B, D, N)."""
    y = torch.empty(x.shape, dtype=torch.float32)
    new = torch.empty(state.shape, dtype=torch.float32)
    f = common.f32
    _step(
        f(x), f(dt), f(A), f(B), f(C), _or(f(D), _EMPTY1), _or(f(z), _EMPTY2), _or(f(dt_bias), _EMPTY1),
        dt_softplus, _F(low), _F(high), f(state), y.numpy(), new.numpy(),
    )  # fmt: skip
    return y.to(x.dtype), new
