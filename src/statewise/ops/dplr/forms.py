"""Closed forms of the diagonal-plus-low-rank recurrence: powers of its dense step by repeated squaring.

A state of N complex modes is M = 2 N real numbers, and one step without input is a dense (M, M) matrix, I + E. It is a
contraction (Re w <= 0), so its powers never grow, and products of them lose nothing. What is kept of I + E is E: the
square of I + E is I + (2 E + E E), and so a mode that decays slowly keeps the digits of its decay. The system is
computed in float64 whatever the tokens are, and rounded where it meets them: it is small, and S4 is known for a
convolution and a recurrence that disagree in float32.

Every form runs from a zero state; what an incoming state adds is computed on its own (`from_state`, `decayed`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lti.forms import chunk_size, in_chunks
from ..lti.modes import dot_parts, parts, whole
from .reference import resolvent, stepper


def _split(length: int) -> int:
    """k such that chunks of 2^k tokens cut a row of `length` into about as many chunks."""
    return ((max(length, 1) - 1).bit_length() + 1) // 2


def increment(w: Tensor, p: Tensor) -> Tensor:
    """A - I of one step in real coordinates, (D, M, M) [d, from, to].

    A - I = (I - M/2)^-1 M = 2 ((I - M/2)^-1 - I), of which 2 (g - 1) = w g is diagonal in the modes.
    """
    g, inner = resolvent(w, p)
    real, imag = (w * g).real, (w * g).imag
    turn = torch.stack([torch.stack([real, imag]), torch.stack([-imag, real])])  # (2, 2, D, N) [from, to]
    diagonal = torch.diag_embed(turn).permute(2, 3, 0, 4, 1).flatten(3).flatten(1, 2)
    into, out = 2 * parts(p * torch.conj_physical(g)), -2 * parts(g * p)  # (R, D, M)
    return diagonal + torch.einsum("sdi,drs,rdj->dij", into, inner, out)


class System:
    """The discrete system in real coordinates: A^(2^k) - I = E(k), what enters and what is read.

    Rows are states: `x (..., M)` goes to `x + x @ E(k)` in 2^k steps.

    Args:
        w, b: (D, N) and p (R, D, N), complex, as in `ops.dplr_ssm`.
        c: (K, D, N), complex, K read-outs of one state; all but `kernel` want a single one.
    """

    def __init__(self, w: Tensor, p: Tensor, b: Tensor, c: Tensor):
        w, p, b, c = (t.to(torch.complex128) for t in (w, p, b, c))
        self.b = parts(stepper(w, p)(b)).unsqueeze(1)  # (D, 1, M)
        self.c = 2 * dot_parts(c).transpose(0, 1)  # (D, K, M), to be dotted with states
        self._E = [increment(w, p)]

    def E(self, k: int) -> Tensor:
        """A^(2^k) - I, made when it is first asked for."""
        while len(self._E) <= k:
            E = self._E[-1]
            self._E.append(torch.baddbmm(E, E, E, beta=2))
        return self._E[k]

    def advance(self, k: int, x: Tensor) -> Tensor:
        """States x (D, B, M) over 2^k steps without input."""
        return torch.baddbmm(x, x, self.E(k).to(x.dtype))

    def entered(self, k: int) -> Tensor:
        """A^r b for r < 2^k, (D, 2^k, M)."""
        rows = self.b
        for j in range(k):
            rows = torch.cat([rows, torch.baddbmm(rows, rows, self.E(j))], 1)
        return rows

    def read(self, k: int, count: int) -> Tensor:
        """c A^(q 2^k) for q < count, (D, K, count, M)."""
        rows, j = self.c.unsqueeze(2), k
        while rows.shape[2] < count:
            more = rows[:, :, : count - rows.shape[2]]
            further = more.flatten(1, 2) @ self.E(j).mT
            rows = torch.cat([rows, more + further.view(more.shape)], 2)
            j += 1
        return rows

    def truncated(self, length: int) -> Tensor:
        """c (1 - A^length), complex, (K, D, N): its generating function is that of the first `length` taps."""
        lost: Tensor | int = 0  # c (A^steps - 1) for the steps so far; the small numbers keep their digits
        for k in range(length.bit_length()):
            if length >> k & 1:
                lost = lost + (self.c + lost) @ self.E(k).mT
        assert isinstance(lost, Tensor)
        return -whole(lost.transpose(0, 1)).conj().resolve_conj() / 2

    def restored(self, length: int) -> Tensor:
        """c of a system whose read-outs are c (1 - A^length): the inverse of `truncated`, (K, D, N)."""
        lost = torch.zeros_like(self.E(0))  # A^steps - 1
        for k in range(length.bit_length()):
            if length >> k & 1:
                lost = lost + self.E(k) + lost @ self.E(k)
        rows = torch.linalg.solve(lost.neg(), self.c.mT).mT
        return whole(rows.transpose(0, 1)).conj().resolve_conj() / 2

    def emitted(self, k: int) -> Tensor:
        """c A^(j + 1) for j < 2^k of a single read-out, (D, 2^k, M)."""
        rows = self.read(0, 1 << k).squeeze(1)
        return torch.baddbmm(rows, rows, self.E(0).mT)

    def kernel(self, length: int) -> Tensor:
        """c A^l b for l < length: (K, D, length). With l = q Q + r it is a product of c A^(q Q) and A^r b."""
        k = _split(length)
        left = self.read(k, -(-length >> k) if length else 1)
        taps = left.flatten(1, 2) @ self.entered(k).mT  # (D, K * chunks, Q)
        return taps.view(*left.shape[:2], -1)[..., :length].transpose(0, 1)

    def from_state(self, x: Tensor, length: int) -> Tensor:
        """What a state adds to the next outputs, c A^(t + 1) x: x (D, B, M) -> (D, B, length)."""
        k = _split(length)
        chunks = -(-length >> k)
        rows, j = x.unsqueeze(2), k  # (D, B, chunks, M)
        while rows.shape[2] < chunks:
            more = rows[:, :, : chunks - rows.shape[2]]
            further = self.advance(j, more.flatten(1, 2)).view(more.shape)
            rows, j = torch.cat([rows, further], 2), j + 1
        return (rows @ self.emitted(k).to(x.dtype).mT.unsqueeze(1)).flatten(2)[..., :length]

    def decayed(self, x: Tensor, steps: Tensor | int) -> Tensor:
        """A^steps x: x (D, B, M), steps an integer or (B,)."""
        if isinstance(steps, int):
            for k in range(steps.bit_length()):
                x = self.advance(k, x) if steps >> k & 1 else x
            return x
        for k in range(int(steps.max()).bit_length() if len(steps) else 0):
            x = torch.where((steps >> k & 1).bool().view(1, -1, 1), self.advance(k, x), x)
        return x

    def last_state(self, u: Tensor) -> Tensor:
        """The state after a row that began at zero: u (B, L, D) -> sum_s A^(L - 1 - s) b u_s, (D, B, M).

        Chunks first, then pairs of neighbours, pairs of pairs, and so on.
        """
        B, length, D = u.shape
        k = _split(length)
        chunks = max(-(-length >> k), 1)
        chunks = 1 << (chunks - 1).bit_length()
        u = F.pad(u.permute(2, 0, 1), ((chunks << k) - length, 0)).reshape(D, B * chunks, 1 << k)
        rows = (u @ self.entered(k).flip(1).to(u.dtype)).unflatten(1, (B, chunks))
        while rows.shape[2] > 1:
            first, second = rows[:, :, ::2], rows[:, :, 1::2]
            rows, k = second + self.advance(k, first.flatten(1, 2)).view(first.shape), k + 1
        return rows.squeeze(2)

    def chunk(self, u: Tensor, document: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u (B, L, D) from a zero state -> y (B, L, D), last state (D, B, M); `document` as in `in_chunks`."""
        size = chunk_size(u.shape[1])
        k = size.bit_length() - 1
        wide = self.kernel(size)[0], self.entered(k).flip(1), self.emitted(k)
        kernel, inject, emit = (t.to(u.dtype) for t in wide)
        E = self.E(k).to(u.dtype)
        return in_chunks(u, kernel, inject, emit, lambda x: torch.baddbmm(x, x, E), document)
