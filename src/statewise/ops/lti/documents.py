"""Rows with padding and several documents, for forms that know neither."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...segments import Segments
from .reference import lags


def compact(seg: Segments) -> tuple[Tensor | None, Tensor]:
    """An order of each row that puts padding first, and the documents (B, L) in that order."""
    document = seg.document
    if seg.valid is None:
        return None, document
    order = torch.argsort(seg.valid.to(torch.uint8), dim=1, stable=True)
    return order, torch.where(seg.valid, document, 0).gather(1, order)


def place(y: Tensor, seg: Segments) -> Tensor:
    """What an incoming state adds to its next tokens, y (B, L, D), brought to where those tokens are in the row."""
    if seg.valid is not None:
        rank = (seg.valid.long().cumsum(1) - 1).clamp(min=0)
        y = y.gather(1, rank.unsqueeze(-1).expand_as(y))
    return seg.mask(y).masked_fill((seg.document > 0).unsqueeze(-1), 0)


def count(seg: Segments) -> Tensor:
    """Valid tokens of each row, (B,)."""
    return seg.position.new_full(seg.shape[:1], seg.shape[1]) if seg.valid is None else seg.valid.sum(1)


def length(what: str, length: int | None, seg: Segments | None) -> int:
    """L of the matrix of a time-invariant system, from either of two arguments."""
    if length is None and seg is None:
        raise ValueError(f"{what}: length: want L, since a time-invariant system does not tell it, got None")
    if length is not None and seg is not None and seg.shape[1] != length:
        raise ValueError(f"{what}: length: seg has {seg.shape[1]} tokens, got length={length}")
    return length if length is not None else seg.shape[1]  # type: ignore[union-attr]


def toeplitz(kernel: Tensor, D: Tensor | None, seg: Segments | None, future: Tensor | None = None) -> Tensor:
    """The matrices [t, s] of a convolution with kernel (D, L) and skip weight D: (1 or B, D, L, L).

    Args:
        future: (D, F), taps over later positions, the first one on the next.
    """
    lag, seen = lags(kernel.shape[-1], seg, kernel.device)
    dense = (kernel[:, lag] * seen).transpose(0, 1)
    if D is not None:
        diagonal = torch.diag_embed(torch.diagonal(seen, dim1=1, dim2=2).to(kernel.dtype))
        dense = dense + D.to(kernel.dtype)[:, None, None] * diagonal.unsqueeze(1)
    if future is not None:
        # With a zero for the present position.
        dense = dense + toeplitz(taps(F.pad(future, (1, 0)), kernel.shape[-1]), None, seg).mT
    return dense


def taps(kernel: Tensor, length: int) -> Tensor:
    """The first `length` taps, and zeros where there are not so many."""
    return F.pad(kernel[:, :length], (0, max(length - kernel.shape[1], 0)))
