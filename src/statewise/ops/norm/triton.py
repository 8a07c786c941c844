"""GPU kernels of the root-mean-square norms, forward and backward: each number is read once and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import processors, sigmoid, silu_slope


@triton.jit
def _forward(
    x, z, w, y, x_r, z_r, W, eps, GROUPS: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """One group of one row: y (rows, D), dense, with D = GROUPS W."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    at, real = group * W + c, c < W
    value = tl.load(x + row * x_r + at, mask=real, other=0.0).to(tl.float32)
    if GATE:
        gate = tl.load(z + row * z_r + at, mask=real, other=0.0).to(tl.float32)
        value *= gate * sigmoid(gate)
    value *= tl.rsqrt(tl.sum(value * value, 0) / W + eps)
    if WEIGHT:
        value *= tl.load(w + at, mask=real, other=0.0).to(tl.float32)
    tl.store(y + row * (GROUPS * W) + at, value.to(y.dtype.element_ty), mask=real)


@triton.jit
def _backward(
    dy, x, z, w, dx, dz, dw, dy_r, x_r, z_r, rows, W, eps,
    GROUPS: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of every so manieth row: dx, dz (rows, D), dense; dw (programs, D), a sum for each program."""
    first, group = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    at, real = group * W + c, c < W
    total = tl.zeros([BLOCK], tl.float32)
    if WEIGHT:
        weight = tl.load(w + at, mask=real, other=0.0).to(tl.float32)
    for row in range(first, rows, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        value = tl.load(x + row * x_r + at, mask=real, other=0.0).to(tl.float32)
        slope = tl.load(dy + row * dy_r + at, mask=real, other=0.0).to(tl.float32)
        gated = value
        if GATE:
            gate = tl.load(z + row * z_r + at, mask=real, other=0.0).to(tl.float32)
            open_ = sigmoid(gate)
            gated = value * (gate * open_)
        scale = tl.rsqrt(tl.sum(gated * gated, 0) / W + eps)
        normal = gated * scale
        total += slope * normal
        if WEIGHT:
            slope *= weight
        slope = (slope - normal * (tl.sum(slope * normal, 0) / W)) * scale
        to = row * (GROUPS * W) + at
        if GATE:
            d_gate = slope * value * silu_slope(gate, open_)
            tl.store(dz + to, d_gate.to(dz.dtype.element_ty), mask=real)
            slope *= gate * open_
        tl.store(dx + to, slope.to(dx.dtype.element_ty), mask=real)
    if WEIGHT:
        tl.store(dw + first.to(tl.int64) * (GROUPS * W) + at, total, mask=real)


def _rows(t: Any, D: int) -> Any:
    """(rows, D) with a dense last axis; a view where strides allow."""
    if t is None:
        return None
    t = t.reshape(-1, D)
    return t if t.stride(1) == 1 else t.contiguous()


def _plan(width: int) -> tuple[int, int]:
    """(block, warps): from 8 to 32 numbers a thread."""
    block = triton.next_power_of_2(width)
    return block, min(32, max(1, block // 512))


def forward(x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int) -> Tensor:
    """rms_norm(x * silu(z)) * weight over (..., D), in x's dtype."""
    D = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    block, warps = _plan(D // groups)
    value, gate = _rows(x, D), _rows(z, D)
    _forward[(len(value), groups)](
        value, gate, None if weight is None else weight.contiguous(), y, value.stride(0),
        0 if gate is None else gate.stride(0), D // groups, eps,
        GROUPS=groups, GATE=gate is not None, WEIGHT=weight is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight, each in its dtype; empty where there is no such input."""
    D = x.shape[-1]
    dx, dz, dw = (
        x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, z, weight)
    )
    if x.numel() == 0:
        return dx, dz, dw.zero_()
    block, warps = _plan(D // groups)
    value, gate, slope = _rows(x, D), _rows(z, D), _rows(dy, D)
    rows = len(value)
    # Enough programs to fill the GPU, and a bounded number of partial sums whatever the batch.
    programs = min(rows, 4 * processors(x))
    sums = torch.empty(programs if weight is not None else 0, D, dtype=torch.float32, device=x.device)
    _backward[(programs, groups)](
        slope, value, gate, None if weight is None else weight.contiguous(), dx, dz, sums, slope.stride(0),
        value.stride(0), 0 if gate is None else gate.stride(0), rows, D // groups, eps,
        GROUPS=groups, GATE=gate is not None, WEIGHT=weight is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if weight is not None:
        dw.copy_(sums.sum(0))
    return dx, dz, dw
