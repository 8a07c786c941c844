"""The definition of the diagonal state space op, and the powers that its closed forms are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...segments import INVALID, RESET, Segments
from .. import _checks

OP = "diagonal_ssm"
# exp of anything below this is zero in every dtype; it stands in for log 0 = -inf, of which 0 * -inf would be NaN.
NOTHING = -2000.0


def powers(log_a: Tensor, exponents: Tensor) -> Tensor:
    """a^l = exp(l log_a) for integers l >= 0.

    Args:
        log_a: (..., N), real or complex.
        exponents: integers, (n,) or (..., n) with the leading axes of log_a.

    Returns:
        (..., n, N) in the dtype of log_a. Angles are multiplied and brought back to one turn in float64: in float32
        the phase of a^l would be wrong by l |Im log_a| times the unit of rounding, which at l = 1000 is visible.
    """
    log_a, l = log_a.unsqueeze(-2), exponents.unsqueeze(-1)
    if not log_a.is_complex():
        return torch.exp(log_a.clamp(min=NOTHING) * l.to(log_a.dtype))
    modulus = torch.exp(log_a.real.clamp(min=NOTHING) * l.to(log_a.real.dtype))
    wide = log_a.real.dtype if log_a.device.type == "mps" else torch.float64
    angle = log_a.imag.to(wide) * l.to(wide)
    turns = torch.round(angle.detach() / (2 * math.pi))
    angle = (angle - 2 * math.pi * turns).to(modulus.dtype)
    return torch.complex(modulus * torch.cos(angle), modulus * torch.sin(angle))


def lift(u: Tensor, *coefficients: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """(real dtype, dtype of the state) in which a call is computed."""
    real = _checks.compute_dtype(u)
    is_complex = any(t is not None and t.is_complex() for t in coefficients)
    return real, (_checks.complex_dtype(real) if is_complex else real)


def check_state(state: Tensor | None, dtype: torch.dtype) -> None:
    """`dtype`: that of the state in which a call is computed."""
    if state is not None and state.is_complex() and not dtype.is_complex:
        raise TypeError(f"{OP}: state: want a real state beside real coefficients, got {state.dtype}")


def lags(length: int, seg: Segments | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many valid tokens of its document token t is after token s, and whether it sees it: (1 or B, L, L) [t, s].

    The lag is 0 where t does not see s.
    """
    at = torch.arange(length, device=device)
    if seg is None:
        lag = (at.unsqueeze(1) - at).unsqueeze(0)
        return lag.clamp(min=0), lag >= 0
    valid = torch.ones_like(seg.position, dtype=torch.bool) if seg.valid is None else seg.valid
    rank = valid.long().cumsum(1)
    same = seg.document.unsqueeze(2) == seg.document.unsqueeze(1)
    seen = same & valid.unsqueeze(2) & valid.unsqueeze(1) & (at.unsqueeze(1) >= at)
    return (rank.unsqueeze(2) - rank.unsqueeze(1)).masked_fill(~seen, 0), seen


def readout(h: Tensor, conjugate: bool) -> Tensor:
    """Sum over modes (last axis), and the real part; twice that when conjugate modes are left out."""
    y = h.sum(-1)
    if not y.is_complex():
        return y
    return 2 * y.real if conjugate else y.real


def diagonal_ssm(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    *,
    conjugate: bool = True,
    state: Tensor | None = None,
    seg: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: h_t = exp(log_a) h_{t-1} + b u_t, y_t = Re(c . h_t) + D u_t, one token after the other.

    Arguments and results as in `ops.diagonal_ssm`. Autograd keeps every state, so memory grows as (B, L, D, N).
    """
    real, dtype = lift(u, log_a, b, c)
    v, log_a, b, c = u.to(real), log_a.to(dtype), b.to(dtype), c.to(dtype)
    a = powers(log_a, torch.ones(1, dtype=torch.int64, device=u.device)).squeeze(-2)
    h = v.new_zeros(u.shape[0], *a.shape, dtype=dtype) if state is None else state.to(dtype)
    marks = None
    if seg is not None:
        v, marks = seg.mask(v), seg.marks[..., None, None]
    ys = []
    for t in range(u.shape[1]):
        before = h if marks is None else torch.where(marks[:, t] == RESET, torch.zeros_like(h), h)
        after = a * before + b * v[:, t, :, None]
        h = after if marks is None else torch.where(marks[:, t] == INVALID, h, after)
        ys.append(readout(c * h, conjugate))
    y = torch.stack(ys, 1) if ys else v * 0
    if D is not None:
        y = y + D.to(real) * v
    return (y if seg is None else seg.mask(y)).to(u.dtype), h
