"""GPU kernels of the selective scan: forward, backward and one step.

One program is one warp. It walks through time with the state of a block of channels in registers, as a tile (N, D): the
channels lie across the lanes and the states of a channel in one lane, so that loads of x, dt and z are runs of memory
and y is a sum inside a lane. What the next position needs is loaded before this one is computed.

Where batch and channels are too few to fill a GPU, time is cut into stretches: each is first run from zero for its
final state only, these are joined in order, and then all stretches run side by side.

The forward pass keeps the state at the start of each chunk. The backward pass walks over the chunks from the last to
the first: it runs a chunk forward again from its start into a scratch of CHUNK states for each program, which stays in
the second-level cache, and then backward. Sums over channels for B and C go to one partial sum for each of at most
PARTIALS programs; these are added up afterwards in a fixed order. Nothing of size L x D x N is ever stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, Config, capability, config, join, sigmoid, silu_slope, softplus, stretches, tuned
from . import _CHUNK as CHUNK

# Partial sums of the gradients of B and C at most. Programs take 32 channels at N = 16, so up to D = 1024 each block
# has its own, which together are as large as the gradients of x and dt in half precision; beyond, blocks share them.
PARTIALS = 32
# `unit` is 1, the distance of neighbours in memory. If the compiler knew, it would lay tiles out for the widest loads
# of A and of states, which are few, with the states of a channel in several lanes: then each position would need sums
# over lanes. Not knowing, it lays channels across the lanes.
_HIDDEN = ["unit"]


@triton.jit
def _step_size(raw, valid, low, high, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, MARKS: tl.constexpr):
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    if LIMIT:
        step = tl.minimum(tl.maximum(step, low), high)
    if MARKS:
        step = tl.where(valid, step, 0.0)
    return step


@triton.jit
def _slope(raw, valid, low, high, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, MARKS: tl.constexpr):
    """Derivative of the step size by the raw one."""
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = sigmoid(raw)
    if LIMIT:
        step = raw
        if SOFTPLUS:
            step = softplus(raw)
        slope = tl.where((step >= low) & (step <= high), slope, 0.0)
    if MARKS:
        slope = tl.where(valid, slope, 0.0)
    return slope


@triton.jit
def _clean(value, valid, MARKS: tl.constexpr):
    """In float32, and 0 at an invalid position, whatever stands there. (All is loaded without waiting for the mark.)"""
    value = value.to(tl.float32)
    if MARKS:
        value = tl.where(valid, value, 0.0)
    return value


@triton.jit(do_not_specialize=_HIDDEN)
def _stretch_forward(
    x, dt, A, B, bias, marks, local, through,
    x_b, x_l, dt_b, dt_l, B_b, B_l, B_g, rows, L, channels, N, per_group, stretch, unit, low, high,
    HAS_BIAS: tl.constexpr, MARKS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """State of a stretch that is run from zero, and what the stretch does to a state: (stretches, B, D, N)."""
    blocks = tl.cdiv(per_group, BLOCK_D)
    of_row = channels // per_group * blocks
    b = (tl.program_id(0) // of_row).to(tl.int64)
    block = tl.program_id(0) % of_row
    s = tl.program_id(1)
    j = block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    real = j < per_group
    group = block // blocks
    d = group * per_group + j
    n = tl.arange(0, BLOCK_N)
    real_n = n < N
    tile = d[None, :] * N + n[:, None] * unit
    mask = real[None, :] & real_n[:, None]
    begin = s * stretch
    end = tl.minimum(begin + stretch, L)
    t0 = begin.to(tl.int64)
    x += b * x_b + t0 * x_l
    dt += b * dt_b + t0 * dt_l
    B += b * B_b + t0 * B_l + group * B_g
    if MARKS:
        marks += b * L + t0
    A2 = tl.load(A + tile, mask=mask, other=0.0).to(tl.float32) * LOG2E
    shift = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + d, mask=real, other=0.0).to(tl.float32)
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    time = tl.zeros([BLOCK_D], tl.float32)
    cut = 0
    x_next = tl.load(x + d, mask=real, other=0.0)
    dt_next = tl.load(dt + d, mask=real, other=0.0)
    B_next = tl.load(B + n, mask=real_n, other=0.0)
    mark_next = 0
    if MARKS:
        mark_next = tl.load(marks)
    for t in range(begin, end):
        mark, raw, value, towards = mark_next, dt_next, x_next, B_next
        more = t + 1 < end
        x += tl.where(more, x_l, 0)
        dt += tl.where(more, dt_l, 0)
        B += tl.where(more, B_l, 0)
        x_next = tl.load(x + d, mask=real, other=0.0)
        dt_next = tl.load(dt + d, mask=real, other=0.0)
        B_next = tl.load(B + n, mask=real_n, other=0.0)
        if MARKS:
            marks += tl.where(more, 1, 0)
            mark_next = tl.load(marks)
            cut = tl.where(mark == 1, 1, cut)
            h = tl.where(mark == 1, 0.0, h)
        valid = mark != 2
        step = _step_size(raw.to(tl.float32) + shift, valid, low, high, SOFTPLUS, LIMIT, MARKS)
        u = step * _clean(value, valid, MARKS)
        h = tl.exp2(A2 * step[None, :]) * h + _clean(towards, valid, MARKS)[:, None] * u[None, :]
        time += step
    to = (s * rows + b) * channels * N + tile
    tl.store(local + to, h, mask=mask)
    decay = tl.exp2(A2 * time[None, :])
    if MARKS:
        decay = tl.where(cut > 0, 0.0, decay)
    tl.store(through + to, decay, mask=mask)


@triton.jit(do_not_specialize=_HIDDEN)
def _forward(
    x, dt, A, B, C, skip, z, bias, start, marks, y, last, bounds,
    x_b, x_l, dt_b, dt_l, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l,
    rows, L, channels, N, per_group, stretch, unit, low, high,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr, MARKS: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, KEEP: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (B, L, D), last (B, D, N), bounds (B, chunks, N, D), all dense; start (stretches, B, D, N)."""
    blocks = tl.cdiv(per_group, BLOCK_D)
    of_row = channels // per_group * blocks
    b = (tl.program_id(0) // of_row).to(tl.int64)
    block = tl.program_id(0) % of_row
    s = tl.program_id(1)
    j = block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    real = j < per_group
    group = block // blocks
    d = group * per_group + j
    n = tl.arange(0, BLOCK_N)
    real_n = n < N
    tile = d[None, :] * N + n[:, None] * unit
    mask = real[None, :] & real_n[:, None]
    begin = s * stretch
    end = tl.minimum(begin + stretch, L)
    t0 = begin.to(tl.int64)
    x += b * x_b + t0 * x_l
    dt += b * dt_b + t0 * dt_l
    B += b * B_b + t0 * B_l + group * B_g
    C += b * C_b + t0 * C_l + group * C_g
    y += (b * L + t0) * channels
    if HAS_Z:
        z += b * z_b + t0 * z_l
    if MARKS:
        marks += b * L + t0
    if KEEP:
        bounds += (b * tl.cdiv(L, STEPS) + begin // STEPS) * channels * N
    A2 = tl.load(A + tile, mask=mask, other=0.0).to(tl.float32) * LOG2E
    shift = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + d, mask=real, other=0.0).to(tl.float32)
    if HAS_D:
        weight = tl.load(skip + d, mask=real, other=0.0).to(tl.float32)
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_START:
        h = tl.load(start + (s * rows + b) * channels * N + tile, mask=mask, other=0.0).to(tl.float32)
    x_next = tl.load(x + d, mask=real, other=0.0)
    dt_next = tl.load(dt + d, mask=real, other=0.0)
    B_next = tl.load(B + n, mask=real_n, other=0.0)
    C_next = tl.load(C + n, mask=real_n, other=0.0)
    z_next = x_next
    if HAS_Z:
        z_next = tl.load(z + d, mask=real, other=0.0)
    mark_next = 0
    if MARKS:
        mark_next = tl.load(marks)
    for first in range(begin, end, STEPS):
        if KEEP:
            tl.store(bounds + n[:, None] * channels + d[None, :] * unit, h, mask=mask)
            bounds += channels * N
        for t in range(first, tl.minimum(first + STEPS, end)):
            mark, raw, value, gate, towards, read = mark_next, dt_next, x_next, z_next, B_next, C_next
            more = t + 1 < end
            x += tl.where(more, x_l, 0)
            dt += tl.where(more, dt_l, 0)
            B += tl.where(more, B_l, 0)
            C += tl.where(more, C_l, 0)
            x_next = tl.load(x + d, mask=real, other=0.0)
            dt_next = tl.load(dt + d, mask=real, other=0.0)
            B_next = tl.load(B + n, mask=real_n, other=0.0)
            C_next = tl.load(C + n, mask=real_n, other=0.0)
            if HAS_Z:
                z += tl.where(more, z_l, 0)
                z_next = tl.load(z + d, mask=real, other=0.0)
            if MARKS:
                marks += tl.where(more, 1, 0)
                mark_next = tl.load(marks)
                h = tl.where(mark == 1, 0.0, h)
            valid = mark != 2
            step = _step_size(raw.to(tl.float32) + shift, valid, low, high, SOFTPLUS, LIMIT, MARKS)
            value = _clean(value, valid, MARKS)
            u = step * value
            h = tl.exp2(A2 * step[None, :]) * h + _clean(towards, valid, MARKS)[:, None] * u[None, :]
            out = tl.sum(h * _clean(read, valid, MARKS)[:, None], 0)
            if HAS_D:
                out += weight * value
            if HAS_Z:
                gate = _clean(gate, valid, MARKS)
                out *= gate * sigmoid(gate)
            if MARKS:
                out = tl.where(valid, out, 0.0)
            tl.store(y + d, out.to(y.dtype.element_ty), mask=real)
            y += channels
    if end == L:
        tl.store(last + b * channels * N + tile, h, mask=mask)


@triton.jit(do_not_specialize=_HIDDEN)
def _stretch_backward(
    dy, dt, A, C, z, bias, marks, local, through,
    dy_b, dy_l, dt_b, dt_l, C_b, C_l, C_g, z_b, z_l, rows, L, channels, N, per_group, stretch, unit, low, high,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, MARKS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of the state before a stretch, with zero behind it, and what the stretch does to one from behind."""
    blocks = tl.cdiv(per_group, BLOCK_D)
    of_row = channels // per_group * blocks
    b = (tl.program_id(0) // of_row).to(tl.int64)
    block = tl.program_id(0) % of_row
    s = tl.program_id(1)
    j = block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    real = j < per_group
    group = block // blocks
    d = group * per_group + j
    n = tl.arange(0, BLOCK_N)
    real_n = n < N
    tile = d[None, :] * N + n[:, None] * unit
    mask = real[None, :] & real_n[:, None]
    begin = s * stretch
    end = tl.minimum(begin + stretch, L)
    t1 = (end - 1).to(tl.int64)
    dy += b * dy_b + t1 * dy_l
    dt += b * dt_b + t1 * dt_l
    C += b * C_b + t1 * C_l + group * C_g
    if HAS_Z:
        z += b * z_b + t1 * z_l
    if MARKS:
        marks += b * L + t1
    A2 = tl.load(A + tile, mask=mask, other=0.0).to(tl.float32) * LOG2E
    shift = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + d, mask=real, other=0.0).to(tl.float32)
    g = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    time = tl.zeros([BLOCK_D], tl.float32)
    cut = 0
    dy_next = tl.load(dy + d, mask=real, other=0.0)
    dt_next = tl.load(dt + d, mask=real, other=0.0)
    C_next = tl.load(C + n, mask=real_n, other=0.0)
    z_next = dy_next
    if HAS_Z:
        z_next = tl.load(z + d, mask=real, other=0.0)
    mark_next = 0
    if MARKS:
        mark_next = tl.load(marks)
    for t in range(begin, end):
        mark, raw, grad, gate, read = mark_next, dt_next, dy_next, z_next, C_next
        more = t + 1 < end
        dy -= tl.where(more, dy_l, 0)
        dt -= tl.where(more, dt_l, 0)
        C -= tl.where(more, C_l, 0)
        dy_next = tl.load(dy + d, mask=real, other=0.0)
        dt_next = tl.load(dt + d, mask=real, other=0.0)
        C_next = tl.load(C + n, mask=real_n, other=0.0)
        if HAS_Z:
            z -= tl.where(more, z_l, 0)
            z_next = tl.load(z + d, mask=real, other=0.0)
        if MARKS:
            marks -= tl.where(more, 1, 0)
            mark_next = tl.load(marks)
        valid = mark != 2
        step = _step_size(raw.to(tl.float32) + shift, valid, low, high, SOFTPLUS, LIMIT, MARKS)
        grad = _clean(grad, valid, MARKS)
        if HAS_Z:
            gate = _clean(gate, valid, MARKS)
            grad *= gate * sigmoid(gate)
        g = tl.exp2(A2 * step[None, :]) * (g + _clean(read, valid, MARKS)[:, None] * grad[None, :])
        if MARKS:
            g = tl.where(mark == 1, 0.0, g)
            cut = tl.where(mark == 1, 1, cut)
        time += step
    to = (s * rows + b) * channels * N + tile
    tl.store(local + to, g, mask=mask)
    decay = tl.exp2(A2 * time[None, :])
    if MARKS:
        decay = tl.where(cut > 0, 0.0, decay)
    tl.store(through + to, decay, mask=mask)


@triton.jit(do_not_specialize=_HIDDEN)
def _backward(
    dy, behind, x, dt, A, B, C, skip, z, bias, marks, bounds, scratch,
    dx, ddt, dA, dB, dC, dskip, dz, dbias, dstart,
    dy_b, dy_l, x_b, x_l, dt_b, dt_l, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l,
    rows, L, channels, N, per_group, partials, stretch, unit, low, high,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, MARKS: tl.constexpr, SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One stretch of one row, and of one group every so manieth block of channels.

    behind (stretches, B, D, N): gradient of the state after each stretch. dx, ddt, dz (B, L, D); dA (stretches, B, N,
    D); dB, dC (partials, B, L, G, N); dskip, dbias (stretches, B, D); dstart (B, D, N); all dense. scratch has
    (STEPS, BLOCK_N, BLOCK_D) numbers for each program.
    """
    groups = channels // per_group
    partial = tl.program_id(0) % partials
    group = tl.program_id(0) // partials % groups
    b = (tl.program_id(0) // (partials * groups)).to(tl.int64)
    s = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    real_n = n < N
    begin = s * stretch
    end = tl.minimum(begin + stretch, L)
    dy += b * dy_b
    x += b * x_b
    dt += b * dt_b
    B += b * B_b + group * B_g
    C += b * C_b + group * C_g
    if HAS_Z:
        z += b * z_b
        dz += b * L * channels
    dx += b * L * channels
    ddt += b * L * channels
    if MARKS:
        marks += b * L
    each = groups * N
    dB += ((partial * rows + b) * L * groups + group) * N
    dC += ((partial * rows + b) * L * groups + group) * N
    bounds += b * tl.cdiv(L, STEPS) * channels * N
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    scratch += program * (STEPS * BLOCK_N * BLOCK_D)
    local = scratch + n[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :] * unit
    for block in range(partial, tl.cdiv(per_group, BLOCK_D), partials):
        j = block * BLOCK_D + tl.arange(0, BLOCK_D)
        real = j < per_group
        d = group * per_group + j
        tile = d[None, :] * N + n[:, None] * unit
        mask = real[None, :] & real_n[:, None]
        A2 = tl.load(A + tile, mask=mask, other=0.0).to(tl.float32) * LOG2E
        shift = tl.zeros([BLOCK_D], tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + d, mask=real, other=0.0).to(tl.float32)
        if HAS_D:
            weight = tl.load(skip + d, mask=real, other=0.0).to(tl.float32)
        at = (s * rows + b) * channels
        g = tl.load(behind + at * N + tile, mask=mask, other=0.0)
        sum_A = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        sum_D = tl.zeros([BLOCK_D], tl.float32)
        sum_bias = tl.zeros([BLOCK_D], tl.float32)
        for back in range(begin, end, STEPS):
            first = begin + (end - 1 - begin) // STEPS * STEPS - (back - begin)
            stop = tl.minimum(first + STEPS, end)
            f = first.to(tl.int64)
            # The chunk once more, forward: scratch[i] is the state that position i finds.
            h = tl.load(bounds + (f // STEPS * N + n[:, None]) * channels + d[None, :] * unit, mask=mask, other=0.0)
            x_t = x + f * x_l
            dt_t = dt + f * dt_l
            B_t = B + f * B_l
            x_next = tl.load(x_t + d, mask=real, other=0.0)
            dt_next = tl.load(dt_t + d, mask=real, other=0.0)
            B_next = tl.load(B_t + n, mask=real_n, other=0.0)
            for t in range(first, stop):
                raw, value, towards = dt_next, x_next, B_next
                more = t + 1 < stop
                x_t += tl.where(more, x_l, 0)
                dt_t += tl.where(more, dt_l, 0)
                B_t += tl.where(more, B_l, 0)
                x_next = tl.load(x_t + d, mask=real, other=0.0)
                dt_next = tl.load(dt_t + d, mask=real, other=0.0)
                B_next = tl.load(B_t + n, mask=real_n, other=0.0)
                valid = True
                if MARKS:
                    mark = tl.load(marks + t)
                    valid = mark != 2
                    h = tl.where(mark == 1, 0.0, h)
                tl.store(local + (t - first) * (BLOCK_N * BLOCK_D), h)
                step = _step_size(raw.to(tl.float32) + shift, valid, low, high, SOFTPLUS, LIMIT, MARKS)
                u = step * _clean(value, valid, MARKS)
                h = tl.exp2(A2 * step[None, :]) * h + _clean(towards, valid, MARKS)[:, None] * u[None, :]
            tl.debug_barrier()
            # Backward. g is the gradient of the state behind a position.
            e = (stop - 1).to(tl.int64)
            x_t = x + e * x_l
            dt_t = dt + e * dt_l
            B_t = B + e * B_l
            C_t = C + e * C_l
            dy_t = dy + e * dy_l
            z_t = x_t
            to = e * channels
            part = e * each
            x_next = tl.load(x_t + d, mask=real, other=0.0)
            dt_next = tl.load(dt_t + d, mask=real, other=0.0)
            dy_next = tl.load(dy_t + d, mask=real, other=0.0)
            B_next = tl.load(B_t + n, mask=real_n, other=0.0)
            C_next = tl.load(C_t + n, mask=real_n, other=0.0)
            z_next = x_next
            if HAS_Z:
                z_t = z + e * z_l
                z_next = tl.load(z_t + d, mask=real, other=0.0)
            for i in range(stop - first):
                t = stop - 1 - i
                raw, value, grad, gate, towards, read = dt_next, x_next, dy_next, z_next, B_next, C_next
                more = t > first
                x_t -= tl.where(more, x_l, 0)
                dt_t -= tl.where(more, dt_l, 0)
                dy_t -= tl.where(more, dy_l, 0)
                B_t -= tl.where(more, B_l, 0)
                C_t -= tl.where(more, C_l, 0)
                x_next = tl.load(x_t + d, mask=real, other=0.0)
                dt_next = tl.load(dt_t + d, mask=real, other=0.0)
                dy_next = tl.load(dy_t + d, mask=real, other=0.0)
                B_next = tl.load(B_t + n, mask=real_n, other=0.0)
                C_next = tl.load(C_t + n, mask=real_n, other=0.0)
                if HAS_Z:
                    z_t -= tl.where(more, z_l, 0)
                    z_next = tl.load(z_t + d, mask=real, other=0.0)
                before = tl.load(local + (t - first) * (BLOCK_N * BLOCK_D))
                valid = True
                if MARKS:
                    mark = tl.load(marks + t)
                    valid = mark != 2
                raw = raw.to(tl.float32) + shift
                step = _step_size(raw, valid, low, high, SOFTPLUS, LIMIT, MARKS)
                value = _clean(value, valid, MARKS)
                grad = _clean(grad, valid, MARKS)
                towards = _clean(towards, valid, MARKS)[:, None]
                read = _clean(read, valid, MARKS)[:, None]
                u = step * value
                decay = tl.exp2(A2 * step[None, :])
                h = decay * before + towards * u[None, :]
                if HAS_Z:
                    out = tl.sum(h * read, 0)
                    if HAS_D:
                        out += weight * value
                    gate = _clean(gate, valid, MARKS)
                    open_ = sigmoid(gate)
                    tl.store(dz + to + d, (grad * out * silu_slope(gate, open_)).to(dz.dtype.element_ty), mask=real)
                    grad *= gate * open_
                g += read * grad[None, :]
                new_B = tl.sum(g * u[None, :], 1)
                new_C = tl.sum(h * grad[None, :], 1)
                if block >= partials:
                    new_B += tl.load(dB + part + n, mask=real_n, other=0.0)
                    new_C += tl.load(dC + part + n, mask=real_n, other=0.0)
                tl.store(dB + part + n, new_B, mask=real_n)
                tl.store(dC + part + n, new_C, mask=real_n)
                through = tl.sum(g * towards, 0)
                g *= decay
                if MARKS:
                    g = tl.where(mark == 1, 0.0, g)
                moved = g * before
                sum_A += moved * step[None, :]
                # A2 is A in units of log 2.
                new_dt = tl.sum(moved * A2, 0) * (1.0 / LOG2E) + through * value
                new_dt *= _slope(raw, valid, low, high, SOFTPLUS, LIMIT, MARKS)
                new_x = through * step
                if HAS_D:
                    new_x += weight * grad
                    sum_D += grad * value
                sum_bias += new_dt
                tl.store(dx + to + d, new_x.to(dx.dtype.element_ty), mask=real)
                tl.store(ddt + to + d, new_dt.to(ddt.dtype.element_ty), mask=real)
                to -= channels
                part -= each
            # The scratch, and partial sums of this block, are written again: by other lanes than have read them.
            tl.debug_barrier()
        tl.store(dA + at * N + n[:, None] * channels + d[None, :] * unit, sum_A, mask=mask)
        if HAS_D:
            tl.store(dskip + at + d, sum_D, mask=real)
        if HAS_BIAS:
            tl.store(dbias + at + d, sum_bias, mask=real)
        if s == 0:
            tl.store(dstart + b * channels * N + tile, g, mask=mask)


@triton.jit
def _decode(
    x, dt, A, B, C, skip, z, bias, state, y, new, x_b, dt_b, B_b, B_g, C_b, C_g, z_b,
    channels, N, per_group, low, high,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One position: y (B, D), state and new (B, D, N). The states of a channel lie side by side in memory and lanes."""
    blocks = tl.cdiv(per_group, BLOCK_D)
    of_row = channels // per_group * blocks
    b = (tl.program_id(0) // of_row).to(tl.int64)
    block = tl.program_id(0) % of_row
    group = block // blocks
    j = block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    real = j < per_group
    d = group * per_group + j
    n = tl.arange(0, BLOCK_N)
    real_n = n < N
    tile = d[:, None] * N + n[None, :]
    mask = real[:, None] & real_n[None, :]
    h = tl.load(state + b * channels * N + tile, mask=mask, other=0.0).to(tl.float32)
    A2 = tl.load(A + tile, mask=mask, other=0.0).to(tl.float32) * LOG2E
    step = tl.load(dt + b * dt_b + d, mask=real, other=0.0).to(tl.float32)
    value = tl.load(x + b * x_b + d, mask=real, other=0.0).to(tl.float32)
    towards = tl.load(B + b * B_b + group * B_g + n, mask=real_n, other=0.0).to(tl.float32)
    read = tl.load(C + b * C_b + group * C_g + n, mask=real_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias + d, mask=real, other=0.0).to(tl.float32)
    step = _step_size(step, True, low, high, SOFTPLUS, LIMIT, False)
    h = tl.exp2(A2 * step[:, None]) * h + towards[None, :] * (step * value)[:, None]
    tl.store(new + b * channels * N + tile, h, mask=mask)
    out = tl.sum(h * read[None, :], 1)
    if HAS_D:
        out += tl.load(skip + d, mask=real, other=0.0).to(tl.float32) * value
    if HAS_Z:
        gate = tl.load(z + b * z_b + d, mask=real, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + b * channels + d, out.to(y.dtype.element_ty), mask=real)


# ---- launches --------------------------------------------------------------------------------------------------------


def _rows(t: Tensor | None) -> Any:
    """The tensor with a dense last axis: a view where that is so."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _dense(t: Tensor | None) -> Any:
    return None if t is None else t.contiguous()


def _strides(t: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if t is None else t.stride()[:axes]


def _alternatives(op: str, t: Tensor, channels: int, N: int) -> list[Config]:
    """The shipped launch parameters first; then half and twice as many channels, and two warps."""
    first = config(op, capability(t), channels, N)
    found = [first]
    for scale in (0.5, 1, 2):
        for warps in (1, 2):
            other = {**first, "BLOCK_D": max(1, int(first["BLOCK_D"] * scale)), "num_warps": warps}
            if other not in found:
                found.append(other)
    return found


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, state: Tensor | None, marks: Tensor | None,
    dt_softplus: bool, low: float, high: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments as `statewise::selective_scan_triton` in the package's __init__; B and C are (B, L, G, N)."""
    (rows, L, channels), N, groups = x.shape, A.shape[1], B.shape[2]
    make: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last = torch.empty(rows, channels, N, **make)
    chunks = -(-L // CHUNK)
    bounds = torch.empty(rows, chunks if keep else 0, N, channels, **make)
    if y.numel() == 0 or N == 0:
        return y.zero_(), last.zero_() if state is None else last.copy_(state), bounds
    x, dt, B, C, z = _rows(x), _rows(dt), _rows(B), _rows(C), _rows(z)
    A, D, dt_bias, state, marks = _dense(A), _dense(D), _dense(dt_bias), _dense(state), _dense(marks)
    per_group = channels // groups
    flags = {
        "HAS_BIAS": dt_bias is not None, "MARKS": marks is not None, "SOFTPLUS": dt_softplus,
        "LIMIT": low > -float("inf") or high < float("inf"), "BLOCK_N": triton.next_power_of_2(N),
    }  # fmt: skip

    def run(parameters: Config) -> None:
        programs = rows * groups * triton.cdiv(per_group, parameters["BLOCK_D"])
        stretch = stretches(x, programs * parameters["num_warps"], chunks) * CHUNK
        count = triton.cdiv(L, stretch)
        start = state
        if count > 1:
            local, through = torch.empty(2, count, rows, channels, N, **make)
            _stretch_forward[(programs, count)](
                x, dt, A, B, dt_bias, marks, local, through, *_strides(x, 2), *_strides(dt, 2), *_strides(B, 3),
                rows, L, channels, N, per_group, stretch, 1, low, high, **flags, **parameters,
            )  # fmt: skip
            start = join(through, local, state)
        _forward[(programs, count)](
            x, dt, A, B, C, D, z, dt_bias, start, marks, y, last, bounds,
            *_strides(x, 2), *_strides(dt, 2), *_strides(B, 3), *_strides(C, 3), *_strides(z, 2),
            rows, L, channels, N, per_group, stretch, 1, low, high,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_START=start is not None, KEEP=keep, STEPS=CHUNK,
            **flags, **parameters,
        )  # fmt: skip

    key = ("selective_scan", x.device, x.dtype, rows, L, channels, N, groups)
    tuned(key, _alternatives("selective_scan", x, per_group, N), run)
    return y, last, bounds


def backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, state: Tensor | None, marks: Tensor | None, bounds: Tensor,
    dt_softplus: bool, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias, state, in the dtypes of the inputs; empty for absent inputs."""
    (rows, L, channels), N, groups = x.shape, A.shape[1], B.shape[2]
    inputs = (x, dt, A, B, C, D, z, dt_bias, state)
    make: dict[str, Any] = {"device": x.device, "dtype": torch.float32}

    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = (like(t) for t in inputs)
    if x.numel() == 0 or N == 0:
        for t in (dx, ddt, dA, dB, dC, dD, dz, dbias):
            t.zero_()
        return dx, ddt, dA, dB, dC, dD, dz, dbias, dstate if state is None else dstate.copy_(dlast)
    x, dt, B, C, z, dy = _rows(x), _rows(dt), _rows(B), _rows(C), _rows(z), _rows(dy)
    A, D, dt_bias, marks, dlast = _dense(A), _dense(D), _dense(dt_bias), _dense(marks), _dense(dlast.float())
    per_group, chunks = channels // groups, -(-L // CHUNK)
    flags = {
        "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "MARKS": marks is not None, "SOFTPLUS": dt_softplus,
        "LIMIT": low > -float("inf") or high < float("inf"), "BLOCK_N": triton.next_power_of_2(N),
    }  # fmt: skip

    def run(parameters: Config) -> tuple[Tensor, ...]:
        blocks = triton.cdiv(per_group, parameters["BLOCK_D"])
        partials = min(PARTIALS, blocks)
        programs = rows * groups * partials
        stretch = stretches(x, programs * parameters["num_warps"], chunks) * CHUNK
        count = triton.cdiv(L, stretch)
        behind = dlast
        if count > 1:
            local, through = torch.empty(2, count, rows, channels, N, **make)
            _stretch_backward[(rows * groups * blocks, count)](
                dy, dt, A, C, z, dt_bias, marks, local, through,
                *_strides(dy, 2), *_strides(dt, 2), *_strides(C, 3), *_strides(z, 2),
                rows, L, channels, N, per_group, stretch, 1, low, high, **flags, **parameters,
            )  # fmt: skip
            behind = join(through, local, dlast, reverse=True)
        parts_B, parts_C = torch.empty(2, partials, rows, L, groups, N, **make)
        parts_A = torch.empty(count, rows, N, channels, **make)
        parts_D, parts_bias = torch.empty(2, count, rows, channels, **make)
        start = torch.empty(rows, channels, N, **make)
        scratch = torch.empty(programs * count * CHUNK * flags["BLOCK_N"] * parameters["BLOCK_D"], **make)
        _backward[(programs, count)](
            dy, behind, x, dt, A, B, C, D, z, dt_bias, marks, bounds, scratch,
            dx, ddt, parts_A, parts_B, parts_C, parts_D, dz, parts_bias, start,
            *_strides(dy, 2), *_strides(x, 2), *_strides(dt, 2), *_strides(B, 3), *_strides(C, 3), *_strides(z, 2),
            rows, L, channels, N, per_group, partials, stretch, 1, low, high,
            HAS_D=D is not None, STEPS=CHUNK, **flags, **parameters,
        )  # fmt: skip
        return parts_A, parts_B, parts_C, parts_D, parts_bias, start

    key = ("selective_scan_backward", x.device, x.dtype, rows, L, channels, N, groups)
    found = tuned(key, _alternatives("selective_scan_backward", x, per_group, N), run)
    parts_A, parts_B, parts_C, parts_D, parts_bias, start = found
    dA.copy_(parts_A.sum((0, 1)).t())
    dB.copy_(parts_B.sum(0))
    dC.copy_(parts_C.sum(0))
    if D is not None:
        dD.copy_(parts_D.sum((0, 1)))
    if dt_bias is not None:
        dbias.copy_(parts_bias.sum((0, 1)))
    if state is not None:
        dstate.copy_(start)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dstate


def step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, low: float, high: float, state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One position: x, dt, z (B, D), B and C (B, G, N), state (B, D, N)."""
    (rows, channels), N, groups = x.shape, A.shape[1], B.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new = torch.empty(state.shape, dtype=torch.float32, device=x.device)
    if y.numel() == 0 or N == 0:
        return y.zero_(), new
    x, dt, B, C, z = _rows(x), _rows(dt), _rows(B), _rows(C), _rows(z)
    per_group = channels // groups
    parameters = config("selective_scan_step", capability(x), per_group, N)
    _decode[(rows * groups * triton.cdiv(per_group, parameters["BLOCK_D"]),)](
        x, dt, _dense(A), B, C, _dense(D), z, _dense(dt_bias), _dense(state), y, new,
        *_strides(x, 1), *_strides(dt, 1), *_strides(B, 2), *_strides(C, 2), *_strides(z, 1),
        channels, N, per_group, low, high,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus,
        LIMIT=low > -float("inf") or high < float("inf"), BLOCK_N=triton.next_power_of_2(N), **parameters,
    )  # fmt: skip
    return y, new
