"""GPU kernels of `short_conv`, forward and backward, and the decode step.

Each row is seen as one line: the K-1 inputs of the state, then the valid tokens. A window is then the K places of the
line that end at a token, wherever padding stands; those of another document are left out. One program takes a tile of
places and channels, and reads its windows from the first-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import sigmoid, silu_slope

# Places and channels of a tile: rows of 128 bytes in half precision, 16 numbers a thread (the windows of the backward
# pass fill the registers), and partial sums of weight gradients that are small beside x.
_PLACES, _CHANNELS = 32, 64


@triton.jit
def _places(order, document, at, count, MARKS: tl.constexpr):
    """Which input stands at places `at` of the line (below K-1: the state), its document, and whether there is one."""
    inside = (at >= 0) & (at < count)
    place, own = at.to(tl.int64), tl.zeros_like(at)
    if MARKS:
        place = tl.load(order + at, mask=inside, other=0).to(tl.int64)
        own = tl.load(document + at, mask=inside, other=-1)
    return place, own, inside


@triton.jit
def _inputs(x, state, place, keep, x_l, d, D, BACK: tl.constexpr, STATE: tl.constexpr):
    """(places, channels) of the line in float32, zero where not kept."""
    mask = keep[:, None] & (d < D)[None, :]
    token = place - BACK
    value = tl.load(x + token[:, None] * x_l + d[None, :], mask=mask & (token >= 0)[:, None], other=0.0).to(tl.float32)
    if STATE:
        before = mask & (token < 0)[:, None]
        value += tl.load(state + place[:, None] * D + d[None, :], mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _sums(
    x, w, bias, state, order, document, at, count, x_l, d, D,
    K: tl.constexpr, MARKS: tl.constexpr, STATE: tl.constexpr, BIAS: tl.constexpr, PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """What the convolution gives at places `at`, before the activation."""
    _, own, inside = _places(order, document, at, count, MARKS)
    total = tl.zeros([PLACES, CHANNELS], tl.float32)
    if BIAS:
        total += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        place, other, there = _places(order, document, at - k, count, MARKS)
        tap = tl.load(w + d * K + (K - 1 - k), mask=d < D, other=0.0).to(tl.float32)
        total += _inputs(x, state, place, inside & there & (other == own), x_l, d, D, K - 1, STATE) * tap[None, :]
    return total


@triton.jit
def _forward(
    x, w, bias, state, order, document, counts, y, last, x_b, x_l, L, D,
    K: tl.constexpr, MARKS: tl.constexpr, STATE: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y (B, L, D), dense, where tokens are valid; last (B, K-1, D)."""
    tile, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count = L + K - 1
    x += b * x_b
    y += b * L * D
    if STATE:
        state += b * (K - 1) * D
    if MARKS:
        order += b * count
        document += b * count
        count = tl.load(counts + b)
    at = K - 1 + tile * PLACES + tl.arange(0, PLACES)
    out = _sums(
        x, w, bias, state, order, document, at, count, x_l, d, D, K, MARKS, STATE, BIAS, PLACES, CHANNELS
    )  # fmt: skip
    if SILU:
        out *= sigmoid(out)
    place, _, inside = _places(order, document, at, count, MARKS)
    token = place - (K - 1)
    tl.store(y + token[:, None] * D + d[None, :], out.to(y.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    if tile == 0:
        # The state is the end of the line, as far as it belongs to the document under way.
        slot = tl.arange(0, 8)
        end = tl.where(slot < K - 1, count - (K - 1) + slot, -1)
        source, own, there = _places(order, document, end, count, MARKS)
        if MARKS:
            there = there & (own == tl.load(document + count - 1, mask=count > 0, other=0))
        value = _inputs(x, state, source, there, x_l, d, D, K - 1, STATE)
        to = last + b * (K - 1) * D + slot[:, None] * D + d[None, :]
        tl.store(to, value, mask=(slot < K - 1)[:, None] & (d < D)[None, :])


@triton.jit
def _backward(
    dy, dlast, x, w, bias, state, order, document, counts, dx, dstate, sums, dy_b, dy_l, x_b, x_l, L, D,
    K: tl.constexpr, MARKS: tl.constexpr, STATE: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx (B, L, D), dense, where tokens are valid; dstate (B, K-1, D); sums (tiles, B, K+1, D) for weight and bias.

    An input has a part in the K outputs that follow it; with an activation each of these is computed again, which costs
    less than to write its gradient down in float32 and read it back.
    """
    tile, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count = L + K - 1
    x += b * x_b
    dx += b * L * D
    dy += b * dy_b
    dlast += b * (K - 1) * D
    dstate += b * (K - 1) * D
    sums += (tile * tl.num_programs(2) + b) * (K + 1) * D
    if STATE:
        state += b * (K - 1) * D
    if MARKS:
        order += b * count
        document += b * count
        count = tl.load(counts + b)
    at = tile * PLACES + tl.arange(0, PLACES)
    mine, own, inside = _places(order, document, at, count, MARKS)
    total = tl.zeros([PLACES, CHANNELS], tl.float32)
    for k in tl.static_range(K):
        place, other, there = _places(order, document, at + k, count, MARKS)
        token = place - (K - 1)
        keep = inside & there & (other == own) & (token >= 0)
        slope = tl.load(
            dy + token[:, None] * dy_l + d[None, :], mask=keep[:, None] & (d < D)[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
        if SILU:
            out = _sums(
                x, w, bias, state, order, document, at + k, count, x_l, d, D,
                K, MARKS, STATE, BIAS, PLACES, CHANNELS,
            )  # fmt: skip
            slope *= silu_slope(out, sigmoid(out))
        tap = tl.load(w + d * K + (K - 1 - k), mask=d < D, other=0.0).to(tl.float32)
        total += slope * tap[None, :]
        if k == 0:
            tl.store(sums + K * D + d, tl.sum(slope, 0), mask=d < D)
            for m in tl.static_range(K):
                place, other, there = _places(order, document, at - m, count, MARKS)
                value = _inputs(x, state, place, inside & there & (other == own), x_l, d, D, K - 1, STATE)
                tl.store(sums + (K - 1 - m) * D + d, tl.sum(slope * value, 0), mask=d < D)
    slot = at - (count - (K - 1))
    kept = inside & (slot >= 0)
    if MARKS:
        kept = kept & (own == tl.load(document + count - 1, mask=count > 0, other=0))
    total += tl.load(dlast + slot[:, None] * D + d[None, :], mask=kept[:, None] & (d < D)[None, :], other=0.0)
    token = mine - (K - 1)
    to = dx + token[:, None] * D + d[None, :]
    tl.store(to, total.to(dx.dtype.element_ty), mask=(inside & (token >= 0))[:, None] & (d < D)[None, :])
    to = dstate + mine[:, None] * D + d[None, :]
    tl.store(to, total, mask=(inside & (token < 0))[:, None] & (d < D)[None, :])


@triton.jit
def _decode(
    x, w, bias, state, y, new, x_b, D,
    K: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, STATE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One token: x, y (B, D); state, new (B, K-1, D)."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = d < D
    total = tl.zeros([CHANNELS], tl.float32)
    if BIAS:
        total += tl.load(bias + d, mask=real, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        value = tl.zeros([CHANNELS], tl.float32)
        if j == K - 1:
            value = tl.load(x + b * x_b + d, mask=real, other=0.0).to(tl.float32)
        elif STATE:
            value = tl.load(state + (b * (K - 1) + j) * D + d, mask=real, other=0.0).to(tl.float32)
        total += value * tl.load(w + d * K + j, mask=real, other=0.0).to(tl.float32)
        if j > 0:
            tl.store(new + (b * (K - 1) + j - 1) * D + d, value, mask=real)
    if SILU:
        total *= sigmoid(total)
    tl.store(y + b * D + d, total.to(y.dtype.element_ty), mask=real)


# ---- launches --------------------------------------------------------------------------------------------------------


def _lines(marks: Tensor, back: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order (B, K-1+L) of inputs in the line, the document of each place, and how many places (B,) are taken."""
    rows, L = marks.shape
    wide = torch.nn.functional.pad(marks, (back, 0))
    valid, document = wide != 2, (wide == 1).cumsum(1)
    rank = valid.cumsum(1)
    total = back + L
    at = torch.arange(total, device=marks.device).expand(rows, total)
    # Padding goes to one place behind the line, which is cut off.
    order = torch.zeros(rows, total + 1, dtype=torch.int64, device=marks.device)
    order = order.scatter(1, torch.where(valid, rank - 1, total), at)[:, :total]
    return order.int().contiguous(), document.gather(1, order).int(), rank[:, -1].int()


def _tile(length: int) -> int:
    return min(_PLACES, max(16, triton.next_power_of_2(length)))


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y (B, L, D) in x's dtype, and the state (B, K-1, D) in float32."""
    rows, L, D = x.shape
    K = weight.shape[1]
    # Invalid positions are written by no program.
    y = (torch.empty if marks is None else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
    last = torch.empty(rows, K - 1, D, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, last.zero_() if state is None else last.copy_(state)
    x = x if x.stride(-1) == 1 else x.contiguous()
    order, document, count = (None, None, None) if marks is None else _lines(marks, K - 1)
    places = _tile(L)
    _forward[(-(-L // places), -(-D // _CHANNELS), rows)](
        x, weight.contiguous(), _dense(bias), _dense(state), order, document, count, y, last,
        x.stride(0), x.stride(1), L, D, K=K, MARKS=marks is not None, STATE=state is not None, BIAS=bias is not None,
        SILU=silu, PLACES=places, CHANNELS=_CHANNELS, num_warps=4,
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
    """Gradients of x, weight, bias and state, each in its dtype; empty where there is no such input."""
    rows, L, D = x.shape
    K = weight.shape[1]
    dx = (torch.empty if marks is None else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
    dstate = torch.empty(rows, K - 1, D, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return (
            dx,
            torch.zeros_like(weight),
            x.new_empty(0) if bias is None else torch.zeros_like(bias),
            x.new_empty(0) if state is None else dstate.copy_(dlast).to(state.dtype),
        )
    x = x if x.stride(-1) == 1 else x.contiguous()
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    order, document, count = (None, None, None) if marks is None else _lines(marks, K - 1)
    places = min(_tile(L + K - 1), _PLACES if K <= 4 else 16)
    tiles = -(-(L + K - 1) // places)
    sums = torch.empty(tiles, rows, K + 1, D, dtype=torch.float32, device=x.device)
    _backward[(tiles, -(-D // _CHANNELS), rows)](
        dy, dlast.float().contiguous(), x, weight.contiguous(), _dense(bias), _dense(state), order, document, count,
        dx, dstate, sums, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), L, D,
        K=K, MARKS=marks is not None, STATE=state is not None, BIAS=bias is not None, SILU=silu,
        PLACES=places, CHANNELS=_CHANNELS, num_warps=4,
    )  # fmt: skip
    total = sums.sum((0, 1))
    return (
        dx,
        total[:K].t().contiguous().to(weight.dtype),
        x.new_empty(0) if bias is None else total[K].to(bias.dtype, copy=True),
        x.new_empty(0) if state is None else dstate.to(state.dtype),
    )


def step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """One token: x (B, D), state (B, K-1, D) or None."""
    rows, D = x.shape
    K = weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new = torch.empty(rows, K - 1, D, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, new
    x = x if x.stride(-1) == 1 else x.contiguous()
    channels = 256
    _decode[(rows, -(-D // channels))](
        x, weight.contiguous(), _dense(bias), _dense(state), y, new, x.stride(0), D,
        K=K, BIAS=bias is not None, SILU=silu, STATE=state is not None, CHANNELS=channels, num_warps=4,
    )  # fmt: skip
    return y, new
