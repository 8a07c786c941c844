"""What transformers passes beside the tokens, as one Segments."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..segments import Segments

# What data collators pass along for attention kernels and what other models take; it says nothing more about segments.
IGNORED = frozenset({"cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position", "token_type_ids"})


def segments(
    batch: int,
    length: int,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    seen: int = 0,
    fresh: bool = True,
    device: torch.device | None = None,
) -> Segments | None:
    """Documents and padding of a (batch, length) input; None if each row is one stretch of one document.

    Args:
        attention_mask: (B, length), or (B, seen + length) as `generate` passes it; zero marks padding, on any side.
        position_ids: (B, length) or (1, length); 0 begins a document.
        seq_idx: (B, length), the document of each token; a change begins one, a negative number is padding. Goes before
            position_ids.
        cu_seq_lens: (n + 1,), where the documents of a single row begin, and where the last one ends. Goes before both.
        seen: positions before these.
        fresh: rows begin a document unless something was seen; False: they go on with what the state holds.
        device: of the tokens.

    Raises:
        ValueError: shapes that do not fit; the message names the argument.
    """
    valid = None if attention_mask is None else _valid(attention_mask, batch, length, seen)
    begins = None  # (B, length) bool: a document begins here
    if cu_seq_lens is not None:
        begins = _begins_at(cu_seq_lens, batch, length)
    elif seq_idx is not None:
        _want("seq_idx", seq_idx, {(batch, length)})
        begins = torch.ones_like(seq_idx, dtype=torch.bool)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        begins[:, 0] = seen == 0
        if bool((seq_idx < 0).any()):
            valid = (seq_idx >= 0) if valid is None else valid & (seq_idx >= 0)
    elif position_ids is not None:
        _want("position_ids", position_ids, {(batch, length), (1, length)})
        begins = (position_ids == 0).expand(batch, length)
        if valid is not None:
            begins = begins & valid
        if seen == 0:
            # Counted from elsewhere, or a row that begins with padding: what comes first has nothing before it.
            first = torch.ones_like(begins) if valid is None else valid
            begins = begins | ((first.cumsum(1) == 1) & first)
    if valid is not None and bool(valid.all()):
        valid = None
    if begins is not None and not bool(begins[:, 1:].any()) and (seen == 0 or not bool(begins.any())):
        begins = None
    if valid is None and begins is None:
        return None
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    if begins is None:
        begins = torch.zeros_like(valid)
        begins[:, 0] = seen == 0
    begins, valid = begins.to(device), valid.to(device)
    if not fresh:
        later = begins & (begins.cumsum(1) > 1)
        if bool(later.any()):
            raise ValueError(
                "a row of several documents cannot begin with a tuned state: it would serve the first one only"
            )
        begins = later
    # Positions are counted in valid tokens, so that padding at the start of a document does not hide its beginning.
    before = valid.long().cumsum(1) - valid.long()
    base = torch.where(begins, before, 0).cummax(1).values
    going_on = (begins.cumsum(1) == 0).long()
    return Segments(before - base + going_on, None if bool(valid.all()) else valid)


def _want(name: str, t: Any, shapes: set[tuple[int, ...]]) -> None:
    if not isinstance(t, Tensor) or tuple(t.shape) not in shapes:
        got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{name}: want shape {' or '.join(str(s) for s in sorted(shapes))}, got {got}")


def _valid(mask: Tensor, batch: int, length: int, seen: int) -> Tensor:
    _want("attention_mask", mask, {(batch, length), (batch, seen + length)})
    return mask[:, mask.shape[1] - length :] != 0


def _begins_at(cu_seq_lens: Tensor, batch: int, length: int) -> Tensor:
    places = torch.as_tensor(cu_seq_lens).flatten().tolist()
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q: want one packed row, got a batch of {batch}; use seq_idx or position_ids")
    if places[0] != 0 or places[-1] != length or any(a > b for a, b in pairwise(places)):
        raise ValueError(f"cu_seq_lens_q: want places from 0 up to the length {length}, got {places[:8]}")
    begins = torch.zeros(1, length + 1, dtype=torch.bool)
    begins[0, places] = True
    return begins[:, :length]
