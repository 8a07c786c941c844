"""GPU kernels of `linear_scan`, forward and backward, real and complex.

One program is one warp. It walks over the tokens of one row and one block of channels, a tile (TILE, channels) at a
time: the tile is read in one go, scanned in registers, and joined to the state that enters it. Complex numbers are two
planes that lie interleaved in memory. Positions i count in the order of the scan, so a scan in reverse reads token
L - 1 - i.

Where batch and channels are too few to fill a GPU, time is cut into stretches: each is first run from zero for its
final state and the product of its decays, these are joined in order, and then all stretches run side by side.

The forward pass keeps the state at the start of each tile, and the backward pass scans a tile again from there. The
adjoint v_i = x-gradient of position i is a scan in the other direction, v_i = dh_i + conj(a_{i+1}) v_{i+1}.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import Config, capability, config, join, stretches, tuned
from . import _TILE as TILE

# Channels from which on those that share a decay get blocks of their own, so that a program sums their gradient. Below
# that, blocks would have idle lanes: the gradient is written for each channel and summed afterwards.
_SHARED = 32
# `unit` is 1. If the compiler knew that channels are neighbours, it would give a lane several of them and spread the
# rows of a tile over lanes, for wider loads. Not knowing, it lays one channel on each lane and all rows of a tile in
# its registers: loads are still runs of memory, as many are under way at once, and the scan needs no shared memory.
_HIDDEN = ["unit"]


@triton.jit
def _real(a1, h1, a2, h2):
    return a2 * a1, a2 * h1 + h2


@triton.jit
def _real_cut(a1, h1, a2, h2):
    # What is not finite must not pass a document's start as 0 * NaN.
    return a2 * a1, tl.where(a2 == 0, h2, a2 * h1 + h2)


@triton.jit
def _complex(ar1, ai1, hr1, hi1, ar2, ai2, hr2, hi2):
    return (
        ar2 * ar1 - ai2 * ai1,
        ar2 * ai1 + ai2 * ar1,
        ar2 * hr1 - ai2 * hi1 + hr2,
        ar2 * hi1 + ai2 * hr1 + hi2,
    )


@triton.jit
def _complex_cut(ar1, ai1, hr1, hi1, ar2, ai2, hr2, hi2):
    gone = (ar2 == 0) & (ai2 == 0)
    return (
        ar2 * ar1 - ai2 * ai1,
        ar2 * ai1 + ai2 * ar1,
        tl.where(gone, hr2, ar2 * hr1 - ai2 * hi1 + hr2),
        tl.where(gone, hi2, ar2 * hi1 + ai2 * hr1 + hi2),
    )


@triton.jit
def _scan(ar, ai, hr, hi, COMPLEX: tl.constexpr, MARKS: tl.constexpr, BACK: tl.constexpr):
    """Running products of decays, and states from zero, along the rows. For real numbers ai and hi mean nothing."""
    if COMPLEX:
        if MARKS:
            ar, ai, hr, hi = tl.associative_scan((ar, ai, hr, hi), 0, _complex_cut, reverse=BACK)
        else:
            ar, ai, hr, hi = tl.associative_scan((ar, ai, hr, hi), 0, _complex, reverse=BACK)
    else:
        if MARKS:
            ar, hr = tl.associative_scan((ar, hr), 0, _real_cut, reverse=BACK)
        else:
            ar, hr = tl.associative_scan((ar, hr), 0, _real, reverse=BACK)
    return ar, ai, hr, hi


@triton.jit
def _multiply_add(ar, ai, br, bi, cr, ci, COMPLEX: tl.constexpr, MARKS: tl.constexpr):
    """a b + c; with marks, c alone where a = 0."""
    re = ar * br + cr
    im = re
    gone = ar == 0
    if COMPLEX:
        re, im = re - ai * bi, ar * bi + ai * br + ci
        gone = gone & (ai == 0)
    if MARKS:
        re, im = tl.where(gone, cr, re), tl.where(gone, ci, im)
    return re, im


@triton.jit
def _load(pointer, at, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        at *= 2
    re = tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)
    im = re
    if COMPLEX:
        im = tl.load(pointer + at + 1, mask=mask, other=0.0)
    return re, im


@triton.jit
def _store(pointer, at, re, im, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(pointer + 2 * at, re, mask=mask)
        tl.store(pointer + 2 * at + 1, im, mask=mask)
    else:
        tl.store(pointer + at, re.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _row(value, row, BLOCK_T: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, BLOCK_T) == row)[:, None], value, 0.0), 0)


@triton.jit
def _decays(
    a, marks, i, inside, L, a_l, d, real, COMPLEX: tl.constexpr, MARKS: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Decays at positions i: 0 where a document starts; 1 where there is no token, inside or outside."""
    t = i
    if REVERSE:
        t = L - 1 - i
    t = t.to(tl.int64)
    re, im = _load(a, t[:, None] * a_l + d[None, :], inside[:, None] & real[None, :], COMPLEX)
    keep = inside
    fill = tl.where(inside, 0.0, 1.0)
    if MARKS:
        mark = tl.load(marks + t, mask=inside, other=2)
        keep = keep & (mark == 0)
        fill = tl.where(mark == 2, 1.0, 0.0)
    re = tl.where(keep[:, None], re, fill[:, None])
    if COMPLEX:
        im = tl.where(keep[:, None], im, 0.0)
    return re, im


@triton.jit
def _values(
    x, marks, i, inside, L, x_l, d, real, COMPLEX: tl.constexpr, MARKS: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Values at positions i, 0 where there is no token, whatever stands there; tokens t, and where they are valid."""
    t = i
    if REVERSE:
        t = L - 1 - i
    t = t.to(tl.int64)
    if MARKS:
        inside = inside & (tl.load(marks + t, mask=inside, other=2) != 2)
    re, im = _load(x, t[:, None] * x_l + d[None, :], inside[:, None] & real[None, :], COMPLEX)
    return re, im, t, inside


@triton.jit(do_not_specialize=_HIDDEN)
def _forward(
    a, x, start, marks, h, last, bounds, local, through,
    a_b, a_l, x_b, x_l, rows, L, channels, per_group, rep, stretch, unit,
    SUMMARY: tl.constexpr, KEEP: tl.constexpr, HAS_START: tl.constexpr, MARKS: tl.constexpr, COMPLEX: tl.constexpr,
    REVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h (B, L, C), last (B, C), bounds (B, tiles, C); start, local and through (stretches, B, C); all dense.

    SUMMARY: only the last state from zero and the product of the decays of each stretch.
    """
    blocks = tl.cdiv(per_group, BLOCK_D)
    of_row = channels // per_group * blocks
    b = (tl.program_id(0) // of_row).to(tl.int64)
    block = tl.program_id(0) % of_row
    s = tl.program_id(1)
    j = block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    real = j < per_group
    c = (block // blocks * per_group + j) * unit
    d = c // rep
    begin = s * stretch
    end = tl.minimum(begin + stretch, L)
    # Complex numbers take two places.
    parts: tl.constexpr = 2 if COMPLEX else 1
    a += b * a_b * parts
    x += b * x_b * parts
    if MARKS:
        marks += b * L
    if not SUMMARY:
        h += b * L * channels * parts
    sr = tl.zeros([BLOCK_D], tl.float32)
    si = tl.zeros([BLOCK_D], tl.float32)
    if HAS_START:
        sr, si = _load(start, (s * rows + b) * channels + c, real, COMPLEX)
    pr = tl.full([BLOCK_D], 1.0, tl.float32)
    pi = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_T):
        i = first + tl.arange(0, BLOCK_T)
        inside = i < end
        ar, ai = _decays(a, marks, i, inside, L, a_l, d, real, COMPLEX, MARKS, REVERSE)
        xr, xi, t, valid = _values(x, marks, i, inside, L, x_l, c, real, COMPLEX, MARKS, REVERSE)
        if KEEP:
            _store(bounds, (b * tl.cdiv(L, BLOCK_T) + first // BLOCK_T) * channels + c, sr, si, real, COMPLEX)
        # The state enters at the first row, so that it is rounded as in the definition, one step after the other.
        hr, hi = _multiply_add(ar, ai, sr[None, :], si[None, :], xr, xi, COMPLEX, MARKS)
        begins = (tl.arange(0, BLOCK_T) == 0)[:, None]
        xr = tl.where(begins, hr, xr)
        if COMPLEX:
            xi = tl.where(begins, hi, xi)
        ar, ai, hr, hi = _scan(ar, ai, xr, xi, COMPLEX, MARKS, False)
        sr = _row(hr, BLOCK_T - 1, BLOCK_T)
        if COMPLEX:
            si = _row(hi, BLOCK_T - 1, BLOCK_T)
        if SUMMARY:
            qr = _row(ar, BLOCK_T - 1, BLOCK_T)
            if COMPLEX:
                qi = _row(ai, BLOCK_T - 1, BLOCK_T)
                pr, pi = qr * pr - qi * pi, qr * pi + qi * pr
            else:
                pr *= qr
        else:
            if MARKS:
                hr = tl.where(valid[:, None], hr, 0.0)
                hi = tl.where(valid[:, None], hi, 0.0)
            _store(h, t[:, None] * channels + c[None, :], hr, hi, inside[:, None] & real[None, :], COMPLEX)
    if SUMMARY:
        at = (s * rows + b) * channels + c
        _store(local, at, sr, si, real, COMPLEX)
        _store(through, at, pr, pi, real, COMPLEX)
    elif end == L:
        _store(last, b * channels + c, sr, si, real, COMPLEX)


@triton.jit(do_not_specialize=_HIDDEN)
def _backward(
    dh, behind, a, x, marks, bounds, dx, da, dstart, local, through,
    dh_b, dh_l, a_b, a_l, x_b, x_l, rows, L, channels, per_group, rep, stretch, unit,
    SUMMARY: tl.constexpr, SUM: tl.constexpr, CONSTANT: tl.constexpr, MARKS: tl.constexpr, COMPLEX: tl.constexpr,
    REVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx (B, L, C), dstart (B, C); behind, local and through (stretches, B, C); all dense.

    da is (B, L, C); with CONSTANT, a sum over each stretch, (stretches, B, C); with SUM, a sum over each block of
    channels: blocks are the last axis in place of channels.
    """
    blocks = tl.cdiv(per_group, BLOCK_D)
    of_row = channels // per_group * blocks
    b = (tl.program_id(0) // of_row).to(tl.int64)
    block = tl.program_id(0) % of_row
    s = tl.program_id(1)
    j = block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    real = j < per_group
    c = (block // blocks * per_group + j) * unit
    d = c // rep
    begin = s * stretch
    end = tl.minimum(begin + stretch, L)
    parts: tl.constexpr = 2 if COMPLEX else 1
    dh += b * dh_b * parts
    a += b * a_b * parts
    x += b * x_b * parts
    if MARKS:
        marks += b * L
    gr = tl.zeros([BLOCK_D], tl.float32)
    gi = tl.zeros([BLOCK_D], tl.float32)
    if not SUMMARY:
        gr, gi = _load(behind, (s * rows + b) * channels + c, real, COMPLEX)
    pr = tl.full([BLOCK_D], 1.0, tl.float32)
    pi = tl.zeros([BLOCK_D], tl.float32)
    sum_r = tl.zeros([BLOCK_D], tl.float32)
    sum_i = tl.zeros([BLOCK_D], tl.float32)
    r = tl.arange(0, BLOCK_T)
    for back in range(begin, end, BLOCK_T):
        first = begin + (end - 1 - begin) // BLOCK_T * BLOCK_T - (back - begin)
        i = first + r
        inside = i < end
        # g is what the positions behind the tile give to the state after it. It enters at the last row.
        next_ = (i + 1 < end) & (r + 1 < BLOCK_T)
        nr, ni = _decays(a, marks, i + 1, next_, L, a_l, d, real, COMPLEX, MARKS, REVERSE)
        vr, vi, t, valid = _values(dh, marks, i, inside, L, dh_l, c, real, COMPLEX, MARKS, REVERSE)
        ends = (r == BLOCK_T - 1)[:, None]
        vr = tl.where(ends, vr + gr[None, :], vr)
        if COMPLEX:
            vi = tl.where(ends, vi + gi[None, :], vi)
        nr, ni, vr, vi = _scan(nr, -ni, vr, vi, COMPLEX, MARKS, True)
        only = tl.full([1], 0, tl.int32) + first
        fr, fi = _decays(a, marks, only, only < end, L, a_l, d, real, COMPLEX, MARKS, REVERSE)
        fr, fi = tl.sum(fr, 0), -tl.sum(fi, 0)
        gr = _row(vr, 0, BLOCK_T)
        gi = gr
        if COMPLEX:
            gi = _row(vi, 0, BLOCK_T)
        gr, gi = _multiply_add(fr, fi, gr, gi, tl.zeros_like(gr), tl.zeros_like(gr), COMPLEX, MARKS)
        if SUMMARY:
            qr = _row(nr, 0, BLOCK_T)
            if COMPLEX:
                qi = _row(ni, 0, BLOCK_T)
                qr, qi = fr * qr - fi * qi, fr * qi + fi * qr
                pr, pi = qr * pr - qi * pi, qr * pi + qi * pr
            else:
                pr *= fr * qr
        else:
            if MARKS:
                vr = tl.where(valid[:, None], vr, 0.0)
                vi = tl.where(valid[:, None], vi, 0.0)
            at = (b * L + t[:, None]) * channels + c[None, :]
            mask = inside[:, None] & real[None, :]
            _store(dx, at, vr, vi, mask, COMPLEX)
            # The states that the positions of the tile find: those of a scan that begins with what enters the tile.
            before = inside & (r > 0)
            hr, hi = _decays(a, marks, i - 1, before, L, a_l, d, real, COMPLEX, MARKS, REVERSE)
            xr, xi, _, _ = _values(x, marks, i - 1, before, L, x_l, c, real, COMPLEX, MARKS, REVERSE)
            er, ei = _load(
                bounds, (b * tl.cdiv(L, BLOCK_T) + first // BLOCK_T) * channels + c, real, COMPLEX
            )  # fmt: skip
            xr = tl.where((r == 0)[:, None], er[None, :], xr)
            if COMPLEX:
                xi = tl.where((r == 0)[:, None], ei[None, :], xi)
            _, _, hr, hi = _scan(hr, hi, xr, xi, COMPLEX, MARKS, False)
            if MARKS:
                found = (tl.load(marks + t, mask=inside, other=2) == 0)[:, None]
            else:
                found = inside[:, None]
            # conj(h) v
            if COMPLEX:
                yr = tl.where(found, hr * vr + hi * vi, 0.0)
                yi = tl.where(found, hr * vi - hi * vr, 0.0)
            else:
                yr = tl.where(found, hr * vr, 0.0)
                yi = yr
            if CONSTANT:
                sum_r += tl.sum(yr, 0)
                if COMPLEX:
                    sum_i += tl.sum(yi, 0)
            elif SUM:
                _store(da, (b * L + t) * of_row + block, tl.sum(yr, 1), tl.sum(yi, 1), inside, COMPLEX)
            else:
                _store(da, at, yr, yi, mask, COMPLEX)
    if SUMMARY:
        at = (s * rows + b) * channels + c
        _store(local, at, gr, gi, real, COMPLEX)
        _store(through, at, pr, pi, real, COMPLEX)
    else:
        if CONSTANT:
            if SUM:
                _store(da, (s * rows + b) * of_row + block, tl.sum(sum_r, 0), tl.sum(sum_i, 0), True, COMPLEX)
            else:
                _store(da, (s * rows + b) * channels + c, sum_r, sum_i, real, COMPLEX)
        if s == 0:
            _store(dstart, b * channels + c, gr, gi, real, COMPLEX)


# ---- launches --------------------------------------------------------------------------------------------------------


def _parts(t: Tensor | None) -> Tensor | None:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(t) if t is not None and t.is_complex() else t


def _rows(t: Tensor) -> Tensor:
    """The tensor with a dense last axis and no lazy conjugate: a view where that is so."""
    t = t.resolve_conj()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _times(t: Tensor) -> tuple[int, int]:
    """Strides over batch and time, 0 for an axis of size 1 that all share."""
    return 0 if t.shape[0] == 1 else t.stride(0), 0 if t.shape[1] == 1 else t.stride(1)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_conj().contiguous()


def _alternatives(op: str, t: Tensor, channels: int) -> list[Config]:
    """The shipped launch parameters first; then half and twice as many channels, and half and twice as many warps."""
    first = config(op, capability(t), channels, 2 if t.is_complex() else 1)
    found = [first]
    for block in (first["BLOCK_D"] // 2, first["BLOCK_D"], first["BLOCK_D"] * 2):
        for warps in (first["num_warps"], first["num_warps"] * 2):
            other = {**first, "BLOCK_D": max(1, block), "num_warps": warps}
            if other not in found:
                found.append(other)
    return found


def forward(
    a: Tensor, x: Tensor, state: Tensor | None, marks: Tensor | None, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as `statewise::linear_scan_triton`: x (B, L, C), a (B or 1, L or 1, G) with C a multiple of G."""
    rows, L, channels = x.shape
    wide = torch.complex64 if x.is_complex() else torch.float32
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last = torch.empty(rows, channels, dtype=wide, device=x.device)
    tiles = -(-L // TILE)
    bounds = torch.empty(rows, tiles if keep else 0, channels, dtype=wide, device=x.device)
    if h.numel() == 0:
        return h, last.zero_() if state is None else last.copy_(state), bounds
    a, x, state, marks = _rows(a), _rows(x), _dense(state), _dense(marks)
    rep = channels // a.shape[2]
    per_group = rep if rep >= _SHARED else channels
    flags: dict[str, Any] = {
        "MARKS": marks is not None, "COMPLEX": x.is_complex(), "REVERSE": reverse, "BLOCK_T": TILE,
    }  # fmt: skip

    def run(parameters: Config) -> None:
        programs = rows * (channels // per_group) * triton.cdiv(per_group, parameters["BLOCK_D"])
        stretch = stretches(x, programs * parameters["num_warps"], tiles) * TILE
        count = triton.cdiv(L, stretch)
        sizes = (*_times(a), *_times(x), rows, L, channels, per_group, rep, stretch, 1)
        start = state
        if count > 1:
            local, through = torch.empty(2, count, rows, channels, dtype=wide, device=x.device)
            _forward[(programs, count)](
                _parts(a), _parts(x), None, marks, None, None, None, _parts(local), _parts(through), *sizes,
                SUMMARY=True, KEEP=False, HAS_START=False, **flags, **parameters,
            )  # fmt: skip
            start = join(through, local, state)
        _forward[(programs, count)](
            _parts(a), _parts(x), _parts(start), marks, _parts(h), _parts(last), _parts(bounds), None, None, *sizes,
            SUMMARY=False, KEEP=keep, HAS_START=start is not None, **flags, **parameters,
        )  # fmt: skip

    key = ("linear_scan", x.device, x.dtype, rows, L, channels, a.shape)
    tuned(key, _alternatives("linear_scan", x, per_group), run)
    return h, last, bounds


def backward(
    dh: Tensor, dlast: Tensor, a: Tensor, x: Tensor, state: Tensor | None, marks: Tensor | None, bounds: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a, x and state (empty if there is none), in their dtypes."""
    rows, L, channels = x.shape
    wide = torch.complex64 if x.is_complex() else torch.float32
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dstate = x.new_empty(0) if state is None else torch.empty(state.shape, dtype=state.dtype, device=x.device)
    if x.numel() == 0:
        nothing = torch.zeros(a.shape, dtype=a.dtype, device=a.device)
        return nothing, dx, dstate if state is None else dstate.copy_(dlast)
    shape, kind = a.shape, a.dtype
    a, x, dh, marks, dlast = _rows(a), _rows(x), _rows(dh), _dense(marks), dlast.to(wide).resolve_conj().contiguous()
    rep, tiles = channels // a.shape[2], -(-L // TILE)
    shared, constant = rep >= _SHARED, a.shape[1] == 1
    per_group = rep if shared else channels
    flags: dict[str, Any] = {
        "MARKS": marks is not None, "COMPLEX": x.is_complex(), "REVERSE": reverse, "BLOCK_T": TILE, "SUM": shared,
        "CONSTANT": constant,
    }  # fmt: skip

    def run(parameters: Config) -> tuple[Tensor, Tensor]:
        blocks = triton.cdiv(per_group, parameters["BLOCK_D"])
        programs = rows * (channels // per_group) * blocks
        stretch = stretches(x, programs * parameters["num_warps"], tiles) * TILE
        count = triton.cdiv(L, stretch)
        sizes = (*_times(dh), *_times(a), *_times(x), rows, L, channels, per_group, rep, stretch, 1)
        behind = dlast
        if count > 1:
            local, through = torch.empty(2, count, rows, channels, dtype=wide, device=x.device)
            _backward[(programs, count)](
                _parts(dh), None, _parts(a), _parts(x), marks, None, None, None, None, _parts(local), _parts(through),
                *sizes, SUMMARY=True, **flags, **parameters,
            )  # fmt: skip
            behind = join(through, local, dlast, reverse=True)
        width = channels // per_group * blocks if shared else channels
        first = (count, rows) if constant else (rows, L)
        da = torch.empty(*first, width, dtype=wide, device=x.device)
        start = torch.empty(rows, channels, dtype=wide, device=x.device)
        _backward[(programs, count)](
            _parts(dh), _parts(behind), _parts(a), _parts(x), marks, _parts(bounds), _parts(dx), _parts(da),
            _parts(start), None, None, *sizes, SUMMARY=False, **flags, **parameters,
        )  # fmt: skip
        if constant:
            da = da.sum(0).unsqueeze(1)
        return da.unflatten(2, (shape[2], -1)).sum(3), start

    key = ("linear_scan_backward", x.device, x.dtype, rows, L, channels, shape)
    da, start = tuned(key, _alternatives("linear_scan_backward", x, per_group), run)
    if state is not None:
        dstate.copy_(start)
    return da.sum_to_size(shape).to(kind), dx, dstate
