"""CPU kernels of the norms: one pass over a row to gate it and add up its squares, one to scale it, both in cache."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .. import _numba as common
from .._simd import LANES, lanes, load, put, sigmoid, store, total, zeros

_F = np.float32
_NONE = np.zeros(0, np.float32)
# Rows after which partial sums over rows are added up: plain summation over many rows loses digits.
_FLUSH = 64


@common.kernel
def _gated(x, at, z, zt, n, h):
    """h = x silu(z), or x; returns the sum of squares."""
    acc = zeros()
    for c in range(0, n, LANES):
        v = lanes(x, at + c, n - c)
        if z.size:
            gate = lanes(z, zt + c, n - c)
            v = v * gate * sigmoid(gate)
        store(h, c, v)
        acc = acc + v * v
    return total(acc)


@common.kernel
def _forward(start, stop, worker, length, groups, n, x, xb, xl, z, zb, zl, weight, eps, y):
    h = np.empty(n + LANES, np.float32)
    for row in range(start, stop):
        b, t = row // length, row % length
        for g in range(groups):
            lo = g * n
            squares = _gated(x, b * xb + t * xl + lo, z, b * zb + t * zl + lo, n, h)
            scale = _F(1) / np.sqrt(squares / _F(n) + eps)
            to = row * groups * n + lo
            for c in range(0, n, LANES):
                v = load(h, c) * scale
                if weight.size:
                    v = v * lanes(weight, lo + c, n - c)
                put(y, to + c, n - c, v)


@common.kernel
def _backward(start, stop, worker, length, groups, n, dy, x, xb, xl, z, zb, zl, weight, eps, dx, dz, dweight):
    h = np.empty(n + LANES, np.float32)
    near = np.zeros(groups * n + LANES, np.float32)
    for row in range(start, stop):
        b, t = row // length, row % length
        for g in range(groups):
            lo = g * n
            at, zt, to = b * xb + t * xl + lo, b * zb + t * zl + lo, row * groups * n + lo
            squares = _gated(x, at, z, zt, n, h)
            scale = _F(1) / np.sqrt(squares / _F(n) + eps)
            acc = zeros()
            for c in range(0, n, LANES):
                d, v = lanes(dy, to + c, n - c), load(h, c) * scale
                if weight.size:
                    put(near, lo + c, n - c, lanes(near, lo + c, n - c) + d * v)
                    d = d * lanes(weight, lo + c, n - c)
                acc = acc + d * v
            mean = total(acc) / _F(n)
            for c in range(0, n, LANES):
                d, v = lanes(dy, to + c, n - c), load(h, c) * scale
                if weight.size:
                    d = d * lanes(weight, lo + c, n - c)
                d = (d - v * mean) * scale
                if z.size:
                    gate = lanes(z, zt + c, n - c)
                    open_ = sigmoid(gate)
                    slope = open_ * (gate * (_F(1) - open_) + _F(1))
                    put(dz, to + c, n - c, d * lanes(x, at + c, n - c) * slope)
                    d = d * gate * open_
                put(dx, to + c, n - c, d)
        if weight.size and ((row - start) % _FLUSH == _FLUSH - 1 or row == stop - 1):
            for c in range(groups * n):
                dweight[worker, c] += near[c]
                near[c] = _F(0)


def _memory(t: Tensor | None):
    """(..., D) as flat memory with two strides; an absent one is empty."""
    if t is None:
        return _NONE, 0, 0
    t = t if t.ndim == 3 else t.reshape(1, -1, t.shape[-1])
    memory, (batch, time) = common.rows(t)
    return memory, batch, time


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """(rows in all, rows of a batch entry, groups, width of a group)."""
    rows = math.prod(x.shape[:-1])
    return rows, (x.shape[1] if x.ndim == 3 else rows), groups, x.shape[-1] // groups


def forward(x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int) -> Tensor:
    rows, *sizes = _sizes(x, groups)
    y = common.output(x.shape, x)
    weight_ = _NONE if weight is None else common.f32(weight)
    common.run(
        _forward, rows, *sizes, *_memory(x), *_memory(z), weight_, _F(eps), common.words(y), inline=x.numel() < 1 << 18
    )
    return y.to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight; empty for absent inputs."""
    rows, *sizes = _sizes(x, groups)
    inline = x.numel() < 1 << 17
    workers = common.workers(rows, inline)
    dx, dz = (common.output((0,) if t is None else t.shape, x) for t in (x, z))
    dweight = torch.zeros(workers, x.shape[-1] if weight is not None else 0)
    common.run(
        _backward, rows, *sizes, common.words(dy), *_memory(x), *_memory(z),
        _NONE if weight is None else common.f32(weight), _F(eps), common.words(dx), common.words(dz), dweight.numpy(),
        inline=inline,
    )  # fmt: skip
    return (
        dx.to(x.dtype),
        dz.to(x.dtype if z is None else z.dtype),
        x.new_empty(0) if weight is None else dweight.sum(0).to(weight.dtype),
    )
