"""CPU kernels of SSD: forward, backward and one step.

A worker takes a range of heads of one row and goes from chunk to chunk. What the heads of a group share (B, C and their
products) is made once per chunk; then each head does its matrix products on blocks that stay in the second-level cache,
so that no intermediate of the chunked form ever reaches memory. Products run four rows by four vectors at a time.

Inside a chunk everything that has an output position is stored with positions across the lanes, (P, Q) and not (Q, P):
then the state keeps its own layout (P, N) in every product, and only x, y and their gradients are transposed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._simd import LANES, LOG2E, REGISTERS, exp2, fill, lanes, load, put, store, total, transpose, within, zeros

_F = np.float32
# Sixteen sums of a product stay in the registers of AVX-512; four in those of AVX2.
_MANY = REGISTERS >= 32
_NONE2 = np.zeros((0, 0), np.float32)
_NONE4 = np.zeros((0, 0, 0, 0), np.float32)
_NO_MARKS = np.zeros((0, 0), np.uint8)


@common.kernel
def _product(a, a0, row, step, b, b0, ldb, c, c0, ldc, rows, columns, depth, add):
    """c[r, :] = (c[r, :] if add else 0) + sum_k a[r, k] b[k, :].

    Element (r, k) of a lies at a0 + r row + k step. `rows` is a multiple of 4, `columns` of 16.
    """
    for r in range(0, rows, 4):
        i0 = a0 + r * row
        o0 = c0 + r * ldc
        o1, o2, o3 = o0 + ldc, o0 + 2 * ldc, o0 + 3 * ldc
        j = 0
        while j < columns:
            i, k0 = i0, b0 + j
            if _MANY and columns - j >= 64:
                if add:
                    s00, s01, s02, s03 = (
                        load(c, o0 + j),
                        load(c, o0 + j + 16),
                        load(c, o0 + j + 32),
                        load(c, o0 + j + 48),
                    )
                    s10, s11, s12, s13 = (
                        load(c, o1 + j),
                        load(c, o1 + j + 16),
                        load(c, o1 + j + 32),
                        load(c, o1 + j + 48),
                    )
                    s20, s21, s22, s23 = (
                        load(c, o2 + j),
                        load(c, o2 + j + 16),
                        load(c, o2 + j + 32),
                        load(c, o2 + j + 48),
                    )
                    s30, s31, s32, s33 = (
                        load(c, o3 + j),
                        load(c, o3 + j + 16),
                        load(c, o3 + j + 32),
                        load(c, o3 + j + 48),
                    )
                else:
                    s00, s01, s02, s03 = zeros(), zeros(), zeros(), zeros()
                    s10, s11, s12, s13 = zeros(), zeros(), zeros(), zeros()
                    s20, s21, s22, s23 = zeros(), zeros(), zeros(), zeros()
                    s30, s31, s32, s33 = zeros(), zeros(), zeros(), zeros()
                for _ in range(depth):
                    v0, v1, v2, v3 = load(b, k0), load(b, k0 + 16), load(b, k0 + 32), load(b, k0 + 48)
                    e = a[i]
                    s00, s01, s02, s03 = s00 + v0 * e, s01 + v1 * e, s02 + v2 * e, s03 + v3 * e
                    e = a[i + row]
                    s10, s11, s12, s13 = s10 + v0 * e, s11 + v1 * e, s12 + v2 * e, s13 + v3 * e
                    e = a[i + 2 * row]
                    s20, s21, s22, s23 = s20 + v0 * e, s21 + v1 * e, s22 + v2 * e, s23 + v3 * e
                    e = a[i + 3 * row]
                    s30, s31, s32, s33 = s30 + v0 * e, s31 + v1 * e, s32 + v2 * e, s33 + v3 * e
                    i += step
                    k0 += ldb
                (
                    store(c, o0 + j, s00),
                    store(c, o0 + j + 16, s01),
                    store(c, o0 + j + 32, s02),
                    store(c, o0 + j + 48, s03),
                )
                (
                    store(c, o1 + j, s10),
                    store(c, o1 + j + 16, s11),
                    store(c, o1 + j + 32, s12),
                    store(c, o1 + j + 48, s13),
                )
                (
                    store(c, o2 + j, s20),
                    store(c, o2 + j + 16, s21),
                    store(c, o2 + j + 32, s22),
                    store(c, o2 + j + 48, s23),
                )
                (
                    store(c, o3 + j, s30),
                    store(c, o3 + j + 16, s31),
                    store(c, o3 + j + 32, s32),
                    store(c, o3 + j + 48, s33),
                )
                j += 64
            else:
                if add:
                    s00, s10, s20, s30 = load(c, o0 + j), load(c, o1 + j), load(c, o2 + j), load(c, o3 + j)
                else:
                    s00, s10, s20, s30 = zeros(), zeros(), zeros(), zeros()
                for _ in range(depth):
                    v0 = load(b, k0)
                    s00, s10, s20, s30 = (
                        s00 + v0 * a[i], s10 + v0 * a[i + row], s20 + v0 * a[i + 2 * row], s30 + v0 * a[i + 3 * row]
                    )  # fmt: skip
                    i += step
                    k0 += ldb
                store(c, o0 + j, s00), store(c, o1 + j, s10), store(c, o2 + j, s20), store(c, o3 + j, s30)
                j += 16


@common.kernel
def _transpose(source, at, stride, into, to, into_stride, rows, columns):
    """into (columns, rows) = source (rows, columns), both multiples of 16."""
    for r in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            transpose(source, at + r * stride + c, stride, into, to + c * into_stride + r, into_stride)


@common.kernel
def _fetch(memory, at, row, width, marks, b, t0, steps, padded, into, ld):
    """Rows t0 ... t0 + steps of memory into (padded, ld); zeros at invalid positions, past the end and past `width`."""
    for i in range(padded):
        if i >= steps or (marks.size and marks[b, t0 + i] == 2):
            for j in range(0, ld, LANES):
                store(into, i * ld + j, zeros())
        else:
            for j in range(0, ld, LANES):
                if j < width:
                    store(into, i * ld + j, lanes(memory, at + i * row + j, width - j))
                else:
                    store(into, i * ld + j, zeros())


@common.kernel
def _starts(marks, b, t0, steps, padded, starts):
    """starts[i] = first position of the chunk in the document of i; -1 if the document began before the chunk."""
    first = -1
    for i in range(padded):
        if i < steps and marks.size and marks[b, t0 + i] == 1:
            first = i
        starts[i] = first


@common.kernel
def _decays(dt, at, stride, a, steps, padded, starts, high, low, from_start, to_end):
    """Sums of the log decays from the chunk's start (base 2, as high + low), and the decays to and from its ends.

    The sums are made in float64 and kept as two float32, so that the difference of two of them is as good as a sum of
    the stretch between. Returns the decay of the whole chunk.
    """
    run = 0.0
    a2 = a * 1.4426950408889634
    for i in range(padded):
        if i < steps:
            run += dt[at + i * stride] * a2
        high[i] = _F(run)
        low[i] = _F(run - high[i])
    whole = run
    for i in range(0, padded, LANES):
        v = load(high, i)
        store(from_start, i, exp2(v))
        store(to_end, i, exp2(fill(_F(whole)) - v + (fill(_F(whole - _F(whole))) - load(low, i))))
    last = starts[steps - 1]
    for i in range(padded):
        if starts[i] >= 0:
            from_start[i] = _F(0)
        if i < last or i >= steps:
            to_end[i] = _F(0)
    return _F(2.0**whole) if last < 0 else _F(0)


@common.kernel
def _masked(scores, high, low, starts, padded, out, decay, want_decay):
    """out[j, i] = scores[j, i] times the decay from j to i, for j <= i in one document."""
    for j in range(padded):
        hj, lj = fill(high[j]), fill(low[j])
        for i in range(0, padded, LANES):
            m = j * padded + i
            if i + LANES <= j:
                store(out, m, zeros())
                if want_decay:
                    store(decay, m, zeros())
                continue
            d = exp2(load(high, i) - hj + (load(low, i) - lj))
            # Lanes whose document starts after j: the starts never fall, so they are a tail of the row.
            end = i + LANES - 1
            while end >= i and starts[end] > j:
                end -= 1
            d = within(d, i, j, end)
            store(out, m, load(scores, m) * d)
            if want_decay:
                store(decay, m, d)


@common.kernel
def _gather(memory, P, N, into, N16):
    """One state (P, N) into rows of N16."""
    for p in range(P):
        for n in range(0, N16, LANES):
            store(into, p * N16 + n, lanes(memory, p * N + n, N - n) if n < N else zeros())


@common.kernel
def _scatter(state, P, N, N16, memory):
    for p in range(P):
        for n in range(0, N, LANES):
            put(memory, p * N + n, N - n, load(state, p * N16 + n))


@common.kernel
def _forward(
    start, stop, worker, x, xb, xl, dt, A, B, bb, bl, C, cb, cl, D, state, marks, Q, P, N, G, keep, y, last, boundaries
):
    L, H = dt.shape[1:]
    R = H // G
    P16, N16 = (P + 15) // 16 * 16, (N + 15) // 16 * 16
    Q16 = (min(Q, L) + 15) // 16 * 16
    bs = np.zeros(Q16 * N16, np.float32)
    cs = np.zeros(Q16 * N16, np.float32)
    ct = np.zeros(N16 * Q16, np.float32)
    scores = np.zeros(Q16 * Q16, np.float32)
    mixing = np.zeros(Q16 * Q16, np.float32)
    v = np.zeros(Q16 * P16, np.float32)
    out = np.zeros(P16 * Q16, np.float32)
    row = np.zeros(Q16 * P16, np.float32)
    high, low = np.zeros(Q16, np.float32), np.zeros(Q16, np.float32)
    from_start, to_end = np.zeros(Q16, np.float32), np.zeros(Q16, np.float32)
    starts = np.zeros(Q16, np.int64)
    states = np.zeros((min(stop - start, H), P16 * N16), np.float32)
    dts = dt.reshape(-1)
    task = start
    while task < stop:
        b, first = task // H, task % H
        end = min(H, first + stop - task)
        task += end - first
        for h in range(first, end):
            if state.size:
                _gather(state[b, h].reshape(-1), P, N, states[h - first], N16)
            else:
                states[h - first] = _F(0)
        for t0 in range(0, L, Q):
            steps = min(Q, L - t0)
            q = (steps + 15) // 16 * 16
            _starts(marks, b, t0, steps, q, starts)
            for h in range(first, end):
                if h == first or h % R == 0:
                    g = h // R
                    _fetch(B, b * bb + t0 * bl + g * N, bl, N, marks, b, t0, steps, q, bs, N16)
                    _fetch(C, b * cb + t0 * cl + g * N, cl, N, marks, b, t0, steps, q, cs, N16)
                    _transpose(cs, 0, N16, ct, 0, q, q, N16)
                    _product(bs, 0, N16, 1, ct, 0, q, scores, 0, q, q, q, N, False)
                S = states[h - first]
                if keep:
                    _scatter(S, P, N, N16, boundaries[b, t0 // Q, h].reshape(-1))
                at = (b * L + t0) * H + h
                whole = _decays(dts, at, H, A[h], steps, q, starts, high, low, from_start, to_end)
                _masked(scores, high, low, starts, q, mixing, mixing, False)
                _fetch(x, b * xb + t0 * xl + h * P, xl, P, marks, b, t0, steps, q, v, P16)
                for i in range(steps):
                    e = dts[at + i * H]
                    for p in range(0, P16, LANES):
                        store(v, i * P16 + p, load(v, i * P16 + p) * e)
                # out (P, Q) = what the incoming state gives, and what the chunk's own positions give.
                _product(S, 0, N16, 1, ct, 0, q, out, 0, q, P16, q, N, False)
                for i in range(0, q, LANES):
                    f = load(from_start, i)
                    for p in range(P):
                        store(out, p * q + i, load(out, p * q + i) * f)
                _product(v, 0, 1, P16, mixing, 0, q, out, 0, q, P16, q, steps, True)
                _transpose(out, 0, q, row, 0, P16, P16, q)
                for i in range(steps):
                    to = ((b * L + t0 + i) * H + h) * P
                    invalid = marks.size and marks[b, t0 + i] == 2
                    for p in range(0, P, LANES):
                        o = load(row, i * P16 + p)
                        if invalid:
                            o = zeros()
                        elif D.size:
                            o = o + lanes(D, h * P + p, P - p) * lanes(x, b * xb + (t0 + i) * xl + h * P + p, P - p)
                        put(y, to + p, P - p, o)
                # The state at the chunk's end.
                for i in range(steps):
                    e = to_end[i]
                    for p in range(0, P16, LANES):
                        store(v, i * P16 + p, load(v, i * P16 + p) * e)
                for k in range(0, P * N16, LANES):
                    store(S, k, load(S, k) * whole)
                _product(v, 0, 1, P16, bs, 0, N16, S, 0, N16, P16, N16, steps, True)
        for h in range(first, end):
            _scatter(states[h - first], P, N, N16, last[b, h].reshape(-1))


@common.kernel
def _row_dots(part, other, scale, into, rows, ld, dots):
    """part *= scale row by row; dots[i] = part[i] . other[i]; into += part."""
    for i in range(rows):
        s = fill(scale[i])
        acc = zeros()
        for n in range(i * ld, (i + 1) * ld, LANES):
            v = load(part, n) * s
            acc = acc + v * load(other, n)
            store(into, n, load(into, n) + v)
        dots[i] = total(acc)


@common.kernel
def _crossings(dmixing, mixing, decay, dscores, q, steps, crossed, at_row):
    """dscores += dmixing * decay; crossed[s] = sum of dmixing * mixing over j < s <= i, the part of the gradient of the
    log decay at s that stays inside the chunk.

    Summed stretch by stretch: by differences of running sums it would cancel where decay is fast.
    """
    for i in range(0, q, LANES):
        store(at_row, i, zeros())
    for s in range(q):
        acc = zeros()
        for i in range(s // LANES * LANES, q, LANES):
            acc = acc + within(load(at_row, i), i, s, q)
        crossed[s] = total(acc)
        for i in range(s // LANES * LANES, q, LANES):
            m = s * q + i
            e = load(dmixing, m)
            store(dscores, m, load(dscores, m) + e * load(decay, m))
            store(at_row, i, load(at_row, i) + e * load(mixing, m))


@common.kernel
def _backward(
    start, stop, worker, dy, dlast, x, xb, xl, dt, A, B, bb, bl, C, cb, cl, D, marks, boundaries, Q, P, N, G,
    dx, ddt, dA, dB, dC, dD, dstate,
):  # fmt: skip
    L, H = dt.shape[1:]
    R = H // G
    P16, N16 = (P + 15) // 16 * 16, (N + 15) // 16 * 16
    Q16 = (min(Q, L) + 15) // 16 * 16
    bs, cs = np.zeros(Q16 * N16, np.float32), np.zeros(Q16 * N16, np.float32)
    bt, ct = np.zeros(N16 * Q16, np.float32), np.zeros(N16 * Q16, np.float32)
    dbs, dcs = np.zeros(Q16 * N16, np.float32), np.zeros(Q16 * N16, np.float32)
    part = np.zeros(Q16 * N16, np.float32)
    scores, dscores = np.zeros(Q16 * Q16, np.float32), np.zeros(Q16 * Q16, np.float32)
    mixing, dmixing = np.zeros(Q16 * Q16, np.float32), np.zeros(Q16 * Q16, np.float32)
    decay = np.zeros(Q16 * Q16, np.float32)
    xs, v = np.zeros(Q16 * P16, np.float32), np.zeros(Q16 * P16, np.float32)
    grad, grad_t = np.zeros(Q16 * P16, np.float32), np.zeros(P16 * Q16, np.float32)
    dv, dv_t = np.zeros(Q16 * P16, np.float32), np.zeros(P16 * Q16, np.float32)
    high, low = np.zeros(Q16, np.float32), np.zeros(Q16, np.float32)
    from_start, to_end = np.zeros(Q16, np.float32), np.zeros(Q16, np.float32)
    into, out_of, crossed = np.zeros(Q16, np.float32), np.zeros(Q16, np.float32), np.zeros(Q16, np.float32)
    at_row = np.zeros(Q16, np.float32)
    skips = np.zeros(4 * P16, np.float32)
    starts = np.zeros(Q16, np.int64)
    S = np.zeros(P16 * N16, np.float32)
    sums_A = np.zeros(min(stop - start, H), np.float64)
    dstates = np.zeros((min(stop - start, H), P16 * N16), np.float32)
    dts = dt.reshape(-1)
    task = start
    while task < stop:
        b, first = task // H, task % H
        end = min(H, first + stop - task)
        task += end - first
        for h in range(first, end):
            _gather(dlast[b, h].reshape(-1), P, N, dstates[h - first], N16)
            sums_A[h - first] = 0.0
            dD[b, h] = _F(0)
        for t0 in range((L - 1) // Q * Q, -1, -Q):
            steps = min(Q, L - t0)
            q = (steps + 15) // 16 * 16
            _starts(marks, b, t0, steps, q, starts)
            for h in range(first, end):
                g = h // R
                if h == first or h % R == 0:
                    _fetch(B, b * bb + t0 * bl + g * N, bl, N, marks, b, t0, steps, q, bs, N16)
                    _fetch(C, b * cb + t0 * cl + g * N, cl, N, marks, b, t0, steps, q, cs, N16)
                    _transpose(bs, 0, N16, bt, 0, q, q, N16)
                    _transpose(cs, 0, N16, ct, 0, q, q, N16)
                    _product(bs, 0, N16, 1, ct, 0, q, scores, 0, q, q, q, N, False)
                    dscores[: q * q] = _F(0)
                    dbs[: q * N16] = _F(0)
                    dcs[: q * N16] = _F(0)
                dS = dstates[h - first]
                _gather(boundaries[b, t0 // Q, h].reshape(-1), P, N, S, N16)
                at = (b * L + t0) * H + h
                whole = _decays(dts, at, H, A[h], steps, q, starts, high, low, from_start, to_end)
                _masked(scores, high, low, starts, q, mixing, decay, True)
                _fetch(x, b * xb + t0 * xl + h * P, xl, P, marks, b, t0, steps, q, xs, P16)
                _fetch(dy, at * P, H * P, P, marks, b, t0, steps, q, grad, P16)
                _transpose(grad, 0, P16, grad_t, 0, q, q, P16)
                for i in range(q):
                    e = dts[at + i * H] if i < steps else _F(0)
                    for p in range(i * P16, (i + 1) * P16, LANES):
                        store(v, p, load(xs, p) * e)
                # Through the state that enters, and the state that leaves.
                through = zeros()
                for k in range(0, P * N16, LANES):
                    through = through + load(S, k) * load(dS, k)
                passed = whole * total(through)
                _product(grad, 0, P16, 1, S, 0, N16, part, 0, N16, q, N16, P, False)
                _row_dots(part, cs, from_start, dcs, q, N16, into)
                _product(v, 0, P16, 1, dS, 0, N16, part, 0, N16, q, N16, P, False)
                _row_dots(part, bs, to_end, dbs, q, N16, out_of)
                # Inside the chunk.
                _product(v, 0, P16, 1, grad_t, 0, q, dmixing, 0, q, q, q, P, False)
                _crossings(dmixing, mixing, decay, dscores, q, steps, crossed, at_row)
                _product(dS, 0, N16, 1, bt, 0, q, dv_t, 0, q, P16, q, N, False)
                _transpose(dv_t, 0, q, dv, 0, P16, P16, q)
                for i in range(q):
                    e = to_end[i]
                    for p in range(i * P16, (i + 1) * P16, LANES):
                        store(dv, p, load(dv, p) * e)
                _product(mixing, 0, q, 1, grad, 0, P16, dv, 0, P16, q, P16, steps, True)
                # The gradient of the state that enters.
                for k in range(0, P * N16, LANES):
                    store(dS, k, load(dS, k) * whole)
                # Four sums at once, and each chunk by itself: one long sum would lose digits.
                skips[:] = _F(0)
                for i in range(steps):
                    e = from_start[i]
                    d = dts[at + i * H]
                    to = (at + i * H) * P
                    invalid = marks.size and marks[b, t0 + i] == 2
                    acc = zeros()
                    for p in range(0, P, LANES):
                        m = i * P16 + p
                        dy_, dv_, x_ = load(grad, m), load(dv, m), load(xs, m)
                        acc = acc + dv_ * x_
                        dx_ = dv_ * d
                        if D.size:
                            dx_ = dx_ + lanes(D, h * P + p, P - p) * dy_
                            k = (i & 3) * P16 + p
                            store(skips, k, load(skips, k) + dy_ * x_)
                        if invalid:
                            dx_ = zeros()
                        put(dx, to + p, P - p, dx_)
                        store(grad, m, dy_ * e)
                    ddt[at + i * H] = total(acc)
                _product(grad, 0, 1, P16, cs, 0, N16, dS, 0, N16, P16, N16, steps, True)
                for p in range(P):
                    dD[b, h, p] += (skips[p] + skips[P16 + p]) + (skips[2 * P16 + p] + skips[3 * P16 + p])
                # The log decay at s acts on all that crosses from before s to s or later.
                later, earlier = 0.0, 0.0
                for s in range(steps):
                    later += into[s]
                for s in range(steps):
                    of_log = crossed[s] + later + earlier + passed
                    later -= into[s]
                    earlier += out_of[s]
                    sums_A[h - first] += of_log * dts[at + s * H]
                    if marks.size and marks[b, t0 + s] == 2:
                        ddt[at + s * H] = _F(0)
                    else:
                        ddt[at + s * H] += _F(of_log * A[h])
                if h == end - 1 or (h + 1) % R == 0:
                    _product(dscores, 0, q, 1, cs, 0, N16, dbs, 0, N16, q, N16, steps, True)
                    _product(dscores, 0, 1, q, bs, 0, N16, dcs, 0, N16, q, N16, steps, True)
                    for i in range(steps):
                        if marks.size and marks[b, t0 + i] == 2:
                            continue
                        for n in range(N):
                            dB[worker, b, t0 + i, g, n] += dbs[i * N16 + n]
                            dC[worker, b, t0 + i, g, n] += dcs[i * N16 + n]
        for h in range(first, end):
            _scatter(dstates[h - first], P, N, N16, dstate[b, h].reshape(-1))
            dA[b, h] = sums_A[h - first]


@common.kernel
def _step(start, stop, worker, x, dt, A, B, C, D, state, P, N, G, y, new):
    H = dt.shape[1]
    R = H // G
    for task in range(start, stop):
        b, h = task // H, task % H
        e = dt[b, h]
        keep = fill(e * A[h] * LOG2E)
        keep = exp2(keep)
        at = (b * G + h // R) * N
        for p in range(P):
            i = task * P + p
            v = x[i] * e
            acc = zeros()
            for n in range(0, N, LANES):
                s = lanes(B, at + n, N - n) * v
                if state.size:
                    s = s + keep * lanes(state, i * N + n, N - n)
                put(new, i * N + n, N - n, s)
                acc = acc + s * lanes(C, at + n, N - n)
            y[i] = total(acc) + (D[h * P + p] * x[i] if D.size else _F(0))


def _or(array, empty):
    return empty if array is None else array


def _memory(t: Tensor):
    """A tensor (B, L, ...) whose inner axes are dense, as flat memory with its strides over batch and time."""
    memory, (batch, time) = common.rows(t.flatten(2))
    return memory, batch, time


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    marks: Tensor | None, chunk: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments as `statewise::ssd_numba` in the package's __init__."""
    (rows, L, H, P), (G, N) = x.shape, B.shape[2:]
    y, last = common.output(x.shape, x), common.empty(rows, H, P, N)
    boundaries = common.empty(rows, -(-L // chunk) if keep else 0, H, P, N)
    f = common.f32
    common.run(
        _forward, rows * H, *_memory(x), f(dt), f(A), *_memory(B), *_memory(C), _or(f(D), _NONE2).reshape(-1),
        _or(f(state), _NONE4), _NO_MARKS if marks is None else marks.contiguous().numpy(), chunk, P, N, G, keep,
        common.words(y), last.numpy(), boundaries.numpy(), inline=rows * L * H * P * N < 500_000,
    )  # fmt: skip
    return y.to(x.dtype), last, boundaries


def backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    state: Tensor | None, marks: Tensor | None, boundaries: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, state, in the dtypes of the inputs; empty for absent inputs."""
    (rows, L, H, P), (G, N) = x.shape, B.shape[2:]
    inline = rows * L * H * P * N < 500_000
    workers = common.workers(rows * H, inline)
    empty = common.empty
    dx, ddt, dA, dD, dstate = (
        common.output(x.shape, x),
        empty(*dt.shape),
        empty(rows, H),
        empty(rows, H, P),
        empty(rows, H, P, N),
    )
    dB, dC = torch.zeros((2, workers, *B.shape), dtype=torch.float32)
    f = common.f32
    common.run(
        _backward, rows * H, common.words(dy), f(dlast), *_memory(x), f(dt), f(A), *_memory(B), *_memory(C),
        _or(f(D), _NONE2).reshape(-1), _NO_MARKS if marks is None else marks.contiguous().numpy(), boundaries.numpy(),
        chunk, P, N, G, common.words(dx), ddt.numpy().reshape(-1), dA.numpy(), dB.numpy(), dC.numpy(), dD.numpy(),
        dstate.numpy(), inline=inline,
    )  # fmt: skip

    def like(grad: Tensor, t: Tensor | None) -> Tensor:
        return grad.new_empty(0) if t is None else grad.to(t.dtype)

    return (
        like(dx, x), like(ddt, dt), like(dA.sum(0), A), like(dB.sum(0), B), like(dC.sum(0), C), like(dD.sum(0), D),
        like(dstate, state),
    )  # fmt: skip


def step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One position: x (B, H, P), dt (B, H), B and C (B, G, N), D (H, P), state (B, H, P, N)."""
    (rows, H, P), (G, N) = x.shape, B.shape[1:]
    y, new = common.empty(*x.shape), common.empty(rows, H, P, N)
    f = common.f32
    common.run(
        _step, rows * H, common.words(x.to(torch.float32)), f(dt), f(A), common.words(B), common.words(C),
        _or(f(D), _NONE2).reshape(-1), _or(f(state), _NONE4).reshape(-1), P, N, G, common.words(y), common.words(new),
        inline=rows * H * P * N < 500_000,
    )  # fmt: skip
    return y, new
