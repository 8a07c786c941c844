"""CPU kernels of `linear_scan`, forward and backward, for float32 and complex64.

One task is one batch row and one block of channels; it walks through time with the block's state in cache. The inner
loop runs over channels, which lie side by side in memory, so that LLVM turns it into vector instructions. Inputs are
read through their own strides over batch and time, so a decay that is constant in time is never copied out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _numba
from .._simd import LANES, address, lanes, load, prefetch, prefetch_to_write, put, store, zeros

# Channels per task at most. Long runs of memory per time step matter most; the state of this many channels still stays
# in the first-level cache.
_BLOCK = 2048
# Positions ahead of which memory is asked for.
_AHEAD = 4
# Below this many numbers the pool costs more than it gives.
_INLINE = 1 << 18
# Steps after which partial sums over time are added up: plain summation over a long sequence loses digits.
_FLUSH = 64


@_numba.kernel
def _forward_vector(start, stop, worker, a, x, h0, marks, h, last, blocks, block, sizes, sa, sx, has_marks, reverse):
    length, channels = sizes
    s = np.empty(block, x.dtype)
    for task in range(start, stop):
        b = task // blocks
        lo = (task % blocks) * block
        n = min(block, channels - lo)
        for c in range(n):
            s[c] = h0[b, lo + c]
        for i in range(length):
            t = length - 1 - i if reverse else i
            mark = marks[b, t] if has_marks else np.uint8(0)
            out = h[b, t, lo : lo + n]
            if mark == 2:
                for c in range(n):
                    out[c] = 0
                continue
            xt = x[b * sx[0] + t * sx[1] + lo :][:n]
            if mark == 1:
                for c in range(n):
                    s[c] = xt[c]
                    out[c] = xt[c]
                continue
            at = a[b * sa[0] + t * sa[1] + lo :][:n]
            for c in range(n):
                v = at[c] * s[c] + xt[c]
                s[c] = v
                out[c] = v
        for c in range(n):
            last[b, lo + c] = s[c]


@_numba.kernel
def _forward_real(start, stop, worker, a, x, h0, marks, h, last, blocks, block, sizes, sa, sx, has_marks, reverse):
    """`_forward_vector` in explicit vectors: float32 waits for memory only, and prefetching ahead pays."""
    length, channels = sizes
    s = np.empty(block + LANES, np.float32)
    for task in range(start, stop):
        b = task // blocks
        lo = (task % blocks) * block
        n = min(block, channels - lo)
        for c in range(0, n, LANES):
            store(s, c, lanes(h0, b * channels + lo + c, n - c))
        ahead = -_AHEAD if reverse else _AHEAD
        for i in range(length):
            t = length - 1 - i if reverse else i
            mark = marks[b, t] if has_marks else np.uint8(0)
            out = (b * length + t) * channels + lo
            if mark == 2:
                for c in range(0, n, LANES):
                    put(h, out + c, n - c, zeros())
                continue
            xt = b * sx[0] + t * sx[1] + lo
            at = b * sa[0] + t * sa[1] + lo
            if mark == 1:
                for c in range(0, n, LANES):
                    v = lanes(x, xt + c, n - c)
                    store(s, c, v)
                    put(h, out + c, n - c, v)
                continue
            for c in range(0, n, LANES):
                prefetch(address(x, xt + c + ahead * sx[1]))
                prefetch(address(a, at + c + ahead * sa[1]))
                prefetch_to_write(address(h, out + c + ahead * channels))
                v = lanes(a, at + c, n - c) * load(s, c) + lanes(x, xt + c, n - c)
                store(s, c, v)
                put(h, out + c, n - c, v)
        for c in range(0, n, LANES):
            put(last, b * channels + lo + c, n - c, load(s, c))


@_numba.kernel
def _forward_shared(
    start, stop, worker, a, x, h0, marks, h, last, parts, blocks, block, sizes, sa, sx, has_marks, reverse
):
    # A task is `block` groups of channels that share a decay, or one of `parts` parts of one such group. The decays of
    # a step are first laid out one per channel, so that one long loop serves all groups.
    length, rep = sizes
    groups = last.shape[1] // rep
    span = -(-rep // parts)
    s = np.empty(block * span, x.dtype)
    decay = np.empty(block * span, x.dtype)
    for task in range(start, stop):
        b = task // (blocks * parts)
        first = (task // parts) % blocks * block
        count = min(block, groups - first)
        lo = first * rep + task % parts * span
        each = min(span, rep - task % parts * span)
        n = count * each
        for c in range(n):
            s[c] = h0[b, lo + c]
        for i in range(length):
            t = length - 1 - i if reverse else i
            mark = marks[b, t] if has_marks else np.uint8(0)
            out = h[b, t, lo : lo + n]
            if mark == 2:
                for c in range(n):
                    out[c] = 0
                continue
            xt = x[b * sx[0] + t * sx[1] + lo :][:n]
            if mark == 1:
                for c in range(n):
                    s[c] = xt[c]
                    out[c] = xt[c]
                continue
            for g in range(count):
                one = a[b * sa[0] + t * sa[1] + first + g]
                for c in range(g * each, (g + 1) * each):
                    decay[c] = one
            for c in range(n):
                v = decay[c] * s[c] + xt[c]
                s[c] = v
                out[c] = v
        for c in range(n):
            last[b, lo + c] = s[c]


@_numba.kernel
def _previous(marks, b, t, length, has_marks, reverse):
    """Where the valid token stands whose h the token at t found; -1 if it found the incoming state."""
    step = 1 if reverse else -1
    s = t + step
    if has_marks:
        while 0 <= s < length and marks[b, s] == 2:
            s += step
    return s if 0 <= s < length else -1


@_numba.kernel
def _backward_vector(
    start, stop, worker, dh, dlast, a, h, h0, marks, da, dx, dh0, blocks, block, sizes, sa, sd, has_marks, reverse
):
    length, channels = sizes
    constant = da.shape[1] == 1 and length > 1
    g = np.empty(block, h.dtype)
    partial = np.empty(block, h.dtype)
    total = np.empty(block, h.dtype)
    for task in range(start, stop):
        b = task // blocks
        lo = (task % blocks) * block
        n = min(block, channels - lo)
        for c in range(n):
            g[c] = dlast[b, lo + c]
            partial[c] = 0
            total[c] = 0
        for i in range(length):
            t = i if reverse else length - 1 - i
            mark = marks[b, t] if has_marks else np.uint8(0)
            dxt = dx[b, t, lo : lo + n]
            if mark == 2:
                for c in range(n):
                    dxt[c] = 0
                if not constant:
                    for c in range(n):
                        da[b, t, lo + c] = 0
                continue
            dht = dh[b * sd[0] + t * sd[1] + lo :][:n]
            if mark == 1:
                for c in range(n):
                    dxt[c] = g[c] + dht[c]
                    g[c] = 0
                if not constant:
                    for c in range(n):
                        da[b, t, lo + c] = 0
                continue
            s = _previous(marks, b, t, length, has_marks, reverse)
            hp = h[b, s, lo : lo + n] if s >= 0 else h0[b, lo : lo + n]
            at = a[b * sa[0] + t * sa[1] + lo :][:n]
            if constant:
                for c in range(n):
                    v = g[c] + dht[c]
                    dxt[c] = v
                    partial[c] += np.conj(hp[c]) * v
                    g[c] = np.conj(at[c]) * v
                if i % _FLUSH == _FLUSH - 1:
                    for c in range(n):
                        total[c] += partial[c]
                        partial[c] = 0
            else:
                dat = da[b, t, lo : lo + n]
                for c in range(n):
                    v = g[c] + dht[c]
                    dxt[c] = v
                    dat[c] = np.conj(hp[c]) * v
                    g[c] = np.conj(at[c]) * v
        for c in range(n):
            dh0[b, lo + c] = g[c]
        if constant:
            for c in range(n):
                da[b, 0, lo + c] = total[c] + partial[c]


@_numba.reducing_kernel
def _backward_shared(
    start,
    stop,
    worker,
    dh,
    dlast,
    a,
    h,
    h0,
    marks,
    da,
    dx,
    dh0,
    parts,
    blocks,
    block,
    sizes,
    sa,
    sd,
    has_marks,
    reverse,
):
    # da is (parts, B, blocks, L, block): each part of a group gives a sum of its own, and what two threads write is
    # far apart in memory, or they would take the cache line from each other at every step.
    length, rep = sizes
    groups = dlast.shape[1] // rep
    span = -(-rep // parts)
    zero = np.zeros(1, h.dtype)[0]  # a literal 0 would make the sum float64
    state = np.empty(block * span, h.dtype)
    decay = np.empty(block * span, h.dtype)
    product = np.empty(block * span, h.dtype)
    for task in range(start, stop):
        b = task // (blocks * parts)
        part = task % parts
        place = (task // parts) % blocks
        first = place * block
        count = min(block, groups - first)
        lo = first * rep + part * span
        each = min(span, rep - part * span)
        n = count * each
        sums = da[part, b, place]
        for c in range(n):
            state[c] = dlast[b, lo + c]
        for i in range(length):
            t = i if reverse else length - 1 - i
            mark = marks[b, t] if has_marks else np.uint8(0)
            dxt = dx[b, t, lo : lo + n]
            if mark != 0:
                for g in range(count):
                    sums[t, g] = 0
            if mark == 2:
                for c in range(n):
                    dxt[c] = 0
                continue
            dht = dh[b * sd[0] + t * sd[1] + lo :][:n]
            if mark == 1:
                for c in range(n):
                    dxt[c] = state[c] + dht[c]
                    state[c] = 0
                continue
            s = _previous(marks, b, t, length, has_marks, reverse)
            hp = h[b, s, lo : lo + n] if s >= 0 else h0[b, lo : lo + n]
            for g in range(count):
                one = np.conj(a[b * sa[0] + t * sa[1] + first + g])
                for c in range(g * each, (g + 1) * each):
                    decay[c] = one
            for c in range(n):
                v = state[c] + dht[c]
                dxt[c] = v
                product[c] = np.conj(hp[c]) * v
                state[c] = decay[c] * v
            for g in range(count):
                total = zero
                for c in range(g * each, (g + 1) * each):
                    total += product[c]
                sums[t, g] = total
        for c in range(n):
            dh0[b, lo + c] = state[c]


_NO_MARKS = np.zeros((1, 1), np.uint8)


def _start(state: Tensor | None, like: Tensor) -> np.ndarray:
    if state is None:
        return np.zeros((like.shape[0], like.shape[2]), like.detach()[:0].resolve_conj().numpy().dtype)
    return state.detach().resolve_conj().contiguous().numpy()


def _plan(batch: int, channels: int, groups: int) -> tuple[int, tuple[int, ...]]:
    """(tasks, what the kernel needs to find its own): (blocks, channels of a block), or for shared decays
    (parts of a group, blocks, groups of a block)."""
    if groups == channels:
        count = _numba.split(batch, channels, _BLOCK)
        block = -(-channels // count)
        return batch * -(-channels // block), (-(-channels // block), block)
    rep = channels // groups
    parts = -(-rep // _BLOCK)
    if parts == 1 and groups > 1:
        count = min(groups, _numba.split(batch, channels, _BLOCK))
        block = -(-groups // count)
        blocks = -(-groups // block)
        return batch * blocks, (1, blocks, block)
    parts = _numba.split(batch * groups, rep, _BLOCK)
    # Parts are equally wide but for the last, which must not be empty.
    parts = -(-rep // -(-rep // parts))
    return batch * groups * parts, (parts, groups, 1)


def _marks(marks: Tensor | None) -> np.ndarray:
    return _NO_MARKS if marks is None else marks.contiguous().numpy()


def forward(a: Tensor, x: Tensor, state: Tensor | None, marks: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    groups = a.shape[2]
    h = _numba.empty(batch, length, channels, dtype=x.dtype)
    last = torch.empty(batch, channels, dtype=x.dtype)
    if last.numel() == 0:
        return h, last
    tasks, plan = _plan(batch, channels, groups)
    kernel = _forward_vector if groups == channels else _forward_shared
    start, out, end = _start(state, x), h.numpy(), last.numpy()
    if groups == channels and x.dtype == torch.float32:
        kernel, start, out, end = _forward_real, start.reshape(-1), out.reshape(-1), end.reshape(-1)
    sizes = (length, channels if groups == channels else channels // groups)
    (fa, sa), (fx, sx) = _numba.rows(a), _numba.rows(x)
    _numba.run(
        kernel, tasks, fa, fx, start, _marks(marks), out, end, *plan, sizes, sa, sx,
        marks is not None, reverse, inline=h.numel() < _INLINE,
    )  # fmt: skip
    return h, last


def backward(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, state: Tensor | None, marks: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = h.shape
    groups = a.shape[2]
    dx = _numba.empty(batch, length, channels, dtype=h.dtype)
    dh0 = torch.empty(batch, channels, dtype=h.dtype)
    if h.numel() == 0:
        return torch.zeros(a.shape, dtype=h.dtype), dx, dlast.detach().clone(memory_format=torch.contiguous_format)
    tasks, plan = _plan(batch, channels, groups)
    kernel = _backward_vector if groups == channels else _backward_shared
    sizes = (length, channels if groups == channels else channels // groups)
    if groups < channels:
        parts, blocks, block = plan
        da = _numba.empty(parts, batch, blocks, length, block, dtype=h.dtype)
    else:
        da = _numba.empty(batch, a.shape[1], channels, dtype=h.dtype)
    (fa, sa), (fd, sd) = _numba.rows(a), _numba.rows(dh)
    _numba.run(
        kernel, tasks, fd, dlast.detach().resolve_conj().contiguous().numpy(), fa, h.detach().contiguous().numpy(),
        _start(state, h), _marks(marks), da.numpy(), dx.numpy(), dh0.numpy(), *plan, sizes, sa, sd,
        marks is not None, reverse, inline=h.numel() < _INLINE,
    )  # fmt: skip
    if groups < channels:
        da = (da[0] if parts == 1 else da.sum(0)).transpose(1, 2).flatten(2)[:, :, :groups]
    return da.sum_to_size(a.shape), dx, dh0
