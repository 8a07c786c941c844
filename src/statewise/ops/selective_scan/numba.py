"""CPU kernels of the selective scan: forward, backward and one step.

Layout: a task is one batch row and one block of W channels, sixteen channels to a vector (`_simd`). Time runs in tiles
of T positions. For a tile the step sizes are prepared first; then four states at a time run through the tile in
registers; then the gate is applied. The forward pass keeps the state at each tile's start; the backward pass
recomputes a tile's states from there, four at a time, into scratch memory that stays in the first-level cache. Nothing
of size L x D x N is ever stored.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._simd import (
    LANES,
    LOG2E,
    address,
    clamp,
    exp2,
    fill,
    if_inside,
    inlined,
    lanes,
    load,
    prefetch,
    put,
    sigmoid,
    softplus,
    store,
    total,
    zeros,
)

W = 128  # channels of a block at most
T = 32  # positions of a tile

_F = np.float32
_EMPTY = np.zeros((0, 0, 0), np.float32)
_EMPTY2 = np.zeros((0, 0), np.float32)
_EMPTY1 = np.zeros(0, np.float32)
_NO_MARKS = np.zeros((0, 0), np.uint8)


@inlined
def _coefficients(marks, b, t0, steps, g, B, into):
    """B[b, t0 : t0 + steps, g] into (T, N), zeros at invalid positions: what stands there may be NaN."""
    for i in range(steps):
        if marks.size and marks[b, t0 + i] == 2:
            for n in range(B.shape[3]):
                into[i, n] = _F(0)
        else:
            for n in range(B.shape[3]):
                into[i, n] = B[b, t0 + i, g, n]


@inlined
def _runs(marks, b, t0, steps, ends):
    """ends[0] < ends[1] < ... <= steps cut the tile before each reset; returns how many there are."""
    count = 0
    if marks.size:
        for i in range(1, steps):
            if marks[b, t0 + i] == 1:
                ends[count] = i
                count += 1
    ends[count] = steps
    return count + 1


@inlined
def _padded(channels):
    return (channels + LANES - 1) // LANES * LANES


@inlined
def _boundary(b, tile, tiles, g, groups, N, per_group):
    """Where the states (N, channels of a group) at the start of a tile are kept."""
    return ((b * tiles + tile) * groups + g) * N * _padded(per_group)


@common.kernel
def _steps(dt, at, row, bias, softplus_, low, high, b, t0, c0, steps, w, marks, step, slope, want_slope):
    """step[i, j] = step size, 0 at invalid positions; slope[i, j] = its derivative by the raw dt (only if wanted).

    The tile's raw step sizes stand in `dt` from `at` on, a row every `row` numbers.
    """
    limited = low > -np.inf or high < np.inf
    for i in range(steps):
        if marks.size and marks[b, t0 + i] == 2:
            step[i] = _F(0)
            if want_slope:
                slope[i] = _F(0)
            continue
        for j in range(0, w, LANES):
            u = lanes(dt, at + i * row + j, w - j)
            if bias.size:
                u = u + lanes(bias, c0 + j, w - j)
            d = fill(_F(1))
            if softplus_:
                if want_slope:
                    d = sigmoid(u)
                u = softplus(u)
            if limited:
                if want_slope:
                    d = if_inside(u, low, high, d, zeros())
                u = clamp(u, low, high)
            store(step, i * W + j, u)
            if want_slope:
                store(slope, i * W + j, d)


@inlined
def _four_states(h, a, at, step, u, out, j, bs, cs, n, N, ends, count, fresh, soon, row):
    """States n ... n + 3 of sixteen channels through one tile; out += their part of the output."""
    h0, h1, h2, h3 = load(h, at), load(h, at + W), load(h, at + 2 * W), load(h, at + 3 * W)
    a0, a1, a2, a3 = load(a, at), load(a, at + W), load(a, at + 2 * W), load(a, at + 3 * W)
    first = 0
    for run in range(count):
        if run > 0 or fresh:
            h0, h1, h2, h3 = zeros(), zeros(), zeros(), zeros()
        for i in range(first, ends[run]):
            s = load(step, i * W + j)
            v = load(u, i * W + j)
            k = i * N + n
            prefetch(soon + i * row)
            h0 = exp2(s * a0) * h0 + v * bs[k]
            h1 = exp2(s * a1) * h1 + v * bs[k + 1]
            h2 = exp2(s * a2) * h2 + v * bs[k + 2]
            h3 = exp2(s * a3) * h3 + v * bs[k + 3]
            y = load(out, i * W + j)
            y = y + h0 * cs[k] + h1 * cs[k + 1] + h2 * cs[k + 2] + h3 * cs[k + 3]
            store(out, i * W + j, y)
        first = ends[run]
    store(h, at, h0)
    store(h, at + W, h1)
    store(h, at + 2 * W, h2)
    store(h, at + 3 * W, h3)


@inlined
def _one_state(h, a, at, step, u, out, j, bs, cs, n, N, ends, count, fresh):
    h0, a0 = load(h, at), load(a, at)
    first = 0
    for run in range(count):
        if run > 0 or fresh:
            h0 = zeros()
        for i in range(first, ends[run]):
            h0 = exp2(load(step, i * W + j) * a0) * h0 + load(u, i * W + j) * bs[i * N + n]
            store(out, i * W + j, load(out, i * W + j) + h0 * cs[i * N + n])
        first = ends[run]
    store(h, at, h0)


@common.kernel
def _forward(
    start, stop, worker, width, L, channels, x, xb, xl, dt, db, dl, A, B, C, D, z, zb, zl, bias, state, marks,
    softplus_, low, high, keep, y, last, boundaries,
):  # fmt: skip
    N = A.shape[1]
    groups = B.shape[2]
    per_group = channels // groups
    blocks = (per_group + width - 1) // width
    A2s = np.zeros((groups * blocks, N, W), np.float32)
    hs = np.zeros((groups * blocks, N, W), np.float32)
    step = np.zeros((T, W), np.float32)
    slope = np.zeros((1, 1), np.float32)
    u = np.zeros((T, W), np.float32)
    out = np.zeros((T, W), np.float32)
    bs = np.zeros((T, N), np.float32)
    cs = np.zeros((T, N), np.float32)
    b_flat, c_flat = bs.reshape(-1), cs.reshape(-1)
    ends = np.zeros(T, np.int64)
    task = start
    while task < stop:
        # All our blocks of one row advance together, tile by tile: memory is read in long runs of whole rows.
        b = task // (groups * blocks)
        first = task % (groups * blocks)
        last_block = min(groups * blocks, first + stop - task)
        task += last_block - first
        for block in range(first, last_block):
            g = block // blocks
            c0 = g * per_group + (block % blocks) * width
            for j in range(min(width, (g + 1) * per_group - c0)):
                for n in range(N):
                    A2s[block, n, j] = A[c0 + j, n] * LOG2E
                    hs[block, n, j] = state[b, c0 + j, n] if state.size else _F(0)
        for t0 in range(0, L, T):
            steps = min(T, L - t0)
            count = _runs(marks, b, t0, steps, ends)
            fresh = marks.size and marks[b, t0] == 1
            for block in range(first, last_block):
                g = block // blocks
                c0 = g * per_group + (block % blocks) * width
                w = min(width, (g + 1) * per_group - c0)
                if block == first or block % blocks == 0:
                    _coefficients(marks, b, t0, steps, g, B, bs)
                    _coefficients(marks, b, t0, steps, g, C, cs)
                A2 = A2s[block]
                h = hs[block]
                if keep:
                    at = _boundary(b, t0 // T, (L + T - 1) // T, g, groups, N, per_group) + c0 - g * per_group
                    for n in range(N):
                        for j in range(0, w, LANES):
                            store(boundaries, at + n * _padded(per_group) + j, load(h, n * W + j))
                ax, ad, az = b * xb + t0 * xl + c0, b * db + t0 * dl + c0, b * zb + t0 * zl + c0
                ay = (b * L + t0) * channels + c0
                _steps(dt, ad, dl, bias, softplus_, low, high, b, t0, c0, steps, w, marks, step, slope, False)
                for i in range(steps):
                    invalid = marks.size and marks[b, t0 + i] == 2
                    for j in range(0, w, LANES):
                        if invalid:
                            store(u, i * W + j, zeros())
                            store(out, i * W + j, zeros())
                        else:
                            v = lanes(x, ax + i * xl + j, w - j)
                            store(u, i * W + j, load(step, i * W + j) * v)
                            store(out, i * W + j, lanes(D, c0 + j, w - j) * v if D.size else zeros())
                for j in range(0, w, LANES):
                    for n in range(0, N - 3, 4):
                        # What the next tile reads and this one writes, a share with each four states.
                        if n == 0:
                            soon, row = address(x, ax + T * xl + j), xl * x.itemsize
                        elif n == 4:
                            soon, row = address(dt, ad + T * dl + j), dl * dt.itemsize
                        elif n == 8:
                            soon, row = address(z, az + T * zl + j), zl * z.itemsize
                        else:
                            soon, row = address(y, ay + j), channels * y.itemsize
                        _four_states(
                            h, A2, n * W + j, step, u, out, j, b_flat, c_flat, n, N, ends, count, fresh, soon, row
                        )
                    for n in range(N - N % 4, N):
                        _one_state(h, A2, n * W + j, step, u, out, j, b_flat, c_flat, n, N, ends, count, fresh)
                for i in range(steps):
                    invalid = marks.size and marks[b, t0 + i] == 2
                    for j in range(0, w, LANES):
                        o = load(out, i * W + j)
                        if invalid:
                            o = zeros()
                        elif z.size:
                            gate = lanes(z, az + i * zl + j, w - j)
                            o = o * gate * sigmoid(gate)
                        put(y, ay + i * channels + j, w - j, o)
        for block in range(first, last_block):
            g = block // blocks
            c0 = g * per_group + (block % blocks) * width
            for j in range(min(width, (g + 1) * per_group - c0)):
                for n in range(N):
                    last[b, c0 + j, n] = hs[block, n, j]


@inlined
def _gather(sums, lost, at, value):
    """sums += value with the rounding error kept in `lost` (Kahan): a sum over a long sequence loses no digits."""
    value = value - load(lost, at)
    before = load(sums, at)
    after = before + value
    store(lost, at, (after - before) - value)
    store(sums, at, after)


@inlined
def _four_adjoints(
    from_start, g, A1, A2, dA, lost_A, at, step, u, grad, pre, s, q, j, bs, cs, n, N, steps, ends, count, fresh,
    h, a, acc_b, acc_c,
):  # fmt: skip
    """States n ... n + 3 of sixteen channels: forward through the tile once more, then their adjoint, backwards.

    h[i] is the state before position i, a[i] the decay at i; acc_b and acc_c gather the gradients of B and C, each lane
    its own sum.
    """
    a0, a1, a2, a3 = load(A2, at), load(A2, at + W), load(A2, at + 2 * W), load(A2, at + 3 * W)
    h0, h1, h2, h3 = (
        load(from_start, at), load(from_start, at + W), load(from_start, at + 2 * W), load(from_start, at + 3 * W),
    )  # fmt: skip
    first = 0
    for run in range(count):
        reset = run > 0 or fresh
        store(h, first * 64, h0)
        store(h, first * 64 + 16, h1)
        store(h, first * 64 + 32, h2)
        store(h, first * 64 + 48, h3)
        if reset:
            h0, h1, h2, h3 = zeros(), zeros(), zeros(), zeros()
        for i in range(first, ends[run]):
            d = load(step, i * W + j)
            v = load(u, i * W + j)
            k = i * N + n
            m = i * 64
            e0, e1, e2, e3 = exp2(d * a0), exp2(d * a1), exp2(d * a2), exp2(d * a3)
            store(a, m, e0)
            store(a, m + 16, e1)
            store(a, m + 32, e2)
            store(a, m + 48, e3)
            h0 = e0 * h0 + v * bs[k]
            h1 = e1 * h1 + v * bs[k + 1]
            h2 = e2 * h2 + v * bs[k + 2]
            h3 = e3 * h3 + v * bs[k + 3]
            store(h, m + 64, h0)
            store(h, m + 80, h1)
            store(h, m + 96, h2)
            store(h, m + 112, h3)
            y = load(pre, i * W + j)
            store(pre, i * W + j, y + h0 * cs[k] + h1 * cs[k + 1] + h2 * cs[k + 2] + h3 * cs[k + 3])
        if reset:  # nothing flows back across the reset
            for m in range(first * 64, first * 64 + 64, 16):
                store(a, m, zeros())
        first = ends[run]
    a0, a1, a2, a3 = load(A1, at), load(A1, at + W), load(A1, at + 2 * W), load(A1, at + 3 * W)
    g0, g1, g2, g3 = load(g, at), load(g, at + W), load(g, at + 2 * W), load(g, at + 3 * W)
    d0, d1, d2, d3 = zeros(), zeros(), zeros(), zeros()
    for i in range(steps - 1, -1, -1):
        dy = load(grad, i * W + j)
        v = load(u, i * W + j)
        d = load(step, i * W + j)
        k = i * N + n
        m = i * 64
        g0 = g0 + dy * cs[k]
        g1 = g1 + dy * cs[k + 1]
        g2 = g2 + dy * cs[k + 2]
        g3 = g3 + dy * cs[k + 3]
        store(acc_c, m, load(acc_c, m) + dy * load(h, m + 64))
        store(acc_c, m + 16, load(acc_c, m + 16) + dy * load(h, m + 80))
        store(acc_c, m + 32, load(acc_c, m + 32) + dy * load(h, m + 96))
        store(acc_c, m + 48, load(acc_c, m + 48) + dy * load(h, m + 112))
        store(acc_b, m, load(acc_b, m) + v * g0)
        store(acc_b, m + 16, load(acc_b, m + 16) + v * g1)
        store(acc_b, m + 32, load(acc_b, m + 32) + v * g2)
        store(acc_b, m + 48, load(acc_b, m + 48) + v * g3)
        t = load(s, i * W + j)
        store(s, i * W + j, t + g0 * bs[k] + g1 * bs[k + 1] + g2 * bs[k + 2] + g3 * bs[k + 3])
        g0 = g0 * load(a, m)
        g1 = g1 * load(a, m + 16)
        g2 = g2 * load(a, m + 32)
        g3 = g3 * load(a, m + 48)
        t0, t1, t2, t3 = g0 * load(h, m), g1 * load(h, m + 16), g2 * load(h, m + 32), g3 * load(h, m + 48)
        t = load(q, i * W + j)
        store(q, i * W + j, t + t0 * a0 + t1 * a1 + t2 * a2 + t3 * a3)
        d0 = d0 + t0 * d
        d1 = d1 + t1 * d
        d2 = d2 + t2 * d
        d3 = d3 + t3 * d
    store(g, at, g0)
    store(g, at + W, g1)
    store(g, at + 2 * W, g2)
    store(g, at + 3 * W, g3)
    _gather(dA, lost_A, at, d0)
    _gather(dA, lost_A, at + W, d1)
    _gather(dA, lost_A, at + 2 * W, d2)
    _gather(dA, lost_A, at + 3 * W, d3)


@common.kernel
def _backward(
    start, stop, worker, width, L, channels, dy, dlast, x, xb, xl, dt, db, dl, A, B, C, D, z, zb, zl, bias, marks,
    softplus_, low, high, boundaries, dx, ddt, dA, dB, dC, dD, dz, dbias, dstate,
):  # fmt: skip
    N = A.shape[1]
    N4 = (N + 3) // 4 * 4  # the states are taken four at a time; those past the last are zero and stay zero
    groups = B.shape[2]
    per_group = channels // groups
    blocks = (per_group + width - 1) // width
    A1 = np.zeros((N4, W), np.float32)
    A2 = np.zeros((N4, W), np.float32)
    g = np.zeros((N4, W), np.float32)
    dA_block = np.zeros((N4, W), np.float32)
    from_start = np.zeros((N4, W), np.float32)
    step = np.zeros((T, W), np.float32)
    slope = np.zeros((T, W), np.float32)
    xs = np.zeros((T, W), np.float32)
    u = np.zeros((T, W), np.float32)
    grad = np.zeros((T, W), np.float32)
    pre = np.zeros((T, W), np.float32)
    s = np.zeros((T, W), np.float32)
    q = np.zeros((T, W), np.float32)
    lost_A = np.zeros((N4, W), np.float32)
    dD_tile, dD_block, lost_D = np.zeros(W, np.float32), np.zeros(W, np.float32), np.zeros(W, np.float32)
    dbias_tile, dbias_block, lost_bias = np.zeros(W, np.float32), np.zeros(W, np.float32), np.zeros(W, np.float32)
    bs = np.zeros((T, N4), np.float32)
    cs = np.zeros((T, N4), np.float32)
    b_flat, c_flat = bs.reshape(-1), cs.reshape(-1)
    h = np.zeros((T + 1) * 64, np.float32)
    a = np.zeros(T * 64, np.float32)
    acc_b = np.zeros(T * 64, np.float32)
    acc_c = np.zeros(T * 64, np.float32)
    ends = np.zeros(T, np.int64)
    for task in range(start, stop):
        b = task // (groups * blocks)
        group = (task // blocks) % groups
        c0 = group * per_group + (task % blocks) * width
        w = min(width, (group + 1) * per_group - c0)
        A1[:] = _F(0)
        g[:] = _F(0)
        dA_block[:] = _F(0)
        lost_A[:] = _F(0)
        for sums in (dD_block, lost_D, dbias_block, lost_bias):
            sums[:] = _F(0)
        for j in range(w):
            for n in range(N):
                A1[n, j] = A[c0 + j, n]
                g[n, j] = dlast[b, c0 + j, n]
        A2[:] = A1 * LOG2E
        for tile in range((L + T - 1) // T - 1, -1, -1):
            t0 = tile * T
            steps = min(T, L - t0)
            count = _runs(marks, b, t0, steps, ends)
            fresh = marks.size and marks[b, t0] == 1
            _coefficients(marks, b, t0, steps, group, B, bs)
            _coefficients(marks, b, t0, steps, group, C, cs)
            at = _boundary(b, tile, (L + T - 1) // T, group, groups, N, per_group) + c0 - group * per_group
            for n in range(N):
                for j in range(0, w, LANES):
                    store(from_start, n * W + j, load(boundaries, at + n * _padded(per_group) + j))
            ax, ad, az = b * xb + t0 * xl + c0, b * db + t0 * dl + c0, b * zb + t0 * zl + c0
            _steps(dt, ad, dl, bias, softplus_, low, high, b, t0, c0, steps, w, marks, step, slope, True)
            for i in range(steps):
                row = (b * L + t0 + i) * channels + c0
                invalid = marks.size and marks[b, t0 + i] == 2
                for j in range(0, w, LANES):
                    m = i * W + j
                    store(pre, m, zeros())
                    store(s, m, zeros())
                    store(q, m, zeros())
                    if invalid:
                        store(xs, m, zeros())
                        store(u, m, zeros())
                        store(grad, m, zeros())
                    else:
                        v = lanes(x, ax + i * xl + j, w - j)
                        d = lanes(dy, row + j, w - j)
                        if z.size:
                            gate = lanes(z, az + i * zl + j, w - j)
                            d = d * gate * sigmoid(gate)
                        store(xs, m, v)
                        store(u, m, load(step, m) * v)
                        store(grad, m, d)
            for n in range(0, N, 4):
                acc_b[: steps * 64] = _F(0)
                acc_c[: steps * 64] = _F(0)
                for j in range(0, w, LANES):
                    _four_adjoints(
                        from_start, g, A1, A2, dA_block, lost_A, n * W + j, step, u, grad, pre, s, q, j, b_flat, c_flat,
                        n, N4, steps, ends, count, fresh, h, a, acc_b, acc_c,
                    )  # fmt: skip
                for i in range(steps):
                    for k in range(min(4, N - n)):
                        dB[worker, b, t0 + i, group, n + k] += total(load(acc_b, i * 64 + k * 16))
                        dC[worker, b, t0 + i, group, n + k] += total(load(acc_c, i * 64 + k * 16))
            for i in range(steps):
                row = (b * L + t0 + i) * channels + c0
                invalid = marks.size and marks[b, t0 + i] == 2
                for j in range(0, w, LANES):
                    m = i * W + j
                    count_ = w - j
                    if invalid:
                        put(dx, row + j, count_, zeros())
                        put(ddt, row + j, count_, zeros())
                        if z.size:
                            put(dz, row + j, count_, zeros())
                        continue
                    v, d = load(xs, m), load(grad, m)
                    through = load(s, m)
                    out = through * load(step, m)
                    if D.size:
                        skip = lanes(D, c0 + j, count_)
                        out = out + skip * d
                        store(dD_tile, j, load(dD_tile, j) + d * v)
                        if z.size:
                            store(pre, m, load(pre, m) + skip * v)
                    put(dx, row + j, count_, out)
                    e = (load(q, m) + through * v) * load(slope, m)
                    put(ddt, row + j, count_, e)
                    store(dbias_tile, j, load(dbias_tile, j) + e)
                    if z.size:
                        gate = lanes(z, az + i * zl + j, count_)
                        open_ = sigmoid(gate)
                        e = lanes(dy, row + j, count_) * load(pre, m)
                        put(dz, row + j, count_, e * open_ * (_F(1) + gate * (_F(1) - open_)))
            for j in range(0, w, LANES):
                _gather(dD_block, lost_D, j, load(dD_tile, j))
                _gather(dbias_block, lost_bias, j, load(dbias_tile, j))
                store(dD_tile, j, zeros())
                store(dbias_tile, j, zeros())
        for j in range(w):
            if D.size:
                dD[b, c0 + j] = dD_block[j]
            if bias.size:
                dbias[b, c0 + j] = dbias_block[j]
            for n in range(N):
                dA[b, c0 + j, n] = dA_block[n, j]
                dstate[b, c0 + j, n] = g[n, j]


@common.kernel
def _step(x, dt, A, B, C, D, z, bias, softplus_, low, high, state, y, new):
    rows, channels = x.shape
    N = A.shape[1]
    per_group = channels // B.shape[1]
    step = np.zeros(channels + LANES, np.float32)
    limited = low > -np.inf or high < np.inf
    for b in range(rows):
        row = b * channels
        for d in range(0, channels, LANES):
            u = lanes(dt, row + d, channels - d)
            if bias.size:
                u = u + lanes(bias, d, channels - d)
            if softplus_:
                u = softplus(u)
            if limited:
                u = clamp(u, low, high)
            store(step, d, u)
        for d in range(channels):
            # One channel at a time, its states across the lanes.
            g = (b * B.shape[1] + d // per_group) * N
            u = step[d]
            v = u * x[b, d]
            u2 = u * LOG2E
            at = (row + d) * N
            acc = zeros()
            for n in range(0, N, LANES):
                h = exp2(lanes(A, d * N + n, N - n) * u2) * lanes(state, at + n, N - n)
                h = h + lanes(B, g + n, N - n) * v
                put(new, at + n, N - n, h)
                acc = acc + h * lanes(C, g + n, N - n)
            y[b, d] = total(acc)
        for d in range(0, channels, LANES):
            out = lanes(y, row + d, channels - d)
            if D.size:
                out = out + lanes(D, d, channels - d) * lanes(x, row + d, channels - d)
            if z.size:
                gate = lanes(z, row + d, channels - d)
                out = out * gate * sigmoid(gate)
            put(y, row + d, channels - d, out)


def _or(array, empty):
    return empty if array is None else array


def _tasks(rows: int, channels: int, groups: int) -> tuple[int, int]:
    """(tasks, channels of a block): narrower blocks where wide ones would leave threads without work."""
    share = rows * channels // torch.get_num_threads()
    width = min(W, max(LANES, share // LANES * LANES))
    return rows * groups * -(-(channels // groups) // width), width


def _memory(t: Tensor | None):
    """(B, L, D) as flat memory with its strides over batch and time; an absent one is empty."""
    if t is None:
        return _EMPTY1, 0, 0
    memory, (batch, time) = common.rows(t)
    return memory, batch, time


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, state: Tensor | None, marks: Tensor | None,
    dt_softplus: bool, low: float, high: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments as `statewise::selective_scan_numba` in the package's __init__; B and C are (B, L, G, N)."""
    (rows, L, channels), N, groups = x.shape, A.shape[1], B.shape[2]
    tasks, width = _tasks(rows, channels, groups)
    y = common.output(x.shape, x)
    last = common.empty(rows, channels, N)
    boundaries = common.empty(rows, -(-L // T) if keep else 0, groups, N, -(-channels // groups // LANES) * LANES)
    f = common.f32
    common.run(
        _forward, tasks, width, L, channels, *_memory(x), *_memory(dt), f(A), f(B), f(C), _or(f(D), _EMPTY1),
        *_memory(z), _or(f(dt_bias), _EMPTY1), _or(f(state), _EMPTY),
        _NO_MARKS if marks is None else marks.contiguous().numpy(), dt_softplus, _F(low), _F(high),
        keep, common.words(y), last.numpy(), common.words(boundaries),
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
    tasks, width = _tasks(rows, channels, groups)
    inline = rows * L * channels * N < 100_000
    workers = common.workers(tasks, inline)

    empty = common.empty
    dx, ddt, dz = (common.output(t.shape if t is not None else (0,), t if t is not None else x) for t in (x, dt, z))
    dA, dstate = empty(rows, channels, N), empty(rows, channels, N)
    dD = empty(*((rows, channels) if D is not None else (0, 0)))
    dbias = empty(*((rows, channels) if dt_bias is not None else (0, 0)))
    dB, dC = torch.zeros((2, workers, *B.shape), dtype=torch.float32)
    f = common.f32
    common.run(
        _backward, tasks, width, L, channels, common.words(dy), f(dlast), *_memory(x), *_memory(dt), f(A), f(B), f(C),
        _or(f(D), _EMPTY1), *_memory(z), _or(f(dt_bias), _EMPTY1),
        _NO_MARKS if marks is None else marks.contiguous().numpy(), dt_softplus, _F(low), _F(high),
        common.words(boundaries), common.words(dx), common.words(ddt), dA.numpy(), dB.numpy(), dC.numpy(), dD.numpy(),
        common.words(dz), dbias.numpy(), dstate.numpy(), inline=inline,
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
    y, new = common.empty(*x.shape), common.empty(*state.shape)
    f = common.f32
    _step(
        f(x), f(dt), f(A), f(B), f(C), _or(f(D), _EMPTY1), _or(f(z), _EMPTY2), _or(f(dt_bias), _EMPTY1),
        dt_softplus, _F(low), _F(high), f(state), y.numpy(), new.numpy(),
    )  # fmt: skip
    return y.to(x.dtype), new
