"""Time-invariant mixers: their diagonal form, if they have one, however their class writes it down; their modes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..mixers.base import HasImpulse
from ..mixers.s4 import S4, BidirectionalS4
from ..mixers.s4d import BidirectionalS4D
from ..mixers.s5 import BidirectionalS5
from ..ops._precision import widen
from ..ops.dplr.forms import System

_TAPS = 4  # of the impulse response that tell whether, and how, the diagonal form means the mixer


class Diagonal(NamedTuple):
    """y = Re(read h) + skip v. One system a channel, (D, n) each, or one for all: (N,), (N, D) and (D, N)."""

    decay: Tensor
    write: Tensor
    read: Tensor
    skip: Tensor  # (D,)

    def response(self, length: int) -> Tensor:
        """The impulse response, (D, length) or (D_out, D_in, length)."""
        at = torch.arange(length, device=self.decay.device)
        power = self.decay.unsqueeze(-1) ** at
        if self.decay.ndim == 1:
            taps = torch.einsum("on,nl,ni->oil", self.read, power, self.write.to(power.dtype))
            first = torch.diag(self.skip).unsqueeze(-1)
        else:
            taps = ((self.read * self.write).unsqueeze(-1) * power).sum(1)
            first = self.skip.unsqueeze(-1)
        taps = taps.real if taps.is_complex() else taps
        return taps + first * (at == 0)


@torch.no_grad()
def diagonal_form(mixer: HasImpulse) -> Diagonal | None:
    """The mixer's state space as it acts on a sequence, or None if its class does not show a diagonal form.

    `discrete()` of a mixer gives log A_bar, B_bar, C and D. Some keep one of each conjugate pair of modes and read
    twice the real part, some keep both and read it once. Which is meant is told by the mixer's own impulse response.
    """
    discrete = getattr(mixer, "discrete", None)
    if not callable(discrete):
        return None
    parts = _parts(discrete())
    if parts is None:
        return None
    log_a, write, read, skip = parts
    want = widen(mixer.impulse(_TAPS))
    for times in (2, 1):
        form = Diagonal(log_a.exp(), write, times * read, skip)
        got = form.response(_TAPS).to(want.dtype)
        size = want.abs().max()
        if got.shape == want.shape and (got - want).abs().max() <= 1e-4 * size:
            return form
    return None


def _parts(given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    if not isinstance(given, tuple) or len(given) != 4:
        return None
    log_a, write, read, skip = given
    if isinstance(read, tuple):
        # One read-out for each direction; a causal mixer has one.
        if len(read) != 1:
            return None
        (read,) = read
    tensors = (log_a, write, read, skip)
    if not all(isinstance(t, Tensor) for t in tensors) or skip.ndim != 1:
        return None
    D = len(skip)
    if log_a.ndim == 1:
        return tensors if write.shape == (len(log_a), D) and read.shape == (D, len(log_a)) else None
    if log_a.ndim != 2 or log_a.shape[0] not in (1, D):
        return None
    shape = (D, log_a.shape[1])
    return log_a.expand(shape), write.expand(shape), read.expand(shape), skip


@torch.no_grad()
def modes(mixer: nn.Module) -> Tensor | None:
    """Eigenvalues of one step of the state, (channels, modes), or (1, modes) of one system for all channels.

    Of a diagonal form the modes that it keeps: one of each conjugate pair where it reads twice the real part. Of S4,
    which is diagonal plus low rank, all N of them. A mixer of two directions has one system for both. None for a mixer
    of which no such form is known.
    """
    if isinstance(mixer, HasImpulse) and (form := diagonal_form(mixer)) is not None:
        return form.decay if form.decay.ndim > 1 else form.decay[None]
    if isinstance(mixer, (BidirectionalS4D, BidirectionalS5)):
        decay = torch.exp(mixer.discrete()[0])
        return decay if decay.ndim > 1 else decay[None]
    if isinstance(mixer, (S4, BidirectionalS4)):
        w, p, b, c, _ = mixer.discrete()
        # What a step adds to the state, so that slow decays keep their digits.
        change = System(w, p, b, c.reshape(-1, *w.shape)).E(0)
        return 1 + torch.linalg.eigvals(change)
    return None


@torch.no_grad()
def low_rank_gain(mixer: S4, omega: Tensor) -> Tensor:
    """The gain of S4's state space for waves exp(i omega t), with no cut-off: omega (F,) -> (D, F).

    The bilinear rule makes C (1 - A_bar z)^-1 B_bar = C ((1 - z) - (1 + z)/2 A)^-1 B, with z = exp(-i omega), and that
    matrix is diagonal plus low rank as A is.
    """
    w, p, b, c, skip = mixer.discrete()
    # Both halves of each conjugate pair, (D, 1, N) and (R, D, 1, N).
    w, p, b, c = (torch.cat([t, t.conj()], -1).unsqueeze(-2) for t in (w, p, b, c))
    z = torch.exp(-1j * omega).unsqueeze(-1)
    share = (1 + z) / 2  # (F, 1)
    inverse = 1 / ((1 - z) - share * w)  # (D, F, N)
    plain = (c * inverse * b).sum(-1)
    into = (p.conj() * inverse * b).sum(-1)  # (R, D, F)
    out = (p * inverse * c).sum(-1)
    inner = torch.einsum("rdn,dfn,sdn->dfrs", p.conj().squeeze(-2), inverse, p.squeeze(-2))
    inner = torch.eye(len(p), dtype=inner.dtype, device=inner.device) + share.unsqueeze(-1) * inner
    solved = torch.linalg.solve(inner, into.permute(1, 2, 0).unsqueeze(-1)).squeeze(-1)
    return plain - share.squeeze(-1) * (out.permute(1, 2, 0) * solved).sum(-1) + skip.unsqueeze(-1)
