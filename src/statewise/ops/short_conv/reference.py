"""The definition of `short_conv` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...segments import Segments


def _tokens(mask: Tensor) -> Tensor:
    return mask.unsqueeze(-1)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    state: Tensor | None = None,
    seg: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """See `statewise.ops.short_conv`; here in any dtype, differentiable any number of times."""
    batch, length, width = x.shape
    back = weight.shape[1] - 1
    if state is None:
        state = x.new_zeros(batch, back, width)
    order, document, count = None, None, None
    if seg is not None:
        x, document = seg.mask(x), seg.document
        if seg.valid is not None:
            # Padding in the middle must not enter a window: move the valid tokens of a row to its front.
            order = torch.argsort((~seg.valid).to(torch.uint8), dim=1, stable=True)
            count = seg.valid.sum(1, keepdim=True)
            x = x.gather(1, _tokens(order).expand_as(x))
            document = document.gather(1, order)
        document = torch.cat([document.new_zeros(batch, back), document], 1)
    line = torch.cat([state, x], 1)
    y = _taps(line, weight, document, length)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = silu(y)
    if order is not None:
        y = torch.zeros_like(y).scatter(1, _tokens(order).expand_as(y), y)
    return (y if seg is None else seg.mask(y)), _window(line, document, count, length, back)


def _taps(line: Tensor, weight: Tensor, document: Tensor | None, length: int) -> Tensor:
    """Sum over the window. line (B, K-1+L, D): state, then tokens; document (B, K-1+L) or None."""
    back = weight.shape[1] - 1
    y = line[:, back:] * weight[:, back]
    for k in range(1, back + 1):
        past = line[:, back - k : back - k + length]
        if document is not None:
            foreign = document[:, back - k : back - k + length] != document[:, back:]
            past = past.masked_fill(_tokens(foreign), 0)
        y = y + past * weight[:, back - k]
    return y


def _window(line: Tensor, document: Tensor | None, count: Tensor | None, length: int, back: int) -> Tensor:
    """The last `back` tokens of the document that is under way at the end: (B, K-1, D)."""
    if count is None:
        state = line[:, length:]
        if document is None:
            return state
        kept = document[:, length:]
    else:
        at = count + torch.arange(back, device=line.device)
        state = line.gather(1, _tokens(at).expand(-1, -1, line.shape[2]))
        kept = document.gather(1, at)  # type: ignore[union-attr]
    if back == 0 or document is None:
        return state
    return state.masked_fill(_tokens(kept != kept[:, -1:]), 0)


def short_conv_matrix(weight: Tensor, length: int, *, seg: Segments | None = None) -> Tensor:
    """(B or 1, D, L, L) from weight (D, K)."""
    width = weight.shape[1]
    at = torch.arange(length, device=weight.device)[None]
    if seg is not None and seg.valid is not None:
        at = seg.valid.cumsum(1) - 1
    lag = at[:, :, None] - at[:, None, :]  # (B, t, s): valid tokens from s to t
    inside = (lag >= 0) & (lag < width)
    if seg is not None:
        document = seg.document
        inside = inside & (document[:, :, None] == document[:, None, :])
        if seg.valid is not None:
            inside = inside & seg.valid[:, :, None] & seg.valid[:, None, :]
    tap = (width - 1 - lag).clamp(0, width - 1)
    dense = weight[:, tap].movedim(0, 1)
    return dense.masked_fill(~inside[:, None], 0)
