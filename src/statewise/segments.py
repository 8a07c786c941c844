"""One object for packing, padding and resets.

Every op and mixer takes `seg: Segments | None`. `None` means that each row is one stretch of a single document:
all positions are valid and the row continues from whatever state it was given (zeros, if none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._tracing import untraced

# Values of `Segments.marks`, the form in which kernels see a Segments.
CONTINUE, RESET, INVALID = 0, 1, 2


def readable(*tensors: Tensor) -> bool:
    """Whether a number of these may be asked for at no cost: ordinary tensors on CPU, nothing that traces or replaces.

    Not for what is computed, only for how: a program that is traced must not depend on the answer.
    """
    return untraced() and all(type(t) is Tensor and t.is_cpu for t in tensors)


@dataclass(frozen=True)
class Segments:
    """Where documents begin and which positions are padding.

    Args:
        position: (B, L) integer, index of each token in its own document. A valid token at position 0 starts a
            document: it ignores the incoming state. A document that continues from an earlier chunk goes on at
            a position > 0 and uses the state.
        valid: (B, L) bool, or None when every position is valid. An invalid position leaves the state as it is
            (the identity transition) and its output is zero.

    Build one with `Segments.pack`, `Segments.from_lengths`, `Segments.from_valid` or `Segments.from_documents`.
    """

    position: Tensor
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.position.ndim != 2 or self.position.dtype.is_floating_point or self.position.dtype == torch.bool:
            raise ValueError(
                f"position: want an integer tensor (B, L), got {self.position.dtype} {tuple(self.position.shape)}"
            )
        if self.valid is None:
            return
        if self.valid.dtype != torch.bool or self.valid.shape != self.position.shape:
            raise ValueError(
                f"valid: want a bool tensor {tuple(self.position.shape)} like position, "
                f"got {self.valid.dtype} {tuple(self.valid.shape)}"
            )
        if self.valid.device != self.position.device:
            raise ValueError(f"valid is on {self.valid.device} but position on {self.position.device}")

    # ---- builders ----------------------------------------------------------------------------------------------

    @classmethod
    def pack(cls, lengths: Sequence[Sequence[int]], *, total: int | None = None, device=None) -> Segments:
        """Documents laid end to end in each row; what is left of a row is padding on the right.

        Args:
            lengths: for each row, the lengths of its documents, e.g. `[[3, 5], [8]]`.
            total: L; the longest row if None.
        """
        for b, row in enumerate(lengths):
            if min(row, default=0) < 0:
                raise ValueError(f"lengths: want non-negative lengths, got {min(row)} in row {b}")
        need = max((sum(row) for row in lengths), default=0)
        total = need if total is None else total
        if total < need:
            raise ValueError(f"total: the longest row holds {need} tokens, which does not fit in total={total}")
        position = torch.zeros(len(lengths), total, dtype=torch.int64)
        valid = torch.zeros(len(lengths), total, dtype=torch.bool)
        for b, row in enumerate(lengths):
            at = 0
            for length in row:
                position[b, at : at + length] = torch.arange(length)
                at += length
            valid[b, :at] = True
        full = bool(valid.all())
        return cls(position.to(device), None if full else valid.to(device))

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, total: int | None = None, *, side="right", device=None):
        """One document a row, padded on `side` ("left" or "right") to `total` positions."""
        if side not in ("left", "right"):
            raise ValueError(f"side: want 'left' or 'right', got {side!r}")
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        if lengths.numel() and int(lengths.min()) < 0:
            raise ValueError(f"lengths: want non-negative lengths, got {int(lengths.min())}")
        total = int(lengths.max()) if total is None and lengths.numel() else total or 0
        if lengths.numel() and int(lengths.max()) > total:
            raise ValueError(f"total: a row of {int(lengths.max())} tokens does not fit in total={total}")
        at = torch.arange(total)[None].expand(len(lengths), total)
        start = total - lengths[:, None] if side == "left" else torch.zeros_like(lengths)[:, None]
        valid = (at >= start) & (at < start + lengths[:, None])
        return cls((at - start).clamp(min=0).to(device), valid.to(device))

    @classmethod
    def from_valid(cls, valid: Tensor, *, start: Tensor | int = 0) -> Segments:
        """From an attention mask (B, L), True (or non-zero) where a token is real; one document a row.

        `start` is the position of each row's first valid token: 0 begins a document, anything else continues one.
        """
        valid = valid.bool()
        start = torch.as_tensor(start, device=valid.device).reshape(-1, 1)
        return cls((valid.long().cumsum(1) - 1 + start).clamp(min=0), valid)

    @classmethod
    def from_documents(cls, document: Tensor) -> Segments:
        """From document ids (B, L): a change of id starts a new document, a negative id is padding."""
        valid = document >= 0
        at = torch.arange(document.shape[1], device=document.device).expand_as(document)
        starts = torch.ones_like(valid)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        begin = torch.where(starts, at, 0).cummax(1).values
        return cls((at - begin).long(), None if bool(valid.all()) else valid)

    @classmethod
    def continuing(cls, batch: int, length: int, *, start: int = 1, device=None) -> Segments:
        """Rows that go on with a document from position `start` on; `start=0` begins one."""
        return cls((torch.arange(length, device=device) + start).expand(batch, length), None)

    @classmethod
    def from_marks(cls, marks: Tensor | None) -> Segments | None:
        """A Segments with these `marks` (B, L); None for None."""
        if marks is None:
            return None
        valid = marks != INVALID
        rank = valid.long().cumsum(1)  # 1 at the first valid token, so that one which is not reset continues
        return cls(rank - torch.where(marks == RESET, rank, 0).cummax(1).values, valid)

    # ---- what ops read -----------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self.position.shape

    @property
    def resets(self) -> Tensor:
        """(B, L) bool: a document begins here, so the incoming state is ignored."""
        start = self.position == 0
        return start if self.valid is None else start & self.valid

    @property
    def right_padded(self) -> bool:
        """Each row is one document from its beginning, with all padding behind it."""
        at = torch.arange(self.shape[1], device=self.position.device)
        if self.valid is None:
            return bool((self.position == at).all())
        behind = self.valid.long().cumsum(1) <= at  # some position up to this one is padding
        return bool(torch.where(self.valid, (self.position == at) & ~behind, True).all())

    @property
    def document(self) -> Tensor:
        """(B, L) int64: 0 for the document that was under way when the row began, then 1, 2, ..."""
        return self.resets.long().cumsum(1)

    @property
    def marks(self) -> Tensor:
        """(B, L) uint8 for kernels: CONTINUE 0, RESET 1, INVALID 2."""
        marks = self.resets.to(torch.uint8) * RESET
        return marks if self.valid is None else marks.masked_fill(~self.valid, INVALID)

    def mask(self, y: Tensor) -> Tensor:
        """`y` (B, L, ...) with zeros at invalid positions (also where y is not finite)."""
        if self.valid is None:
            return y
        if y.ndim > 2 and y.shape[:2] == self.shape and readable(y, self.valid):
            # Places instead of a mask that is spread over channels: a fifth of the time, forward and backward.
            padding = (~self.valid).flatten().nonzero().squeeze(1)
            return y.flatten(0, 1).index_fill(0, padding, 0).view(y.shape)
        return y.masked_fill(~self.valid.reshape(self.valid.shape + (1,) * (y.ndim - 2)), 0)

    def forget(self, state: Tensor) -> Tensor:
        """`state` (B, ...) with zeros in rows whose first valid token begins a document.

        No output depends on those rows; zeros keep what is not finite there from turning up as 0 * NaN.
        """
        if self.valid is None:
            first = self.resets[:, :1]
        else:
            first = self.resets & (self.valid.cumsum(1) == 1)
        return state.masked_fill(first.any(1).reshape(-1, *(1,) * (state.ndim - 1)), 0)

    def check(self, batch: int, length: int, device: torch.device) -> None:
        """Raise unless this describes a (batch, length) input on `device`."""
        if self.shape != (batch, length):
            raise ValueError(f"seg: want shape {(batch, length)} like the input, got {tuple(self.shape)}")
        if self.position.device != device:
            raise ValueError(f"seg: is on {self.position.device} but the input on {device}")

    # ---- rearranging -------------------------------------------------------------------------------------------

    def __getitem__(self, rows_and_columns) -> Segments:
        """Slice rows, or rows and columns: `seg[:, a:b]` is the chunk from a to b, still continuing its documents."""
        valid = None if self.valid is None else self.valid[rows_and_columns]
        return Segments(self.position[rows_and_columns], valid)

    def to(self, device) -> Segments:
        return Segments(self.position.to(device), None if self.valid is None else self.valid.to(device))

    def reversal(self) -> Tensor:
        """(B, L) int64 index r with which `x.gather` reverses each document in place; padding stays where it is."""
        B, L = self.shape
        at = torch.arange(L, device=self.position.device).expand(B, L)
        if L == 0:
            return at
        if self.valid is None:
            group, order = self.document, at
        else:
            # Valid tokens first, in order, so that padding in the middle of a document does not split it.
            order = torch.argsort((~self.valid).to(torch.uint8), dim=1, stable=True)
            group = torch.where(self.valid, self.document, L + 1).gather(1, order)
        # In the compacted row each document is one run [first, last]: place i takes what stands at first + last - i.
        is_first = torch.ones_like(group, dtype=torch.bool)
        is_first[:, 1:] = group[:, 1:] != group[:, :-1]
        is_last = torch.ones_like(is_first)
        is_last[:, :-1] = is_first[:, 1:]
        first = torch.where(is_first, at, 0).cummax(1).values
        last = torch.where(is_last, at, L).flip(1).cummin(1).values.flip(1)
        mirrored = first + last - at
        if self.valid is None:
            return mirrored
        mirrored = torch.where(group == L + 1, at, mirrored)
        return torch.empty_like(order).scatter_(1, order, order.gather(1, mirrored))

    def reverse(self, x: Tensor) -> Tensor:
        """Reverse x (B, L, ...) inside each document; applying it twice gives x back."""
        index = self.reversal().reshape(self.shape + (1,) * (x.ndim - 2))
        return x.gather(1, index.expand_as(x))


def reverse(x: Tensor, seg: Segments | None) -> Tensor:
    """Reverse time in x (B, L, ...): per document if `seg` is given, the whole row if not."""
    return x.flip(1) if seg is None else seg.reverse(x)
