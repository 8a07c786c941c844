"""CPU kernels of `short_conv` in float32, forward and backward.

A task is a stretch of one batch row (forward) or a block of its channels (backward). For each position the places of
its K inputs are looked up first (they stand side by side, except across padding, at the start of a document and in the
incoming state); then a loop over channels, sixteen at a time, does the arithmetic. Four positions whose inputs all
stand side by side share their loads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba
from .._numba import words
from .._simd import LANES, address, inlined, lanes, load, prefetch, prefetch_to_write, put, sigmoid, store, zeros

_F = np.float32
# Channels per task at most: rows and taps of a block stay in the first-level cache.
_BLOCK = 512
# Below this many numbers the pool costs more than it gives.
_INLINE = 1 << 18
_NO_MARKS = np.zeros((1, 1), np.uint8)
# Steps after which partial sums over time are added up: plain summation over a long sequence loses digits.
_FLUSH = 64
# A place that holds no input: the zeros before a document. Slot s of the state is -1 - s.
_NOTHING = -1000


@_numba.kernel
def _places(marks, has_marks, b, t, taps, at):
    """at[k] = where the k-th input before position t stands (t itself for k = 0)."""
    p = t
    at[0] = t
    for k in range(1, taps):
        if p >= 0 and has_marks and p < marks.shape[1] and marks[b, p] == 1:
            p = _NOTHING
        if p >= 0:
            p -= 1
            while has_marks and p >= 0 and marks[b, p] == 2:
                p -= 1
            at[k] = p if p >= 0 else 1 - taps  # the newest slot of the state
            p = at[k]
        elif p == _NOTHING or p == -1:  # slot 0 is the oldest
            p = _NOTHING
            at[k] = p
        else:
            p += 1
            at[k] = p


# A branch between arrays inside a loop makes Numba count references there, a thousand cycles for each vector: places
# are looked at once for a whole row.


@_numba.kernel
def _collect(x, base, row, state, start, channels, at, taps, lo, hi, inputs, wide):
    """The inputs at the places of `at` into the rows of `inputs`."""
    for k in range(taps):
        place, to = at[k], k * wide - lo
        if place >= 0:
            for c in range(lo, hi, LANES):
                store(inputs, to + c, lanes(x, base + place * row + c, hi - c))
        elif place == _NOTHING:
            for c in range(lo, hi, LANES):
                store(inputs, to + c, zeros())
        else:
            for c in range(lo, hi, LANES):
                store(inputs, to + c, lanes(state, start + (-1 - place) * channels + c, hi - c))


@inlined
def _silu(v, silu):
    if silu:
        v = v * sigmoid(v)
    return v


@_numba.kernel
def _four(x, base, row, w, bias, channels, silu, y, to):
    """Four positions of a convolution with four taps; their seven inputs stand side by side from `base` on."""
    for c in range(0, channels, LANES):
        n = channels - c
        w0, w1, w2, w3 = (
            lanes(w, 3 * channels + c, n), lanes(w, 2 * channels + c, n), lanes(w, channels + c, n), lanes(w, c, n),
        )  # fmt: skip
        start = lanes(bias, c, n)
        i = base + c
        a, b, d = lanes(x, i, n), lanes(x, i + row, n), lanes(x, i + 2 * row, n)
        i += 3 * row
        o = to + c
        for _ in range(4):
            e = lanes(x, i, n)
            prefetch(address(x, i + 4 * row))
            prefetch_to_write(address(y, o + 4 * channels))
            put(y, o, n, _silu(start + e * w0 + d * w1 + b * w2 + a * w3, silu))
            a, b, d = b, d, e
            i += row
            o += channels


@_numba.kernel
def _one(x, here, row, w, bias, taps, channels, silu, y, to):
    """One position whose inputs stand `row` apart, backwards from `here`."""
    for c in range(0, channels, LANES):
        n = channels - c
        acc = lanes(bias, c, n)
        for k in range(taps):
            acc = acc + lanes(x, here - k * row + c, n) * lanes(w, (taps - 1 - k) * channels + c, n)
        put(y, to + c, n, _silu(acc, silu))


@_numba.kernel
def _forward(
    start, stop, worker, x, w, bias, state, marks, y, last, parts, span, length, channels, sx, has_marks, silu
):
    taps = w.size // channels
    at = np.empty(taps + 1, np.int64)
    wide = (channels + LANES - 1) // LANES * LANES
    inputs = np.empty(taps * wide, np.float32)
    for task in range(start, stop):
        b = task // parts
        t = (task % parts) * span
        end = min(length, t + span)
        base = b * sx[0]
        first = b * (taps - 1) * channels
        clear = 0  # how many positions before t stand side by side in one document (as far as it matters)
        while clear < min(t, taps):
            mark = marks[b, t - 1 - clear] if has_marks else np.uint8(0)
            if mark == 2:
                break
            clear += 1
            if mark == 1:
                break
        while t < end:
            to = (b * length + t) * channels
            together = taps == 4 and clear >= 3 and t + 4 <= end
            if together and has_marks:
                for i in range(4):
                    together = together and marks[b, t + i] == 0
            if together:
                _four(x, base + (t - 3) * sx[1], sx[1], w, bias, channels, silu, y, to)
                t += 4
                clear += 4
                continue
            mark = marks[b, t] if has_marks else np.uint8(0)
            if mark == 2:
                for c in range(0, channels, LANES):
                    put(y, to + c, channels - c, zeros())
                clear = 0
            elif mark == 0 and clear >= taps - 1:
                _one(x, base + t * sx[1], sx[1], w, bias, taps, channels, silu, y, to)
                clear += 1
            else:
                clear = 1 if mark == 1 else clear + 1
                _places(marks, has_marks, b, t, taps, at)
                _collect(x, base, sx[1], state, first, channels, at, taps, 0, channels, inputs, wide)
                _one(inputs, 0, -wide, w, bias, taps, channels, silu, y, to)
            t += 1
        if end == length:
            # The state holds the inputs that a next position would need.
            _places(marks, has_marks, b, length, taps, at)
            at[0] = _NOTHING
            _collect(x, base, sx[1], state, first, channels, at, taps, 0, channels, inputs, wide)
            for k in range(1, taps):
                to = first + (taps - 1 - k) * channels
                for c in range(0, channels, LANES):
                    put(last, to + c, channels - c, load(inputs, k * wide + c))


@_numba.kernel
def _give(dx, base, dstate, start, channels, place, lo, hi, values, at):
    """Add a row to the gradient of the input at a place."""
    if place >= 0:
        for c in range(lo, hi, LANES):
            i = base + place * channels + c
            put(dx, i, hi - c, lanes(dx, i, hi - c) + lanes(values, at + c, hi - c))
    elif place != _NOTHING:
        for c in range(lo, hi, LANES):
            i = start + (-1 - place) * channels + c
            put(dstate, i, hi - c, lanes(dstate, i, hi - c) + lanes(values, at + c, hi - c))


@_numba.kernel
def _adjoint(dy, at, x, here, row, w, bias, lo, hi, channels, taps, silu, wide, near, dx, to):
    """One position whose inputs all stand side by side, which is nearly every one: no place has to be looked up."""
    for c in range(lo, hi, LANES):
        n = hi - c
        g = lanes(dy, at + c, n)
        if silu:
            acc = lanes(bias, c, n)
            for k in range(taps):
                acc = acc + lanes(x, here - k * row + c, n) * lanes(w, (taps - 1 - k) * channels + c, n)
            gate = sigmoid(acc)
            g = g * gate * (acc * (_F(1) - gate) + _F(1))
        j = c - lo
        put(dx, to + c, n, g * lanes(w, (taps - 1) * channels + c, n))
        m = (taps - 1) * wide + j
        store(near, m, load(near, m) + g * lanes(x, here + c, n))
        for k in range(1, taps):
            m -= wide
            store(near, m, load(near, m) + g * lanes(x, here - k * row + c, n))
            i = to - k * channels + c
            put(dx, i, n, lanes(dx, i, n) + g * lanes(w, (taps - 1 - k) * channels + c, n))
        m = taps * wide + j
        store(near, m, load(near, m) + g)


@_numba.kernel
def _backward(
    start, stop, worker, dy, dlast, x, w, bias, state, marks, dx, dw, db, dstate, blocks, block, length, channels, sd,
    sx, has_marks, silu,
):  # fmt: skip
    taps = w.size // channels
    at = np.empty(taps + 1, np.int64)
    wide = (block + LANES - 1) // LANES * LANES
    # Row `taps` of both is for the bias. Sums over time go in two levels.
    near = np.empty((taps + 1) * wide, np.float32)
    far = np.empty((taps + 1) * wide, np.float32)
    inputs = np.empty(taps * wide, np.float32)
    for task in range(start, stop):
        b = task // blocks
        lo = (task % blocks) * block
        hi = min(channels, lo + block)
        base, out = b * sx[0], b * length * channels
        first = b * (taps - 1) * channels
        near[:] = _F(0)
        far[:] = _F(0)
        clear = 0  # how many positions before t stand side by side in one document
        for t in range(length):
            here = out + t * channels
            if has_marks and marks[b, t] == 2:
                for c in range(lo, hi, LANES):
                    put(dx, here + c, hi - c, zeros())
                clear = 0
                continue
            side_by_side = clear >= taps - 1 and not (has_marks and marks[b, t] == 1)
            clear = 1 if has_marks and marks[b, t] == 1 else clear + 1
            if side_by_side:
                _adjoint(
                    dy, b * sd[0] + t * sd[1], x, base + t * sx[1], sx[1], w, bias, lo, hi, channels, taps, silu,
                    wide, near, dx, here,
                )  # fmt: skip
            else:
                _places(marks, has_marks, b, t, taps, at)
                _collect(x, base, sx[1], state, first, channels, at, taps, lo, hi, inputs, wide)
                for c in range(lo, hi, LANES):
                    n, j = hi - c, c - lo
                    g = lanes(dy, b * sd[0] + t * sd[1] + c, n)
                    if silu:
                        acc = lanes(bias, c, n)
                        for k in range(taps):
                            acc = acc + load(inputs, k * wide + j) * lanes(w, (taps - 1 - k) * channels + c, n)
                        gate = sigmoid(acc)
                        g = g * gate * (acc * (_F(1) - gate) + _F(1))
                    for k in range(taps):
                        m = (taps - 1 - k) * wide + j
                        store(near, m, load(near, m) + g * load(inputs, k * wide + j))
                        store(inputs, k * wide + j, g * lanes(w, (taps - 1 - k) * channels + c, n))
                    put(dx, here + c, n, load(inputs, j))
                    m = taps * wide + j
                    store(near, m, load(near, m) + g)
                for k in range(1, taps):
                    _give(dx, out, dstate, first, channels, at[k], lo, hi, inputs, k * wide - lo)
            if t % _FLUSH == _FLUSH - 1:
                for m in range(0, near.size, LANES):
                    store(far, m, load(far, m) + load(near, m))
                    store(near, m, zeros())
        _places(marks, has_marks, b, length, taps, at)
        for k in range(1, taps):
            _give(dx, out, dstate, first, channels, at[k], lo, hi, dlast, first + (taps - 1 - k) * channels)
        for c in range(lo, hi, LANES):
            for k in range(taps):
                m = k * wide + c - lo
                put(dw, (b * taps + k) * channels + c, hi - c, load(far, m) + load(near, m))
            m = taps * wide + c - lo
            put(db, b * channels + c, hi - c, load(far, m) + load(near, m))


def _shared(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    batch, _, channels = x.shape
    taps = weight.shape[1]
    return (
        np.from_dlpack(weight.detach().t().contiguous()).reshape(-1),
        np.zeros(channels, np.float32) if bias is None else np.from_dlpack(bias.detach().contiguous()),
        words(state) if state is not None else np.zeros(batch * (taps - 1) * channels, np.float32),
        _NO_MARKS if marks is None else marks.contiguous().numpy(),
    )


def _plan(batch: int, channels: int) -> tuple[int, int, int]:
    """(tasks, blocks of a row, channels of a block)."""
    block = -(-channels // _numba.split(batch, channels, _BLOCK))
    block = -(-block // LANES) * LANES
    blocks = -(-channels // block)
    return batch * blocks, blocks, block


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    y = _numba.output(x.shape, x)
    last = torch.empty(batch, weight.shape[1] - 1, channels, dtype=torch.float32)
    if batch * channels == 0:
        return y.to(x.dtype), last
    parts = 1 if y.numel() < _INLINE else max(1, min(length // 32, 4 * torch.get_num_threads() // batch))
    span = max(1, -(-length // parts))
    parts = max(1, -(-length // span))
    flat, sx = _numba.rows(x)
    w, b, s, m = _shared(x, weight, bias, state, marks)
    _numba.run(
        _forward, batch * parts, flat, w, b, s, m, words(y), words(last), parts, span, length, channels, sx,
        marks is not None, silu,
        inline=y.numel() < _INLINE,
    )  # fmt: skip
    return y.to(x.dtype), last


def backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    marks: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    taps = weight.shape[1]
    dx = _numba.empty(batch, length, channels)
    dw = torch.empty(batch, taps, channels, dtype=torch.float32)
    db = torch.empty(batch, channels, dtype=torch.float32)
    # A document start drops the slots before it, and with them the gradient.
    dstate = torch.zeros(batch, taps - 1, channels, dtype=torch.float32)
    if batch * channels == 0:
        return _present(dx.to(x.dtype), torch.zeros_like(weight), db.sum(0), dstate, bias, state)
    tasks, blocks, block = _plan(batch, channels)
    (flat_dy, sd), (flat, sx) = _numba.rows(dy), _numba.rows(x)
    w, b, s, m = _shared(x, weight, bias, state, marks)
    _numba.run(
        _backward, tasks, flat_dy, words(dlast), flat, w, b, s, m, words(dx), words(dw), words(db), words(dstate),
        blocks, block, length, channels, sd, sx, marks is not None, silu,
        inline=dx.numel() < _INLINE,
    )  # fmt: skip
    return _present(dx.to(x.dtype), dw.sum(0).t().contiguous(), db.sum(0), dstate, bias, state)


def _present(dx, dw, db, dstate, bias, state) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dx, dw, db if bias is not None else db.new_empty(0), dstate if state is not None else db.new_empty(0)
