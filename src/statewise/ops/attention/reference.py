"""Masks, positions and the key-value cache of `attention`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...segments import Segments
from ...state import exportable
from .._checks import undecided


@exportable
class KVState(NamedTuple):
    """A cache of keys and values that grows with each call. The newest key stands at the end of axis 1.

    Args:
        k, v: (B, T, Hk, P).
        live: (B, T) bool, True for keys of the document under way. Unused slots stand on the left.
        position: (B,) int64, the position that the next token of the row's document will have.
    """

    k: Tensor
    v: Tensor
    live: Tensor
    position: Tensor


@exportable
class KVBuffer(NamedTuple):
    """As `KVState`, but T stays what it is: what is pushed out on the left must not be needed any more."""

    k: Tensor
    v: Tensor
    live: Tensor
    position: Tensor


class Layout(NamedTuple):
    """Where the tokens of a call stand among the keys.

    Args:
        order: (B, L) int64 that moves valid tokens to the front of each row, or None if they stand there already.
        filled: (B, 1) int64, valid tokens of each row, or None if all are.
        document: (B, L) int64 in that order, or None if every row is one document.
        valid: (B, L) bool in that order, or None.
    """

    order: Tensor | None
    filled: Tensor | None
    document: Tensor | None
    valid: Tensor | None


def layout(seg: Segments | None) -> Layout:
    if seg is None:
        return Layout(None, None, None, None)
    if seg.valid is None:
        return Layout(None, None, seg.document, None)
    order = torch.argsort((~seg.valid).to(torch.uint8), dim=1, stable=True)
    return Layout(order, seg.valid.sum(1, keepdim=True), seg.document.gather(1, order), seg.valid.gather(1, order))


def reorder(x: Tensor, order: Tensor | None) -> Tensor:
    """x (B, L, H, P) with its tokens in the given order."""
    return x if order is None else x.gather(1, order[:, :, None, None].expand_as(x))


def restore(x: Tensor, order: Tensor | None) -> Tensor:
    """Undo `reorder`."""
    return x if order is None else torch.zeros_like(x).scatter(1, order[:, :, None, None].expand_as(x), x)


def mask(
    length: int, cached: Tensor | None, where: Layout, *, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """(B or 1, L, T + L) bool: True where a query may see a key.

    A query always sees its own key: the rows of padding would otherwise be empty, and their softmax not a number.
    """
    held = 0 if cached is None else cached.shape[1]
    key = torch.arange(held + length, device=device)
    query = torch.arange(held, held + length, device=device)[:, None]
    seen = (key <= query if causal else torch.ones_like(key <= query))[None]
    if window is not None:
        seen = seen & (query - key < window)
    if where.document is not None:
        document = where.document
        before = document.new_zeros(document.shape[0], held)
        seen = seen & (document[:, :, None] == torch.cat([before, document], 1)[:, None, :])
    if held or where.valid is not None:
        batch = (where.valid if cached is None else cached).shape[0]  # type: ignore[union-attr]
        parts = [] if cached is None else [cached]
        parts.append(torch.ones(batch, length, dtype=torch.bool, device=device) if where.valid is None else where.valid)
        seen = seen & torch.cat(parts, 1)[:, None, :]
    return seen | (key == query)


def ranks(position: Tensor, seg: Segments) -> tuple[Tensor, Tensor]:
    """(B, L) positions counted in valid tokens, and the (B,) position that comes next."""
    valid = torch.ones_like(seg.resets) if seg.valid is None else seg.valid
    before = valid.long().cumsum(1) - valid.long()  # valid tokens of the row ahead of this one
    start = torch.where(seg.resets, before, 0).cummax(1).values
    fresh = seg.document > 0
    first = position[:, None]
    at = torch.where(fresh, before - start, before + first)
    end = at[:, -1] + valid[:, -1].long()
    return at, end


def append(state: KVState | KVBuffer, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Cached keys and values followed by new ones, in `dtype` (None: that of the cache)."""
    dtype = state.k.dtype if dtype is None else dtype
    k, v = k.to(dtype), v.to(dtype)
    if state.k.shape[1] == 0:
        return k, v
    return torch.cat([state.k.to(dtype), k], 1), torch.cat([state.v.to(dtype), v], 1)


def push(
    state: KVState | KVBuffer,
    line: tuple[Tensor, Tensor],
    where: Layout,
    length: int,
    position: Tensor,
    window: int | None,
) -> tuple[KVState | KVBuffer, Tensor]:
    """The cache after a call, and (B, n) bool: which of the slots that fell off on the left were still needed.

    `line` is what `append` gave for the `length` new keys and values in the order of `where`.
    """
    (keys, values), device = line, line[0].device
    batch, held = keys.shape[0], state.k.shape[1]
    total = held + length
    fixed = isinstance(state, KVBuffer)
    room = held if fixed else total if window is None else min(total, window - 1)
    new = torch.ones(batch, length, dtype=torch.bool, device=device) if where.valid is None else where.valid
    valid = torch.cat([state.live, new], 1)
    if where.document is not None and length:
        current = where.document.amax(1, keepdim=True)  # ids only grow, so the last document has the largest
        valid = valid & (
            torch.cat([torch.zeros_like(state.position)[:, None].expand(-1, held), where.document], 1) == current
        )
    if where.filled is not None:
        # Invalid tokens stand at the end: move every row to the right by as many.
        at = torch.arange(total, device=device) - (length - where.filled)
        valid = valid.gather(1, at.clamp(min=0)) & (at >= 0)
        at = at.clamp(min=0)[:, :, None, None]
        keys, values = keys.gather(1, at.expand_as(keys)), values.gather(1, at.expand_as(values))
    if not fixed and window is not None and undecided(total, window - 1):
        # A program for many lengths always keeps as many slots as the window asks for: unused ones stand on the left.
        room = window - 1
        keys, values = pad(keys, (0, 0, 0, 0, room, 0)), pad(values, (0, 0, 0, 0, room, 0))
        valid, total = pad(valid, (room, 0)), total + room
    lost = valid[:, : total - room] if fixed else valid[:, :0]
    if fixed and window is not None:
        # The next query sees the last window - 1 of these slots.
        lost = lost[:, max(0, total - (window - 1)) :]
    keys, values, valid = keys[:, total - room :], values[:, total - room :], valid[:, total - room :]
    if where.document is not None:
        gone = ~valid[:, :, None, None]
        keys, values = keys.masked_fill(gone, 0), values.masked_fill(gone, 0)
    return type(state)(keys, values, valid, position), lost
