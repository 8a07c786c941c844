"""Masks, positions and the key-value cache of `attention`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...segments import Segments, readable
from ...state import exportable
from .._checks import known, undecided

# Queries that are attended with at a time, at least, where not all keys are in sight.
QUERIES = 256


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
        rank: (B, L) int64 in that order, positions counted in valid tokens of the document; None if they are 0, 1, ...
            in every row, or not wanted.
    """

    order: Tensor | None
    filled: Tensor | None
    document: Tensor | None
    valid: Tensor | None
    rank: Tensor | None


def layout(seg: Segments | None, ranked: bool = False) -> Layout:
    """
    Args:
        ranked: whether `rank` is wanted.
    """
    if seg is None:
        return Layout(None, None, None, None, None)
    rank = ranks(seg.position.new_zeros(seg.shape[0]), seg)[0] if ranked and seg.shape[1] else None
    if seg.valid is None:
        return Layout(None, None, seg.document, None, rank)
    if _behind(seg.valid):
        return Layout(None, seg.valid.sum(1, keepdim=True), seg.document, seg.valid, rank)
    order = torch.argsort((~seg.valid).to(torch.uint8), dim=1, stable=True)
    rank = None if rank is None else rank.gather(1, order)
    return Layout(
        order, seg.valid.sum(1, keepdim=True), seg.document.gather(1, order), seg.valid.gather(1, order), rank
    )


def _behind(valid: Tensor) -> bool:
    """Whether all padding stands at the end of its row. Asked only where the answer costs no wait for a device."""
    return readable(valid) and bool((valid[:, 1:] <= valid[:, :-1]).all())


def reorder(x: Tensor, order: Tensor | None) -> Tensor:
    """x (B, L, H, P) with its tokens in the given order."""
    return x if order is None else x.gather(1, order[:, :, None, None].expand_as(x))


def restore(x: Tensor, order: Tensor | None) -> Tensor:
    """Undo `reorder`."""
    return x if order is None else torch.zeros_like(x).scatter(1, order[:, :, None, None].expand_as(x), x)


class Sight(NamedTuple):
    """Which keys of its document a query sees; see `attention`."""

    causal: bool
    window: int | None
    block: int | None


Range = tuple[int, int]


def _step(sight: Sight, length: int) -> int | None:
    """Queries to attend with at a time; None for all. With blocks it is a whole number of them."""
    if sight.window is not None:
        if known(sight.window >= length):
            return None
        step = max(sight.window // 4, QUERIES)  # the shorter it is, the fewer keys are looked at and masked
    elif sight.block is not None:
        step = -(-QUERIES // sight.block) * sight.block
    else:
        return None
    # A program for many lengths takes all of them at once.
    return None if undecided(length, step + 1) or length <= step else step


def stretches(sight: Sight, held: int, length: int, packed: bool) -> list[tuple[Range, Range]]:
    """Queries, and where the keys stand that they may see, among `held` cached ones and `length` new ones.

    Where not all keys are in sight, no stretch is long, so memory grows with the length and not with its square.

    Args:
        packed: a document may begin anywhere in a row, and so may a block.
    """
    step = _step(sight, length)
    if step is None:
        return [((0, length), (0, held + length))]
    if sight.block is None:
        back, ahead = sight.window - 1, 0  # type: ignore[operator]
    else:
        back = ahead = 2 * sight.block - 1 if packed else sight.block
    found = []
    for lo in range(0, length, step):
        hi = min(lo + step, length)
        found.append(((lo, hi), (max(0, held + lo - back), min(held + length, held + hi + ahead))))
    return found


def all_seen(sight: Sight, length: int) -> bool:
    """Whether queries see all keys of their stretch (or, if causal, all up to their own), one document a row."""
    if sight.block is not None:
        return _step(sight, length) == sight.block or known(length <= 2 * sight.block)
    return sight.window is None or known(sight.window >= length)


def mask(
    sight: Sight,
    queries: Range,
    keys: Range,
    cached: Tensor | None,
    where: Layout,
    device: torch.device,
) -> Tensor:
    """(B or 1, queries, keys) bool: True where a query may see a key. Keys are counted from the first cached one.

    A query always sees its own key: the rows of padding would otherwise be empty, and their softmax not a number.
    """
    held, (lo, hi), (first, last) = 0 if cached is None else cached.shape[1], queries, keys
    key = torch.arange(first, last, device=device)
    query = torch.arange(held + lo, held + hi, device=device)[:, None]
    seen = (key <= query if sight.causal else torch.ones_like(key <= query))[None]
    if sight.window is not None:
        seen = seen & (query - key < sight.window)
    if sight.block is not None:
        rank = torch.arange(last, device=device)[None] if where.rank is None else where.rank
        block = rank // sight.block
        seen = seen & ((block[:, lo:hi, None] - block[:, None, first:last]).abs() <= 1)
    if where.document is not None:
        document = where.document
        before = document.new_zeros(document.shape[0], held)
        seen = seen & (document[:, lo:hi, None] == torch.cat([before, document], 1)[:, None, first:last])
    if held or where.valid is not None:
        length = hi if where.valid is None else where.valid.shape[1]
        batch = (where.valid if cached is None else cached).shape[0]  # type: ignore[union-attr]
        parts = [] if cached is None else [cached]
        parts.append(torch.ones(batch, length, dtype=torch.bool, device=device) if where.valid is None else where.valid)
        seen = seen & torch.cat(parts, 1)[:, None, first:last]
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
