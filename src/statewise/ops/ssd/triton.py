"""GPU kernels of `ssd`, forward and backward, and the decode step.

The sequence is cut into chunks. Inside a chunk the recurrence is a masked matrix product, between chunks it is a state.
One program walks over the chunks of one head with the state (P, N) in registers, so that no state goes through memory.
Where batch and heads are too few to fill a GPU, time is cut into stretches of some chunks: each stretch is first run
from zero for its final state only, these are joined in order, and then all stretches run side by side.

The backward pass walks twice, forward for the state that enters each chunk and in reverse for the gradient of the state
that leaves it; then all chunks are independent. It keeps nothing from the forward pass but its inputs.

Letters: Q positions of a chunk, T chunks of a stretch, i the position that reads and j the one that writes.

Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, interpreted, processors, sigmoid, silu_slope, softplus

# C B^T costs Q N per token and head and the state 2 P N: 64 balances them for the usual P = 64, N = 128, and is what
# one warp group multiplies at once. It is for bfloat16. Operands of four bytes, and those for three products in TF32,
# fill registers and shared memory (360 of 227 kB in the backward pass), so their chunks are as short as tl.dot allows.
CHUNK, SHORT_CHUNK = 64, 16
# tl.dot wants at least 16 in every direction.
LEAST = 16
# Numbers of a state that one program holds: 64 of the 255 registers of each of 128 threads.
_STATE = 8192


@triton.jit
def _narrow(t, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """`t` in the dtype KIND, rounded to nearest as the hardware does; Triton's interpreter only cuts bfloat16 off."""
    if PRECISION == "interpreted" and KIND == tl.bfloat16:  # noqa: SIM300
        bits = t.to(tl.float32).to(tl.int32, bitcast=True)
        t = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return t.to(KIND)


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b. One running total keeps the registers of a second one free."""
    if PRECISION == "interpreted":
        # Triton's interpreter multiplies the bits of bfloat16 as if they were integers. Products of two numbers in
        # bfloat16 are exact in float32, so this computes what the hardware does.
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, total)
    else:  # noqa: RET505  (Triton compiles both branches unless the condition is a constant with an else)
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _dot(a, b, total, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b with both operands in KIND, added up in float32."""
    return _product(_narrow(a, KIND, PRECISION), _narrow(b, KIND, PRECISION), total, PRECISION)


@triton.jit
def _dot_wide(a, b, total, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b for a float32 `a` with all its digits, where KIND holds `b` exactly.

    States are sums over thousands of tokens, so a factor of theirs is not rounded to half precision: three numbers in
    bfloat16 hold the 24 bits of one in float32.
    """
    b = b.to(KIND)
    if KIND == tl.bfloat16:  # noqa: SIM300
        high = a.to(KIND)
        rest = a - high.to(tl.float32)
        middle = rest.to(KIND)
        low = (rest - middle.to(tl.float32)).to(KIND)
        return _product(high, b, _product(middle, b, _product(low, b, total, PRECISION), PRECISION), PRECISION)
    else:  # noqa: RET505
        return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _tile(pointer, rows, stride, columns, width, valid):
    """(rows, columns) of memory whose last axis is dense; zeros where a row is not valid, whatever stands there."""
    return tl.load(
        pointer + rows[:, None] * stride + columns[None, :], mask=valid[:, None] & (columns < width)[None, :], other=0.0
    )


@triton.jit
def _steps(
    dt, marks, k, L, dt_l, A2, bias, low, high,
    Q: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """What one chunk of one head knows about time.

    Returns raw step and step (0 where invalid), which positions are valid, the document of each position (0 for the one
    under way when the chunk begins), and running sums of log2 of the decay in two parts `high` and `low`.

    A difference of two running sums cancels. But parts that are multiples of one power of two, large enough for their
    sum to fit 24 bits, add up and subtract without any rounding; what is left over is 2^-22 of the sum or less.
    """
    i = tl.arange(0, Q)
    t = k * Q + i
    valid = t < L
    document = tl.zeros([Q], tl.int32)
    if MARKS:
        mark = tl.load(marks + t, mask=valid, other=2)
        valid = mark != 2
        document = tl.cumsum((mark == 1).to(tl.int32), 0)
    # The pointer is moved in 64 bits; offsets inside a chunk fit 32.
    raw = tl.load(dt + tl.cast(k, tl.int64) * Q * dt_l + i * dt_l, mask=valid, other=0.0).to(tl.float32) + bias
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    if LIMIT:
        step = tl.minimum(tl.maximum(step, low), high)
    step = tl.where(valid, step, 0.0)
    log = step * A2
    exponent = tl.sum(tl.abs(log), 0).to(tl.int32, bitcast=True) & 0x7F800000
    round_to = 6.0 * exponent.to(tl.float32, bitcast=True)
    coarse = (log + round_to) - round_to
    return raw, step, valid, document, tl.cumsum(coarse, 0), tl.cumsum(log - coarse, 0)


@triton.jit
def _ends(document, high, low, Q: tl.constexpr):
    """Decay from the start of the chunk to each position, from each position to the end, and through the chunk."""
    last = tl.arange(0, Q) == Q - 1
    end = tl.sum(tl.where(last, document, 0), 0)
    high_end = tl.sum(tl.where(last, high, 0.0), 0)
    low_end = tl.sum(tl.where(last, low, 0.0), 0)
    from_start = tl.where(document == 0, tl.exp2(high + low), 0.0)
    to_end = tl.where(document == end, tl.exp2((high_end - high) + (low_end - low)), 0.0)
    through = tl.where(end == 0, tl.exp2(high_end + low_end), 0.0)
    return from_start, to_end, through


@triton.jit
def _decay(document, high, low, Q: tl.constexpr):
    """(i, j): decay from position j to position i >= j of the same document, otherwise 0."""
    i = tl.arange(0, Q)
    keep = (i[:, None] >= i[None, :]) & (document[:, None] == document[None, :])
    log = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp2(tl.where(keep, log, -float("inf")))


@triton.jit
def _states(
    x, z, dt, A, right, bias, marks, start, ends, decays, kept,
    x_b, x_h, z_b, z_h, dt_b, dt_h, r_b, r_g, low, high,
    x_l: tl.constexpr, z_l: tl.constexpr, dt_l: tl.constexpr, r_l: tl.constexpr,
    H: tl.constexpr, L, K, T, S, P: tl.constexpr, N: tl.constexpr, heads_per_group,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    MARKS: tl.constexpr, START: tl.constexpr, KEEP: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Walk over one stretch for the states alone.

    Forward: S <- through S + sum_j to_end_j dt_j x_j B_j^T. In reverse, with the gradient of y for x and C for B:
    S <- through S + sum_i from_start_i x_i C_i^T, the gradient of the state.

    Args:
        right: B or C.
        start: (B, S, H, P, N) states before each stretch.
        ends: (B, S, H, P, N) states after each stretch; decays: (B, S, H) decay of the stretch.
        kept: (B, K, H, P, N) the state with which each chunk is entered.
    """
    b, h, s = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(2)
    b = b.to(tl.int64)
    p, n, i = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    cell, real = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
    x += b * x_b + h * x_h
    right += b * r_b + (h // heads_per_group) * r_g
    dt += b * dt_b + h * dt_h
    if GATE:
        z += b * z_b + h * z_h
    if MARKS:
        marks += b * L
    A2 = tl.load(A + h).to(tl.float32) * LOG2E
    shift = 0.0
    if BIAS:
        shift = tl.load(bias + h).to(tl.float32)
    stretch = (b * S + s) * H + h
    state = tl.zeros([BP, BN], tl.float32)
    if START:
        state = tl.load(start + stretch * P * N + cell, mask=real, other=0.0)
    total = 1.0
    first, count = s * T, tl.minimum(T, K - s * T)
    for c in range(count):
        k = first + c
        if REVERSE:
            k = first + count - 1 - c
        at = k.to(tl.int64) * Q
        _, step, valid, document, up, down = _steps(
            dt, marks, k, L, dt_l, A2, shift, low, high, Q, SOFTPLUS, LIMIT, MARKS
        )
        from_start, to_end, through = _ends(document, up, down, Q)
        if KEEP:
            tl.store(kept + ((b * K + k) * H + h) * P * N + cell, state, mask=real)
        left = _tile(x + at * x_l, i, x_l, p, P, valid).to(tl.float32)
        if GATE:
            gate = _tile(z + at * z_l, i, z_l, p, P, valid).to(tl.float32)
            left *= gate * sigmoid(gate)
        weight = to_end * step
        if REVERSE:
            weight = from_start
        other = _tile(right + at * r_l, i, r_l, n, N, valid)
        state = _dot_wide(tl.trans(left * weight[:, None]), other, state * through, KIND, PRECISION)
        total *= through
    if ENDS:
        tl.store(ends + stretch * P * N + cell, state, mask=real)
        tl.store(decays + stretch, total)


@triton.jit
def _join(ends, decays, start, last, S, H, M, START: tl.constexpr, REVERSE: tl.constexpr, BM: tl.constexpr):
    """Replace the states after each stretch run from zero by the states before each stretch run as a whole.

    Args:
        ends: (B, S, H, M) with M = P N; decays: (B, S, H); start, last: (B, H, M).
    """
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    b = b.to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    state = tl.zeros([BM], tl.float32)
    if START:
        state = tl.load(start + (b * H + h) * M + m, mask=m < M, other=0.0)
    for c in range(S):
        s = c
        if REVERSE:
            s = S - 1 - c
        stretch = (b * S + s) * H + h
        end = tl.load(ends + stretch * M + m, mask=m < M, other=0.0)
        tl.store(ends + stretch * M + m, state, mask=m < M)
        state = state * tl.load(decays + stretch) + end
    tl.store(last + (b * H + h) * M + m, state, mask=m < M)


@triton.jit
def _outputs(
    x, z, dt, A, B, C, D, bias, marks, start, last, y,
    x_b, x_h, z_b, z_h, dt_b, dt_h, B_b, B_g, C_b, C_g, D_h, D_p, low, high,
    x_l: tl.constexpr, z_l: tl.constexpr, dt_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr,
    H: tl.constexpr, L, K, T, S, P: tl.constexpr, N: tl.constexpr, heads_per_group,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    MARKS: tl.constexpr, START: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Walk over one stretch with outputs; y is dense (B, L, H, P).

    C B^T is computed again for each head: reading it from memory would cost a warp group more than the product, since
    B and C are needed for the state in any case.
    """
    b, h, s = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(2)
    b = b.to(tl.int64)
    p, n, i = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    cell, real = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
    group = h // heads_per_group
    x += b * x_b + h * x_h
    B += b * B_b + group * B_g
    C += b * C_b + group * C_g
    dt += b * dt_b + h * dt_h
    y += (b * L * H + h) * P
    if GATE:
        z += b * z_b + h * z_h
    if MARKS:
        marks += b * L
    A2 = tl.load(A + h).to(tl.float32) * LOG2E
    shift = 0.0
    if BIAS:
        shift = tl.load(bias + h).to(tl.float32)
    if SKIP:
        skip = tl.load(D + h * D_h + p * D_p, mask=p < P, other=0.0).to(tl.float32)
    stretch = (b * S + s) * H + h
    state = tl.zeros([BP, BN], tl.float32)
    if START:
        state = tl.load(start + stretch * P * N + cell, mask=real, other=0.0)
    first, count = s * T, tl.minimum(T, K - s * T)
    for c in range(count):
        k = first + c
        at = k.to(tl.int64) * Q
        _, step, valid, document, up, down = _steps(
            dt, marks, k, L, dt_l, A2, shift, low, high, Q, SOFTPLUS, LIMIT, MARKS
        )
        from_start, to_end, through = _ends(document, up, down, Q)
        reads, writes = _tile(C + at * C_l, i, C_l, n, N, valid), _tile(B + at * B_l, i, B_l, n, N, valid)
        value = _tile(x + at * x_l, i, x_l, p, P, valid)
        out = _dot(reads, tl.trans(state), tl.zeros([Q, BP], tl.float32), KIND, PRECISION) * from_start[:, None]
        scores = _dot(reads, tl.trans(writes), tl.zeros([Q, Q], tl.float32), KIND, PRECISION)
        out = _dot(scores * _decay(document, up, down, Q) * step[None, :], value, out, KIND, PRECISION)
        value = value.to(tl.float32)
        if SKIP:
            out += value * skip[None, :]
        if GATE:
            gate = _tile(z + at * z_l, i, z_l, p, P, valid).to(tl.float32)
            out *= gate * sigmoid(gate)
        tl.store(
            y + at * H * P + i[:, None] * (H * P) + p[None, :], _narrow(out, y.dtype.element_ty, PRECISION),
            mask=(k * Q + i < L)[:, None] & (p < P)[None, :],
        )  # fmt: skip
        state = _dot_wide(tl.trans(value * (to_end * step)[:, None]), writes, state * through, KIND, PRECISION)
    if ENDS:
        tl.store(last + stretch * P * N + cell, state, mask=real)


@triton.jit
def _gradients(
    dy, x, z, dt, A, B, C, D, bias, marks, entering, leaving, dx, dz, ddt, dA, dB, dC, dD, dbias,
    dy_b, dy_h, x_b, x_h, z_b, z_h, dt_b, dt_h, B_b, B_g, C_b, C_g, D_h, D_p, low, high,
    dy_l: tl.constexpr, x_l: tl.constexpr, z_l: tl.constexpr, dt_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr,
    H: tl.constexpr, L, K, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, heads_per_group, heads_per_program, parts,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    MARKS: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk, for some heads of one group; the gradients of B and C are summed over these heads.

    Args:
        entering, leaving: (B, K, H, P, N) state before the chunk, gradient of the state after it.
        dx, dz: (B, L, H, P); ddt: (B, L, H); dA, dbias: (B, K, H) and dD: (B, K, H, P), a sum for each chunk;
        dB, dC: (parts, B, L, G, N), a sum for each program of a group.
    """
    k, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, part = tl.program_id(2) // parts, tl.program_id(2) % parts
    rows = tl.num_programs(1).to(tl.int64)
    n, i = tl.arange(0, BN), tl.arange(0, Q)
    at = k.to(tl.int64) * Q
    inside = k * Q + i < L
    valid = inside
    if MARKS:
        marks += b * L
        valid = tl.load(marks + k * Q + i, mask=inside, other=2) != 2
    reads = _tile(C + b * C_b + group * C_g + at * C_l, i, C_l, n, N, valid)
    writes = _tile(B + b * B_b + group * B_g + at * B_l, i, B_l, n, N, valid)
    scores = _dot(reads, tl.trans(writes), tl.zeros([Q, Q], tl.float32), KIND, PRECISION)
    d_reads, d_writes = tl.zeros([Q, BN], tl.float32), tl.zeros([Q, BN], tl.float32)
    for r in range(part * heads_per_program, tl.minimum((part + 1) * heads_per_program, heads_per_group)):
        h = group * heads_per_group + r
        A1 = tl.load(A + h).to(tl.float32)
        shift = 0.0
        if BIAS:
            shift = tl.load(bias + h).to(tl.float32)
        raw, step, _, document, up, down = _steps(
            dt + b * dt_b + h * dt_h, marks, k, L, dt_l, A1 * LOG2E, shift, low, high,
            Q, SOFTPLUS, LIMIT, MARKS,
        )  # fmt: skip
        from_start, to_end, through = _ends(document, up, down, Q)
        decay = _decay(document, up, down, Q)
        inner = tl.zeros([Q, Q], tl.float32)  # <dy_i, x_j>
        into = tl.zeros([Q], tl.float32)  # <x_j, leaving B_j>
        out_of = tl.zeros([Q], tl.float32)  # <dy_i, entering C_i>
        kept = 0.0  # <entering, leaving>
        chunk = (b * K + k) * H + h
        for p0 in range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            real = inside[:, None] & (p < P)[None, :]
            value = _tile(x + b * x_b + h * x_h + at * x_l, i, x_l, p, P, valid)
            d_out = _tile(dy + b * dy_b + h * dy_h + at * dy_l, i, dy_l, p, P, valid).to(tl.float32)
            cell, cells = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
            before = tl.load(entering + chunk * P * N + cell, mask=cells, other=0.0)
            after = tl.load(leaving + chunk * P * N + cell, mask=cells, other=0.0)
            nothing = tl.zeros([Q, BP], tl.float32)
            carried = _dot(reads, tl.trans(before), nothing, KIND, PRECISION)
            value32 = value.to(tl.float32)
            if SKIP:
                skip = tl.load(D + h * D_h + p * D_p, mask=p < P, other=0.0).to(tl.float32)
            to = ((b * L + at) * H + h) * P + i[:, None] * (H * P) + p[None, :]
            if GATE:
                gate = _tile(z + b * z_b + h * z_h + at * z_l, i, z_l, p, P, valid).to(tl.float32)
                open_ = sigmoid(gate)
                out = _dot(scores * decay * step[None, :], value, carried * from_start[:, None], KIND, PRECISION)
                if SKIP:
                    out += value32 * skip[None, :]
                tl.store(
                    dz + to, _narrow(d_out * out * silu_slope(gate, open_), dz.dtype.element_ty, PRECISION), mask=real
                )
                d_out *= gate * open_
            inner = _dot(d_out, tl.trans(value), inner, KIND, PRECISION)
            out_of += tl.sum(d_out * carried, 1)
            entered = _dot(writes, tl.trans(after), nothing, KIND, PRECISION) * to_end[:, None]
            into += tl.sum(value32 * entered, 1)
            kept += tl.sum(tl.sum(before * after, 1), 0)
            d_value = _dot(tl.trans(scores * decay), d_out, entered, KIND, PRECISION) * step[:, None]
            if SKIP:
                d_value += d_out * skip[None, :]
                tl.store(dD + chunk * P + p, tl.sum(d_out * value32, 0), mask=p < P)
            tl.store(dx + to, _narrow(d_value, dx.dtype.element_ty, PRECISION), mask=real)
            d_reads = _dot(d_out * from_start[:, None], before, d_reads, KIND, PRECISION)
            d_writes = _dot(value32 * (to_end * step)[:, None], after, d_writes, KIND, PRECISION)
        inner *= decay
        d_reads = _dot(inner * step[None, :], writes, d_reads, KIND, PRECISION)
        d_writes = _dot(tl.trans(inner * step[None, :]), reads, d_writes, KIND, PRECISION)
        flow = inner * scores
        d_step = tl.sum(flow, 0) + into
        # The decay of position m is a factor of all that flows from j < m to i >= m. Sums run over exactly these
        # terms: taking away what lies on the other side would cancel.
        earlier = i[:, None] < i[None, :]
        flow = tl.where(tl.trans(earlier), flow * step[None, :], 0.0)
        past = tl.cumsum(flow, 1) - flow
        d_log = tl.sum(tl.where(i[:, None] >= i[None, :], past, 0.0), 0)
        d_log += tl.cumsum(out_of * from_start, 0, reverse=True)
        d_log += tl.sum(tl.where(earlier, (into * step)[:, None], 0.0), 0)
        d_log += through * kept
        tl.store(dA + chunk, tl.sum(d_log * step, 0))
        d_step += d_log * A1
        if LIMIT:
            free = raw
            if SOFTPLUS:
                free = softplus(raw)
            d_step = tl.where((free >= low) & (free <= high), d_step, 0.0)
        if SOFTPLUS:
            d_step *= sigmoid(raw)
        d_step = tl.where(valid, d_step, 0.0)
        tl.store(ddt + (b * L + at) * H + h + i * H, _narrow(d_step, ddt.dtype.element_ty, PRECISION), mask=inside)
        if BIAS:
            tl.store(dbias + chunk, tl.sum(d_step, 0))
    to = (((part * rows + b) * L + at) * G + group) * N + i[:, None] * (G * N) + n[None, :]
    real = inside[:, None] & (n < N)[None, :]
    tl.store(dB + to, _narrow(d_writes, dB.dtype.element_ty, PRECISION), mask=real)
    tl.store(dC + to, _narrow(d_reads, dC.dtype.element_ty, PRECISION), mask=real)


@triton.jit
def _decode(
    x, z, dt, A, B, C, D, bias, state, new, y,
    x_b, x_h, z_b, z_h, dt_b, dt_h, B_b, B_g, C_b, C_g, D_h, D_p, low, high, H, P, N, heads_per_group,
    BP: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """One position: state, new (B, H, P, N); y (B, H, P)."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    b = b.to(tl.int64)
    p, n = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
    group = h // heads_per_group
    step = tl.load(dt + b * dt_b + h * dt_h).to(tl.float32)
    if BIAS:
        step += tl.load(bias + h).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    if LIMIT:
        step = tl.minimum(tl.maximum(step, low), high)
    decay = tl.exp2(step * (tl.load(A + h).to(tl.float32) * LOG2E))
    value = tl.load(x + b * x_b + h * x_h + p, mask=p < P, other=0.0).to(tl.float32)
    writes = tl.load(B + b * B_b + group * B_g + n, mask=n < N, other=0.0).to(tl.float32)
    reads = tl.load(C + b * C_b + group * C_g + n, mask=n < N, other=0.0).to(tl.float32)
    cell = (b * H + h) * P * N + p[:, None] * N + n[None, :]
    real = (p < P)[:, None] & (n < N)[None, :]
    s = (step * value)[:, None] * writes[None, :]
    if START:
        s += tl.load(state + cell, mask=real, other=0.0) * decay
    tl.store(new + cell, s, mask=real)
    out = tl.sum(s * reads[None, :], 1)
    if SKIP:
        out += value * tl.load(D + h * D_h + p * D_p, mask=p < P, other=0.0).to(tl.float32)
    if GATE:
        gate = tl.load(z + b * z_b + h * z_h + p, mask=p < P, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + (b * H + h) * P + p, out.to(y.dtype.element_ty), mask=p < P)


# ---- launches --------------------------------------------------------------------------------------------------------


def blocks(P: int, N: int, state: int = _STATE) -> tuple[int, int]:
    """(BP, BN): rows and columns of the state that one program holds."""
    BN = max(LEAST, triton.next_power_of_2(N))
    return min(max(LEAST, triton.next_power_of_2(P)), 64, max(LEAST, state // BN)), BN


def chunk_length(wanted: int, kind: Any) -> int:
    """Q: the power of two that serves a wanted chunk length (0: none wanted), as far as `kind` allows."""
    most = CHUNK if kind == tl.bfloat16 else SHORT_CHUNK
    return min(most, max(LEAST, triton.next_power_of_2(wanted))) if wanted else most


def stretches(programs: int, chunks: int, multiprocessors: int) -> int:
    """Chunks of a stretch. Time is cut when there are fewer than two programs for each multiprocessor, and never finer
    than two chunks: the states are computed twice, and each stretch costs a read and two writes of a state."""
    wanted = -(-2 * multiprocessors // programs)
    return max(min(2, chunks), -(-chunks // wanted))


def _dense_last(t: Any) -> Any:
    """A tensor (or None) whose last axis is dense."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _outer(*tensors: Tensor | None) -> list[int]:
    """Strides of (B, L, H or G, ...) along batch and heads or groups."""
    return [n for t in tensors for n in ((0, 0) if t is None else (t.stride(0), t.stride(2)))]


def _along(*tensors: Tensor | None) -> list[int]:
    """Strides along time. They are constants of a kernel: then the places of a chunk need one address, not many."""
    return [0 if t is None else t.stride(1) for t in tensors]


def _pairs(*tensors: Tensor | None) -> list[int]:
    """Strides of (B, H or G, ...) along batch and heads or groups."""
    return [n for t in tensors for n in ((0, 0) if t is None else t.stride()[:2])]


def _skip(D: Tensor | None) -> tuple[int, ...]:
    """Strides along heads and channels; one weight a head has no stride along channels."""
    return (0, 0) if D is None else (*D.stride(), 0)[:2]


def _kind(x: Tensor, B: Tensor, C: Tensor) -> tuple[Any, str]:
    """The dtype in which matrices are multiplied, and how float32 is treated there.

    bfloat16 has the range of float32. Numbers in float16 go through TF32, which holds them exactly: a state does not
    always fit the range of float16. float32 goes through three products in TF32, which leave an error of 2^-22: without
    tensor cores the operands alone would fill the registers.
    """
    if all(t.dtype == torch.bfloat16 for t in (x, B, C)):
        return tl.bfloat16, "interpreted" if interpreted() else "ieee"
    return tl.float32, "tf32" if all(t.dtype == torch.float16 for t in (x, B, C)) else "tf32x3"


class _Call:
    """Arguments that several kernels share."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, state, marks, dt_softplus, low, high, chunk):
        self.x, self.B, self.C, self.z = (_dense_last(t) for t in (x, B, C, z))
        self.dt, self.D = dt, D
        self.A, self.bias = A.contiguous(), None if dt_bias is None else dt_bias.contiguous()
        self.state = None if state is None else state.float().contiguous()
        self.marks = None if marks is None else marks.contiguous()
        self.sizes = x.shape
        self.G, self.N = B.shape[2:]
        self.kind, self.precision = _kind(x, B, C)
        self.Q = chunk_length(chunk, self.kind)
        self.K = -(-x.shape[1] // self.Q)
        self.low, self.high = low, high
        self.time = {
            "BIAS": dt_bias is not None,
            "SOFTPLUS": dt_softplus,
            "LIMIT": low != -math.inf or high != math.inf,
            "MARKS": marks is not None,
        }

    def cut(self, BP: int) -> tuple[tuple[int, int, int], int]:
        """Grid of a walk, and the chunks of a stretch."""
        rows, _, H, P = self.sizes
        across = -(-P // BP)
        T = stretches(across * rows * H, self.K, processors(self.x))
        # Rows and heads first: a grid takes 65535 programs only along its other axes.
        return (rows * H, across, -(-self.K // T)), T

    def states(self, grid, T, left, gate, right, start, ends, decays, kept, *, reverse: bool, BP: int, BN: int) -> None:
        _, L, H, P = self.sizes
        _states[grid](
            left, gate, self.dt, self.A, right, self.bias, self.marks, start, ends, decays, kept,
            *_outer(left, gate, self.dt, right), self.low, self.high, *_along(left, gate, self.dt, right),
            H, L, self.K, T, grid[2], P, self.N, H // self.G,
            Q=self.Q, BP=BP, BN=BN, KIND=self.kind, PRECISION=self.precision, REVERSE=reverse, GATE=gate is not None,
            START=start is not None, KEEP=kept is not None, ENDS=ends is not None, **self.time,
            num_warps=4, num_stages=2,
        )  # fmt: skip

    def join(self, ends: Tensor, decays: Tensor, start: Tensor | None, last: Tensor, *, reverse: bool) -> None:
        rows, S, H = decays.shape
        M = self.sizes[3] * self.N
        BM = min(1024, triton.next_power_of_2(M))
        _join[(rows * H, -(-M // BM))](
            ends, decays, start, last, S, H, M, START=start is not None, REVERSE=reverse, BM=BM, num_warps=4
        )

    def summaries(self, grid, T, left, gate, right, start, last, *, reverse: bool, BP: int, BN: int) -> Tensor:
        """(B, S, H, P, N): the states before each stretch; that after all of them goes into `last`."""
        rows, _, H, P = self.sizes
        ends = self.x.new_empty(rows, grid[2], H, P, self.N, dtype=torch.float32)
        decays = ends.new_empty(rows, grid[2], H)
        self.states(grid, T, left, gate, right, None, ends, decays, None, reverse=reverse, BP=BP, BN=BN)
        self.join(ends, decays, start, last, reverse=reverse)
        return ends

    def walk(self, left, gate, right, start, last, *, reverse: bool) -> Tensor:
        """(B, K, H, P, N): the states with which chunks are entered; that after all of them goes into `last`."""
        rows, _, H, P = self.sizes
        BP, BN = blocks(P, self.N)
        grid, T = self.cut(BP)
        kept = self.x.new_empty(rows, self.K, H, P, self.N, dtype=torch.float32)
        ends, decays = last, kept.new_empty(rows, 1, H)
        if grid[2] > 1:
            start = self.summaries(grid, T, left, gate, right, start, last, reverse=reverse, BP=BP, BN=BN)
            ends = decays = None
        self.states(grid, T, left, gate, right, start, ends, decays, kept, reverse=reverse, BP=BP, BN=BN)
        return kept


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    state: Tensor | None, marks: Tensor | None, dt_softplus: bool, low: float, high: float, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, H, P) in x's dtype and the last state (B, H, P, N) in float32. `chunk` is the wanted length or 0."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, state, marks, dt_softplus, low, high, chunk)
    rows, L, H, P = call.sizes
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last = torch.empty(rows, H, P, call.N, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, last.zero_() if call.state is None else last.copy_(call.state)
    BP, BN = blocks(P, call.N)
    grid, T = call.cut(BP)
    start = call.state
    if grid[2] > 1:
        start = call.summaries(grid, T, call.x, None, call.B, start, last, reverse=False, BP=BP, BN=BN)
    _outputs[grid](
        call.x, call.z, call.dt, call.A, call.B, call.C, call.D, call.bias, call.marks, start, last, y,
        *_outer(call.x, call.z, call.dt, call.B, call.C), *_skip(D), low, high,
        *_along(call.x, call.z, call.dt, call.B, call.C), H, L, call.K, T, grid[2], P, call.N, H // call.G,
        Q=call.Q, BP=BP, BN=BN, KIND=call.kind, PRECISION=call.precision, SKIP=D is not None, GATE=z is not None,
        START=start is not None, ENDS=grid[2] == 1, **call.time, num_warps=8, num_stages=2,
    )  # fmt: skip
    return y, last


def backward(
    dy: Tensor, dlast: Tensor,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    state: Tensor | None, marks: Tensor | None, dt_softplus: bool, low: float, high: float, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias and state, each in its dtype; empty where there is no such input."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, state, marks, dt_softplus, low, high, chunk)
    rows, L, H, P = call.sizes
    grads = [
        x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (x, dt, A, B, C, D, z, dt_bias, state)
    ]
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = grads
    dlast = dlast.float().contiguous()
    if x.numel() == 0:
        for g in grads:
            g.zero_()
        return *grads[:-1], dstate if state is None else dstate.copy_(dlast)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    first = torch.empty_like(dlast)
    entering = call.walk(call.x, None, call.B, call.state, torch.empty_like(dlast), reverse=False)
    leaving = call.walk(dy, call.z, call.C, dlast, first, reverse=True)

    # Two states, two gradients of directions and four matrices are alive at once, so there are more threads, and a part
    # of the channels at a time. Heads of a group share a program as far as the GPU is full without more programs: that
    # saves C B^T and bounds the partial sums.
    BP, BN = blocks(P, call.N, _STATE // 2)
    heads = H // call.G
    wanted = min(heads, -(-2 * processors(x) // (call.K * rows * call.G)))
    share = -(-heads // wanted)
    parts = -(-heads // share)
    empty: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    sums_A, sums_bias = torch.empty(2, rows, call.K, H, **empty)
    sums_D = torch.empty((rows, call.K, H, P) if D is not None else 0, **empty)
    parts_B, parts_C = (dB[None], dC[None]) if parts == 1 else torch.empty(2, parts, *B.shape, **empty)
    _gradients[(call.K, rows, call.G * parts)](
        dy, call.x, call.z, call.dt, call.A, call.B, call.C, call.D, call.bias, call.marks, entering, leaving,
        dx, dz, ddt, sums_A, parts_B, parts_C, sums_D, sums_bias,
        *_outer(dy, call.x, call.z, call.dt, call.B, call.C), *_skip(D), low, high,
        *_along(dy, call.x, call.z, call.dt, call.B, call.C), H, L, call.K, P, call.N, call.G, heads, share, parts,
        Q=call.Q, BP=BP, BN=BN, KIND=call.kind, PRECISION=call.precision, SKIP=D is not None, GATE=z is not None,
        **call.time, num_warps=8, num_stages=2,
    )  # fmt: skip
    dA.copy_(sums_A.sum((0, 1)))
    if dt_bias is not None:
        dbias.copy_(sums_bias.sum((0, 1)))
    if D is not None:
        total = sums_D.sum((0, 1))
        dD.copy_(total.sum(1) if D.ndim == 1 else total)
    if parts > 1:
        dB.copy_(parts_B.sum(0))
        dC.copy_(parts_C.sum(0))
    if state is not None:
        dstate.copy_(first)
    return tuple(grads)


def step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    state: Tensor | None, dt_softplus: bool, low: float, high: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One position: x, z (B, H, P), dt (B, H), B and C (B, G, N), state (B, H, P, N) or None for zeros."""
    rows, H, P = x.shape
    G, N = B.shape[1:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new = torch.empty(rows, H, P, N, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, new
    x, B, C, z = (_dense_last(t) for t in (x, B, C, z))
    # Reading and writing the state is all the work: small blocks, so that one token of one row fills the GPU.
    BN = triton.next_power_of_2(N)
    BP = min(triton.next_power_of_2(P), max(1, 1024 // BN))
    _decode[(rows * H, -(-P // BP))](
        x, z, dt, A.contiguous(), B, C, D, None if dt_bias is None else dt_bias.contiguous(),
        None if state is None else state.float().contiguous(), new, y,
        *_pairs(x, z, dt, B, C), *_skip(D), low, high, H, P, N, H // G,
        BP=BP, BN=BN, SKIP=D is not None, GATE=z is not None, BIAS=dt_bias is not None, SOFTPLUS=dt_softplus,
        LIMIT=low != -math.inf or high != math.inf, START=state is not None, num_warps=4,
    )  # fmt: skip
    return y, new
