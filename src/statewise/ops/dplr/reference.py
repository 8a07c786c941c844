"""The definition of the diagonal-plus-low-rank op: one step after the other, in O(N) a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...segments import INVALID, RESET, Segments
from .. import _checks
from ..lti.reference import readout


def lift(u: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(real dtype, dtype of the state) in which a call is computed."""
    real = _checks.compute_dtype(u)
    return real, _checks.complex_dtype(real)


def project(p: Tensor, x: Tensor) -> Tensor:
    """p_r^* x over both halves of each conjugate pair: p (R, D, N), x (..., D, N) -> (..., R, D), real."""
    # Re(conj(p) x), written out: fewer products, and a lazy conjugate is lost below autograd, where operators run.
    x = x.unsqueeze(-3)
    return 2 * (p.real * x.real + p.imag * x.imag).sum(-1)


def spread(p: Tensor, weights: Tensor) -> Tensor:
    """sum_r p_r weights_r: p (R, D, N), weights (..., R, D) real -> (..., D, N)."""
    return (p * weights.unsqueeze(-1)).sum(-3)


def inverse(m: Tensor) -> Tensor:
    """Of small matrices (D, R, R)."""
    return m.reciprocal() if m.shape[-1] == 1 else torch.linalg.inv(m)


def resolvent(w: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """g (D, N) and T (D, R, R) of (I - M/2)^-1 = g - g p T p^* g for M = diag(w) - sum_r p_r p_r^* (Woodbury)."""
    g = 1 / (1 - w / 2)
    gram = project(p, (g * p)).permute(2, 1, 0)  # [r, s] = p_r^* G p_s
    return g, inverse(2 * torch.eye(p.shape[0], dtype=gram.dtype, device=gram.device) + gram)


def stepper(w: Tensor, p: Tensor) -> Callable[[Tensor], Tensor]:
    """t -> (I - M/2)^-1 t for M = diag(w) - sum_r p_r p_r^*."""
    return partial(solve, p, *resolvent(w, p))


def solve(p: Tensor, g: Tensor, inner: Tensor, t: Tensor) -> Tensor:
    """What `stepper` does, given `resolvent`."""
    return g * (t - spread(p, torch.einsum("drs,...sd->...rd", inner, project(p, g * t))))


def drift(w: Tensor, p: Tensor, x: Tensor) -> Tensor:
    """M x for M = diag(w) - sum_r p_r p_r^*: x (..., D, N)."""
    return w * x - spread(p, project(p, x))


def dplr_ssm(
    u: Tensor,
    w: Tensor,
    p: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seg: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """x_t = x_{t-1} + (I - M/2)^-1 (M x_{t-1} + b u_t), y_t = 2 Re(c . x_t) + D u_t, one token after the other.

    Arguments and results as in `ops.dplr_ssm`. The step is written as an increment, so that a state which decays
    slowly does not lose its decay to rounding. Autograd keeps every state, so memory grows as (B, L, D, N).
    """
    real, dtype = lift(u)
    v, w, p, b, c = u.to(real), w.to(dtype), p.to(dtype), b.to(dtype), c.to(dtype)
    x = v.new_zeros(u.shape[0], *b.shape, dtype=dtype) if state is None else state.to(dtype)
    step, marks = stepper(w, p), None
    if seg is not None:
        v, marks = seg.mask(v), seg.marks[..., None, None]
    ys = []
    for t in range(u.shape[1]):
        before = x if marks is None else torch.where(marks[:, t] == RESET, torch.zeros_like(x), x)
        after = before + step(drift(w, p, before) + b * v[:, t, :, None])
        x = after if marks is None else torch.where(marks[:, t] == INVALID, x, after)
        ys.append(readout(c * x, True))
    y = torch.stack(ys, 1) if ys else v * 0
    if D is not None:
        y = y + D.to(real) * v
    return (y if seg is None else seg.mask(y)).to(u.dtype), x
