"""The definition of `linear_scan` in plain PyTorch."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...segments import Segments

# Up to this length a loop over time takes fewer calls than the two loops of the chunked form.
_SHORT = 16


def align(a: Tensor, ndim: int) -> Tensor:
    """`a` with leading axes of size 1, so that it has `ndim` axes."""
    return a.reshape((1,) * (ndim - a.ndim) + tuple(a.shape))


def per_token(mask: Tensor, ndim: int) -> Tensor:
    """A (B, L) mask with trailing axes of size 1, to stand beside a tensor of `ndim` axes."""
    return mask.reshape(tuple(mask.shape) + (1,) * (ndim - 2))


def scan_order(seg: Segments, reverse: bool) -> Tensor:
    """(B, L) bool: tokens that ignore the state before them: starts of documents, in reverse their last tokens."""
    if not reverse:
        return seg.resets
    beyond = seg.shape[1] + 1
    document = seg.document
    real = document if seg.valid is None else torch.where(seg.valid, document, beyond)
    later = torch.full_like(real, beyond)
    if seg.shape[1] > 1:
        later[:, :-1] = real[:, 1:].flip(1).cummin(1).values.flip(1)
    ends = later != document
    return ends if seg.valid is None else ends & seg.valid


def neutral(a: Tensor, seg: Segments, cut: Tensor | None = None) -> Tensor:
    """`a` (.., L or 1, *channels) where invalid tokens have decay 1 and the tokens of `cut` have decay 0."""
    a = a.expand(*seg.shape, *a.shape[2:])
    if seg.valid is not None:
        a = a.masked_fill(~per_token(seg.valid, a.ndim), 1)
    return a if cut is None else a.masked_fill(per_token(cut, a.ndim), 0)


def linear_scan(
    a: Tensor,
    x: Tensor,
    *,
    state: Tensor | None = None,
    seg: Segments | None = None,
    reverse: bool = False,
    algorithm: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `statewise.ops.linear_scan`; here in any dtype, differentiable any number of times."""
    a = align(a, x.ndim)
    batch, length = x.shape[:2]
    dtype = torch.promote_types(a.dtype, x.dtype)
    state = x.new_zeros(batch, *x.shape[2:], dtype=dtype) if state is None else state.to(dtype)
    if length == 0:
        return a * x, state
    cut = None
    if seg is not None:
        cut = scan_order(seg, reverse)
        a, x = neutral(a, seg, cut), seg.mask(x)
    if reverse:
        a, x, cut = a.flip(1), x.flip(1), None if cut is None else cut.flip(1)
    if algorithm is None:
        algorithm = "chunk" if length > _SHORT else "recurrent"
    h = (_chunk if algorithm == "chunk" else _recurrent)(a, x, state, cut)
    state = h[:, -1]
    if reverse:
        h = h.flip(1)
    return (h if seg is None else seg.mask(h)), state


def _recurrent(a: Tensor, x: Tensor, h: Tensor, cut: Tensor | None) -> Tensor:
    """One step after the other. a (B or 1, L or 1, *channels), x (B, L, *channels), h (B, *channels)."""
    out = []
    for t in range(x.shape[1]):
        kept = (a[:, t] if a.shape[1] > 1 else a[:, 0]) * h
        if cut is not None:
            # A product with 0 would let an infinite or NaN state of the document before pass.
            kept = kept.masked_fill(per_token(cut[:, t : t + 1], x.ndim)[:, 0], 0)
        h = kept + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def _chunk(a: Tensor, x: Tensor, state: Tensor, cut: Tensor | None) -> Tensor:
    """Chunks of about sqrt(L) tokens take their steps side by side, then a loop over chunks hands the state on.

    Only products of decays appear, no quotients and no logarithms, so decays of 0 are as good as any.
    """
    length = x.shape[1]
    size = isqrt(length - 1) + 1
    count = -(-length // size)
    fill = (0, 0) * (x.ndim - 2) + (0, count * size - length)
    x = pad(x, fill).unflatten(1, (count, size))
    timed = a.shape[1] > 1
    a = pad(a, fill, value=1).unflatten(1, (count, size)) if timed else a[:, None]
    if cut is not None:
        cut = pad(cut, (0, count * size - length)).unflatten(1, (count, size))

    def at(q: int) -> Tensor:
        return a[:, :, q] if timed else a[:, :, 0]

    def stop(value: Tensor, q: int) -> Tensor:
        return value if cut is None else value.masked_fill(per_token(cut[:, :, q], value.ndim), 0)

    h, p = x[:, :, 0], stop(at(0), 0)
    local, product = [h], [p]
    for q in range(1, size):
        h, p = stop(at(q) * h, q) + x[:, :, q], stop(at(q) * p, q)
        local.append(h)
        product.append(p)
    h, p = torch.stack(local, 2), torch.stack(product, 2)
    seen = None if cut is None else cut.cumsum(2) > 0

    carried = [state]
    for c in range(count - 1):
        moved = (p[:, c, -1] if p.shape[1] > 1 else p[:, 0, -1]) * carried[-1]
        if seen is not None:
            moved = moved.masked_fill(per_token(seen[:, c, -1:], moved.ndim + 1)[:, 0], 0)
        carried.append(moved + h[:, c, -1])
    extra = p * torch.stack(carried, 1).unsqueeze(2)
    if seen is not None:
        extra = extra.masked_fill(seen.reshape(*seen.shape, *(1,) * (extra.ndim - 3)), 0)
    return (h + extra).flatten(1, 2)[:, :length]


def linear_scan_matrix(a: Tensor, length: int, *, seg: Segments | None = None, reverse: bool = False) -> Tensor:
    """(B or 1, *channels, L, L) from `a` (B or 1, L or 1, *channels)."""
    if seg is not None:
        a = neutral(a, seg, scan_order(seg, reverse))
    if reverse:
        a = a.flip(1)
    a = a.expand(a.shape[0], length, *a.shape[2:]).movedim(1, -1)  # (B, *channels, L)
    at = torch.arange(length, device=a.device)
    after = at > at[:, None]  # [s, t]: the decay of t acts on what came in at s
    paths = torch.where(after, a.unsqueeze(-2), torch.ones((), dtype=a.dtype, device=a.device)).cumprod(-1)
    dense = paths.masked_fill(at < at[:, None], 0).mT
    if reverse:
        dense = dense.flip(-1, -2)
    if seg is not None and seg.valid is not None:
        pair = seg.valid[:, :, None] & seg.valid[:, None, :]
        dense = dense.masked_fill(~pair.reshape(pair.shape[0], *(1,) * (dense.ndim - 3), length, length), 0)
    return dense
