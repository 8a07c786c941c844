"""CPU kernels of `short_conv` in float32, forward and backward.

One task is one batch row and one block of channels. It keeps the last K inputs of the document in a ring of K rows,
which makes document starts, padding in the middle and the incoming state the same as any other case.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba

# Channels per task at most: long runs of memory per time step, while ring and taps stay in the first-level cache.
_BLOCK = 768
# Below this many numbers the pool costs more than it gives.
_INLINE = 1 << 14
_NO_MARKS = np.zeros((1, 1), np.uint8)
# Steps after which partial sums over time are added up.
_FLUSH = 64
# Ring rows that hold no input: the zeros before a document.
_EMPTY = -1000


# LLVM gives up on a loop over a row whose variable is bound twice in a function, hence the many names below; and one
# loop over four taps takes half the time of four loops over one.


@_numba.kernel
def _convolve(acc, ring, w, bias, head, n):
    """acc = bias + the sum of the ring's rows times the taps; `head` is the row of the newest input."""
    taps = w.shape[0]
    w0, r0 = w[taps - 1], ring[head]
    if taps == 1:
        for c in range(n):
            acc[c] = bias[c] + w0[c] * r0[c]
        return
    w1, r1 = w[taps - 2], ring[(head - 1) % taps]
    if taps == 2:
        for c in range(n):
            acc[c] = bias[c] + w0[c] * r0[c] + w1[c] * r1[c]
        return
    w2, r2 = w[taps - 3], ring[(head - 2) % taps]
    if taps == 3:
        for c in range(n):
            acc[c] = bias[c] + w0[c] * r0[c] + w1[c] * r1[c] + w2[c] * r2[c]
        return
    w3, r3 = w[taps - 4], ring[(head - 3) % taps]
    for c in range(n):
        acc[c] = bias[c] + w0[c] * r0[c] + w1[c] * r1[c] + w2[c] * r2[c] + w3[c] * r3[c]
    for k in range(4, taps):
        _add_product(acc, w[taps - 1 - k], ring[(head - k) % taps], n)


@_numba.kernel
def _add_product(total, left, right, n):
    for c in range(n):
        total[c] += left[c] * right[c]


@_numba.kernel
def _load(local, matrix, lo, n):
    """Columns lo ... lo + n of a matrix into the front of the rows of `local`."""
    for k in range(matrix.shape[0]):
        for c in range(n):
            local[k, c] = matrix[k, lo + c]


@_numba.kernel
def _forward(start, stop, worker, x, w, bias, state, marks, y, last, blocks, block, length, sx, has_marks, silu):
    taps, channels = w.shape
    ring = np.empty((taps, block), np.float32)
    wl = np.empty((taps, block), np.float32)
    acc = np.empty(block, np.float32)
    log2e, one = np.float32(_numba.LOG2E), np.float32(1)
    for task in range(start, stop):
        b = task // blocks
        lo = (task % blocks) * block
        n = min(block, channels - lo)
        _load(wl, w, lo, n)
        _load(ring, state[b], lo, n)
        bl = bias[lo : lo + n]
        head = taps - 1
        for t in range(length):
            mark = marks[b, t] if has_marks else np.uint8(0)
            out = y[b, t, lo : lo + n]
            if mark == 2:
                for c in range(n):
                    out[c] = 0
                continue
            if mark == 1:
                ring[:] = 0
            xt = x[b * sx[0] + t * sx[1] + lo :][:n]
            newest = ring[head]
            for c in range(n):
                newest[c] = xt[c]
            _convolve(acc, ring, wl, bl, head, n)
            if silu:
                for c in range(n):
                    out[c] = acc[c] / (one + _numba.exp2(-log2e * acc[c]))
            else:
                for c in range(n):
                    out[c] = acc[c]
            head = (head + 1) % taps
        for j in range(taps - 1):
            row = ring[(head + 1 + j) % taps]
            for c in range(n):
                last[b, j, lo + c] = row[c]


@_numba.kernel
def _flush(grad, slot, held, dx, dstate, b, lo, n):
    """Write the finished gradient of the input that stood in a row of the ring."""
    at = held[slot]
    row = grad[slot]
    if at >= 0:
        to = dx[b, at, lo : lo + n]
        for c in range(n):
            to[c] = row[c]
    elif at != _EMPTY:
        to = dstate[b, -1 - at, lo : lo + n]
        for c in range(n):
            to[c] = row[c]
    held[slot] = _EMPTY


@_numba.kernel
def _backward(
    start, stop, worker, dy, dlast, x, w, bias, state, marks, dx, dw, db, dstate, blocks, block, length, sd, sx,
    has_marks, silu,
):  # fmt: skip
    taps, channels = w.shape
    ring = np.empty((taps, block), np.float32)
    grad = np.empty((taps, block), np.float32)
    wl = np.empty((taps, block), np.float32)
    held = np.empty(taps, np.int64)
    acc = np.empty(block, np.float32)
    # Row `taps` of both is for the bias. Sums over time go in two levels, or long sequences would lose digits.
    near = np.empty((taps + 1, block), np.float32)
    far = np.empty((taps + 1, block), np.float32)
    log2e, one = np.float32(_numba.LOG2E), np.float32(1)
    for task in range(start, stop):
        b = task // blocks
        lo = (task % blocks) * block
        n = min(block, channels - lo)
        near[:] = 0
        far[:] = 0
        held[:] = _EMPTY
        _load(wl, w, lo, n)
        _load(ring, state[b], lo, n)
        bl = bias[lo : lo + n]
        grad[:] = 0
        for j in range(taps - 1):
            held[j] = -1 - j
        head = taps - 1
        for t in range(length):
            mark = marks[b, t] if has_marks else np.uint8(0)
            if mark == 2:
                to = dx[b, t, lo : lo + n]
                for c in range(n):
                    to[c] = 0
                continue
            if mark == 1:
                for slot in range(taps):
                    _flush(grad, slot, held, dx, dstate, b, lo, n)
                ring[:] = 0
            _flush(grad, head, held, dx, dstate, b, lo, n)
            held[head] = t
            xt = x[b * sx[0] + t * sx[1] + lo :][:n]
            newest, fresh = ring[head], grad[head]
            for c in range(n):
                newest[c] = xt[c]
            for c in range(n):
                fresh[c] = 0
            dyt = dy[b * sd[0] + t * sd[1] + lo :][:n]
            if silu:
                _convolve(acc, ring, wl, bl, head, n)
                for c in range(n):
                    gate = one / (one + _numba.exp2(-log2e * acc[c]))
                    acc[c] = dyt[c] * gate * (one + acc[c] * (one - gate))
            else:
                for c in range(n):
                    acc[c] = dyt[c]
            for k in range(taps):
                slot, tap = (head - k) % taps, taps - 1 - k
                _add_product(near[tap], ring[slot], acc, n)
                _add_product(grad[slot], wl[tap], acc, n)
            sums = near[taps]
            for c in range(n):
                sums[c] += acc[c]
            if t % _FLUSH == _FLUSH - 1:
                for k in range(taps + 1):
                    for c in range(n):
                        far[k, c] += near[k, c]
                        near[k, c] = 0
            head = (head + 1) % taps
        for j in range(taps - 1):
            row = grad[(head + 1 + j) % taps]
            for c in range(n):
                row[c] += dlast[b, j, lo + c]
        for slot in range(taps):
            _flush(grad, slot, held, dx, dstate, b, lo, n)
        for k in range(taps):
            for c in range(n):
                dw[b, k, lo + c] = far[k, c] + near[k, c]
        for c in range(n):
            db[b, lo + c] = far[taps, c] + near[taps, c]


def _shared(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    batch, _, channels = x.shape
    taps = weight.shape[1]
    return (
        np.from_dlpack(weight.detach().t().contiguous()),
        np.zeros(channels, np.float32) if bias is None else np.from_dlpack(bias.detach().contiguous()),
        np.zeros((batch, taps - 1, channels), np.float32) if state is None else state.detach().contiguous().numpy(),
        _NO_MARKS if marks is None else marks.contiguous().numpy(),
    )


def _plan(batch: int, channels: int) -> tuple[int, int, int]:
    """(tasks, blocks of a row, channels of a block)."""
    block = -(-channels // _numba.split(batch, channels, _BLOCK))
    blocks = -(-channels // block)
    return batch * blocks, blocks, block


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    y = torch.empty(batch, length, channels, dtype=torch.float32)
    last = torch.empty(batch, weight.shape[1] - 1, channels, dtype=torch.float32)
    if batch * channels == 0:
        return y, last
    tasks, blocks, block = _plan(batch, channels)
    flat, sx = _numba.rows(x)
    w, b, s, m = _shared(x, weight, bias, state, marks)
    _numba.run(
        _forward, tasks, flat, w, b, s, m, y.numpy(), last.numpy(), blocks, block, length, sx, marks is not None, silu,
        inline=y.numel() < _INLINE,
    )  # fmt: skip
    return y, last


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
    dx = torch.empty(batch, length, channels, dtype=torch.float32)
    dw = torch.empty(batch, taps, channels, dtype=torch.float32)
    db = torch.empty(batch, channels, dtype=torch.float32)
    # A document start drops the slots before it, and with them the gradient.
    dstate = torch.zeros(batch, taps - 1, channels, dtype=torch.float32)
    if batch * channels == 0:
        return dx, torch.zeros_like(weight), db.sum(0), dstate
    tasks, blocks, block = _plan(batch, channels)
    (flat_dy, sd), (flat, sx) = _numba.rows(dy), _numba.rows(x)
    w, b, s, m = _shared(x, weight, bias, state, marks)
    _numba.run(
        _backward, tasks, flat_dy, dlast.detach().contiguous().numpy(), flat, w, b, s, m,
        dx.numpy(), dw.numpy(), db.numpy(), dstate.numpy(), blocks, block, length, sd, sx, marks is not None, silu,
        inline=dx.numel() < _INLINE,
    )  # fmt: skip
    return dx, dw.sum(0).t().contiguous(), db.sum(0), dstate
