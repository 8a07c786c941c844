"""`diagonal_ssm` where all channels share their modes: one table of powers (L, N) serves kernel, carry and last state.

With many modes (DLR has 1024 and more) the forms for modes of each channel's own spend nearly all of their time on
chunk states (B, L / 64, D, N), and hold them for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...segments import Segments
from .. import _deterministic
from .._precision import no_autocast
from . import _FEW, diagonal_ssm, lti_conv, modes


def shared_ssm(
    u: Tensor, log_a: Tensor, c: Tensor, D: Tensor, *, state: Tensor | None = None, seg: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a) h_{t-1} + u_t and y_t = Re(sum_n c_n h_tn) + D u_t in each channel.

    Args:
        u: (B, L, D), real.
        log_a: (N,), complex, natural log of the factor per step; c: (D, N), complex. D: (D,), real.
        state, seg: as in `ops.diagonal_ssm`.

    Returns:
        y (B, L, D) in the dtype of u and the state (B, D, N). Memory grows as L (N + D), not as L N D.
    """
    L = u.shape[1]
    if torch.compiler.is_compiling() or _deterministic.active() or L <= _FEW:
        b = torch.ones_like(c)
        return diagonal_ssm(u, log_a.expand_as(c), b, c, D, conjugate=False, state=state, seg=seg)
    with no_autocast(u):
        v = u.to(D.dtype) if seg is None else seg.mask(u.to(D.dtype))
        a = modes.all_powers(log_a.unsqueeze(0), L + 1).squeeze(0)  # (L + 1, N)
        read = modes.dot_parts(a)
        y = lti_conv(v, modes.parts(c) @ read[:-1].mT, D, seg=seg)
        last = _at_the_end(v, seg).mT @ modes.parts(a[:-1].flip(0))
        last = modes.whole(last)
        if state is not None:
            h = (state if seg is None else seg.forget(state)).to(c.dtype)
            late = (modes.parts(c * h) @ read[1:].mT).mT
            y = y + (late if seg is None else _placed(late, seg))
            last = last + _aged(h, a, seg)
    return y.to(u.dtype), last


def _at_the_end(v: Tensor, seg: Segments | None) -> Tensor:
    """v (B, L, D) with the tokens of each row's last document moved to the end, and zeros before them."""
    if seg is None:
        return v
    document = seg.document
    keep = document == document[:, -1:]
    if seg.valid is not None:
        keep = keep & seg.valid
    order = torch.argsort(keep.to(torch.uint8), dim=1, stable=True).unsqueeze(-1)
    return v.masked_fill(~keep.unsqueeze(-1), 0).gather(1, order.expand_as(v))


def _placed(late: Tensor, seg: Segments) -> Tensor:
    """What the state adds after 0, 1, ... valid tokens, (B, L, D), at the tokens of the document under way."""
    if seg.valid is not None:
        rank = (seg.valid.long().cumsum(1) - 1).clamp(min=0)
        late = late.gather(1, rank.unsqueeze(-1).expand_as(late))
    return seg.mask(late).masked_fill((seg.document > 0).unsqueeze(-1), 0)


def _aged(h: Tensor, a: Tensor, seg: Segments | None) -> Tensor:
    """The state (B, D, N) after the row: a power for each valid token, nothing where a document begins."""
    if seg is None:
        return a[-1] * h
    count = seg.position.new_full(seg.shape[:1], seg.shape[1]) if seg.valid is None else seg.valid.sum(1)
    return (a[count].unsqueeze(1) * h).masked_fill(seg.resets.any(1)[:, None, None], 0)
