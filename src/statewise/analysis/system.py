"""One representation for all mixers: a linear system whose coefficients may depend on the input, and what follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..segments import Segments


class Dense(NamedTuple):
    """The system as the literature writes it: h_t = decay_t * h_{t-1} + B_t u_t, y_t = Re(C_t h_t) + D_t u_t.

    d is the number of value channels, N = n d (or the common state of all channels) the width of the state.
    """

    decay: Tensor  # (B, L, N), the diagonal of Lambda_t; complex where the mixer is
    B: Tensor  # (B, L, N, d)
    C: Tensor  # (B, L, d, N)
    D: Tensor  # (B, L, d, d)

    def run(self, u: Tensor) -> Tensor:
        """y (B, L, d) for u (B, L, d), one step after the other."""
        h = torch.zeros_like(self.decay[:, 0])
        ys = []
        for t in range(u.shape[1]):
            into = torch.einsum("bnd,bd->bn", self.B[:, t], u[:, t].to(self.B.dtype))
            h = self.decay[:, t] * h + into
            y = torch.einsum("bdn,bn->bd", self.C[:, t], h)
            ys.append(real(y) + torch.einsum("bde,be->bd", self.D[:, t], u[:, t]))
        return torch.stack(ys, 1)


def real(t: Tensor) -> Tensor:
    return t.real if t.is_complex() else t


@dataclass(frozen=True)
class System(ABC):
    """A mixer and an input, seen as h_t = Lambda_t h_{t-1} + B_t v_t, y_t = Re(C_t h_t) + D_t v_t.

    `emit(y)` is the output of the mixer. Every axis of a coefficient may have size 1 where nothing changes along it:
    a time axis of size 1 is a time-invariant system.
    """

    decay: Tensor
    write: Tensor
    read: Tensor
    skip: Tensor
    v: Tensor
    emit: Callable[[Tensor], Tensor]

    @property
    def time_invariant(self) -> bool:
        """The coefficients are the same at every position."""
        return all(t.shape[1] == 1 for t in (self.decay, self.write, self.read))

    @property
    @abstractmethod
    def expansion(self) -> int:
        """n: numbers of state for each value channel, the lever on how much can be recalled."""

    @property
    @abstractmethod
    def state_size(self) -> int:
        """Real numbers in the state of one layer, n d; a complex number counts as two."""

    @abstractmethod
    def recurrence(self) -> Tensor:
        """y before `emit`, one step after the other: the definition."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Phi with y = Phi v: entry [t, s] is C_t Lambda_t ... Lambda_{s+1} B_s, and D_t is added where s = t."""

    @abstractmethod
    def apply(self, matrix: Tensor) -> Tensor:
        """`matrix` times v, before `emit`."""

    @abstractmethod
    def dense(self) -> Dense:
        """The system with all of its zeros, as in the literature. Memory grows with L N d: for small ones."""

    def separated(self, seg: Segments | None) -> System:
        """The system that forgets where a document begins and stands still in padding."""
        if seg is None:
            return self

        def timed(t: Tensor) -> Tensor:
            return t.expand(*seg.shape, *t.shape[2:])

        def at(mask: Tensor, t: Tensor) -> Tensor:
            return mask.reshape(*seg.shape, *(1,) * (t.ndim - 2))

        decay = timed(self.decay)
        decay = decay.masked_fill(at(seg.resets, decay), 0)
        if seg.valid is not None:
            decay = decay.masked_fill(at(~seg.valid, decay), 1)
        write, read, skip = (seg.mask(timed(t)) for t in (self.write, self.read, self.skip))
        return replace(self, decay=decay, write=write, read=read, skip=skip, v=seg.mask(self.v))

    def _rows(self, times: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """For each t what `times(read_t, paths)` makes of the paths (B, t + 1, ...) of all inputs so far into h_t.

        Products of decays, no logarithms and no quotients: a decay of 0 is as good as any.
        """
        paths, rows = None, []
        for t in range(self.v.shape[1]):
            new = _at(self.write, t).unsqueeze(1)
            if paths is not None:
                decay = _at(self.decay, t).unsqueeze(1)
                moved = decay.unsqueeze(-1) * paths if paths.ndim > decay.ndim else decay * paths
                new = torch.cat([moved, new.expand(moved.shape[0], 1, *moved.shape[2:])], 1)
            paths = new
            rows.append(real(times(_at(self.read, t), paths)))
        return rows


def _at(t: Tensor, i: int) -> Tensor:
    return t[:, i if t.shape[1] > 1 else 0]


@dataclass(frozen=True)
class HeadSystem(System):
    """Heads side by side: each of the P value channels of a head has a state of its own, of n numbers.

    decay, write, read: (B, L, H, P, n), skip: (B, L, H, P), each axis possibly 1. v: (B, L, H, P).
    """

    def __post_init__(self) -> None:
        if self.v.ndim != 4 or self.skip.ndim != 4 or any(t.ndim != 5 for t in (self.decay, self.write, self.read)):
            raise ValueError(
                f"HeadSystem: want v (B, L, H, P) and coefficients (B, L, H, P, n), got {tuple(self.v.shape)}, "
                f"{tuple(self.decay.shape)}, {tuple(self.write.shape)} and {tuple(self.read.shape)}"
            )

    def heads(self, chosen: Sequence[int]) -> HeadSystem:
        """These heads alone, without `emit`, which wants all of them."""

        def some(t: Tensor) -> Tensor:
            return t[:, :, list(chosen)] if t.shape[2] > 1 else t

        def emit(y: Tensor) -> Tensor:
            raise ValueError(f"HeadSystem.heads: emit wants all {self.v.shape[2]} heads, got {len(chosen)}")

        return HeadSystem(some(self.decay), some(self.write), some(self.read), some(self.skip), some(self.v), emit)

    @property
    def expansion(self) -> int:
        n = max(t.shape[-1] for t in (self.decay, self.write, self.read))
        return n * (2 if any(t.is_complex() for t in (self.decay, self.write, self.read)) else 1)

    @property
    def state_size(self) -> int:
        return self.expansion * self.v.shape[2] * self.v.shape[3]

    def recurrence(self) -> Tensor:
        h: Tensor | float = 0.0
        ys = []
        for t in range(self.v.shape[1]):
            v = self.v[:, t]
            h = _at(self.decay, t) * h + _at(self.write, t) * v.unsqueeze(-1)
            ys.append(real((_at(self.read, t) * h).sum(-1)) + _at(self.skip, t) * v)
        return torch.stack(ys, 1)

    def matrix(self) -> Tensor:
        """(B, H, P or 1, L, L): P is 1 where all channels of a head share one matrix."""
        length = self.v.shape[1]

        def times(read: Tensor, paths: Tensor) -> Tensor:
            return (read.unsqueeze(1) * paths).sum(-1)  # (B, t + 1, H, P)

        rows = [torch.nn.functional.pad(r, (0, 0, 0, 0, 0, length - r.shape[1])) for r in self._rows(times)]
        dense = torch.stack(rows, 1).permute(0, 3, 4, 1, 2)  # (B, H, P, t, s)
        heads = self.v.shape[2]
        skip = self.skip.expand(-1, length, heads, -1).permute(0, 2, 3, 1)
        return dense.expand(-1, heads, -1, -1, -1) + torch.diag_embed(skip)

    def apply(self, matrix: Tensor) -> Tensor:
        matrix = matrix.expand(self.v.shape[0], -1, self.v.shape[3], -1, -1)
        return torch.einsum("bhpts,bshp->bthp", matrix, self.v)

    def dense(self) -> Dense:
        B, L, H, P = self.v.shape
        n = max(t.shape[-1] for t in (self.decay, self.write, self.read))
        shape = (B, L, H * P, n)
        decay, write, read = (t.expand(B, L, H, P, n).reshape(shape) for t in (self.decay, self.write, self.read))
        own = torch.eye(H * P, dtype=write.dtype, device=write.device)
        return Dense(
            decay.flatten(2),
            torch.einsum("blcn,cd->blcnd", write, own).flatten(2, 3),
            torch.einsum("bldn,cd->bldcn", read, own.to(read.dtype)).flatten(3),
            torch.diag_embed(self.skip.expand(B, L, H, P).flatten(2)),
        )


@dataclass(frozen=True)
class MixedSystem(System):
    """One state for all channels, which enter and leave it through dense maps (S5 and its like).

    decay: (B, L, N), write: (B, L, N, P), read: (B, L, P, N), skip: (B, L, P), each of B and L possibly 1.
    v: (B, L, P).
    """

    def __post_init__(self) -> None:
        if [t.ndim for t in (self.v, self.decay, self.write, self.read, self.skip)] != [3, 3, 4, 4, 3]:
            raise ValueError(
                "MixedSystem: want v (B, L, P), decay (B, L, N), write (B, L, N, P), read (B, L, P, N) and skip "
                f"(B, L, P), got {[tuple(t.shape) for t in (self.v, self.decay, self.write, self.read, self.skip)]}"
            )

    @property
    def expansion(self) -> int:
        # One state serves all channels, so this is its share of one.
        return max(1, self.state_size // self.v.shape[2])

    @property
    def state_size(self) -> int:
        return self.decay.shape[2] * (2 if self.decay.is_complex() or self.write.is_complex() else 1)

    def recurrence(self) -> Tensor:
        return self.dense().run(self.v)

    def matrix(self) -> Tensor:
        """(B, L, L, P, P): [b, t, s, out, in]."""
        length = self.v.shape[1]

        def times(read: Tensor, paths: Tensor) -> Tensor:
            return read.unsqueeze(1) @ paths  # (B, t + 1, P, P)

        rows = [torch.nn.functional.pad(r, (0, 0, 0, 0, 0, length - r.shape[1])) for r in self._rows(times)]
        dense = torch.stack(rows, 1)
        skip = torch.diag_embed(self.skip.expand(-1, length, -1))  # (B, L, P, P)
        own = torch.eye(length, dtype=skip.dtype, device=skip.device)
        return dense + own[..., None, None] * skip.unsqueeze(2)

    def apply(self, matrix: Tensor) -> Tensor:
        return torch.einsum("btsij,bsj->bti", matrix.expand(self.v.shape[0], -1, -1, -1, -1), self.v)

    def dense(self) -> Dense:
        B, L, _ = self.v.shape
        decay, write, read = (t.expand(B, L, *t.shape[2:]) for t in (self.decay, self.write, self.read))
        return Dense(decay, write, read, torch.diag_embed(self.skip.expand(B, L, -1)))
