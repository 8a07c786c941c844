"""Run a HiPPO memory over a signal, in float64: coefficients of the past at every step.

`project` is for systems that do not change in time (all of `maths.hippo`); what the coefficients mean is in
`maths.bases`. `project_scaled` is the memory of the whole past since the start, HiPPO-LegS as it was first defined: the
matrices of LegS divided by the time. S4 uses the first kind, also with LegS.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bases import _legendre
from .discretize_dense import discretize
from .hippo import legs


def project(A: Tensor, B: Tensor, u: Tensor, dt: float, *, method: str = "zoh", state: Tensor | None = None) -> Tensor:
    """States of x' = A x + B u at the end of each step.

    Args:
        A, B: (N, N) and (N,), units 1 / time.
        u: (..., L), real samples.
        dt: time between two samples. A memory with a window of T holds the last T / dt samples.
        method: rule of `discretize_dense`.
        state: (..., N) before the first sample; zeros if None.

    Returns:
        (..., L, N), float64.
    """
    A, B, u = (t.to(torch.float64) for t in (A, B, u))
    A_bar, B_bar = discretize(method, A, dt, B)
    x = u.new_zeros(*u.shape[:-1], len(B)) if state is None else state.to(torch.float64)
    driven = u.unsqueeze(-1) * B_bar
    states = []
    for k in range(u.shape[-1]):
        x = x @ A_bar.T + driven[..., k, :]
        states.append(x)
    return torch.stack(states, -2) if states else driven


def project_scaled(u: Tensor, n: int, *, method: str = "bilinear") -> Tensor:
    """Coefficients of everything since the first sample, each part of it with equal weight: x' = (A x + B u) / t.

    The step is not a free parameter: stretching a signal in time does not change its coefficients.

    Args:
        u: (..., L), real samples; sample k (from 1) is at time k.
        n: number of coefficients.
        method: "bilinear" (x_k = (I - A/2k)^-1 ((I + A/2k) x_{k-1} + B u_k / k), as in the paper), or "zoh": in the
            time log t the system does not change, so for an input that is held it can be solved exactly.

    Returns:
        (..., L, n), float64.

    Source: HiPPO (Gu et al., 2020), Theorem 2 and Proposition 3 (timescale).
    """
    if method not in ("bilinear", "zoh"):
        raise ValueError(f"method: want 'bilinear' or 'zoh', got {method!r}")
    A, B = legs(n)
    u = u.to(torch.float64)
    x = u.new_zeros(*u.shape[:-1], n)
    step = _bilinear_step if method == "bilinear" else _held_step
    states = []
    for k in range(1, u.shape[-1] + 1):
        x = step(A, B, x, u[..., k - 1, None], k)
        states.append(x)
    return torch.stack(states, -2) if states else u.new_zeros(*u.shape, n)


def _bilinear_step(A: Tensor, B: Tensor, x: Tensor, now: Tensor, k: int) -> Tensor:
    half = A / (2 * k)
    right = x + x @ half.T + now * B / k
    system = torch.eye(len(B), dtype=A.dtype, device="cpu") - half
    # One matrix for all rows, and the rows as its right-hand sides.
    return torch.linalg.solve_triangular(system, right.reshape(-1, len(B)).T, upper=False).T.reshape(right.shape)


def _held_step(A: Tensor, B: Tensor, x: Tensor, now: Tensor, k: int) -> Tensor:
    # A constant signal has the coefficients (u, 0, 0, ...) at all times, so what differs from it decays freely.
    constant = torch.cat([now, x.new_zeros(*x.shape[:-1], len(B) - 1)], -1)
    if k == 1:
        return constant
    return constant + (x - constant) @ torch.linalg.matrix_exp(math.log(k / (k - 1)) * A).T


def reconstruct_scaled(x: Tensor, fractions: Tensor) -> Tensor:
    """The whole past from its coefficients.

    Args:
        x: (..., n), as `project_scaled` gives them.
        fractions: (S,), points in time as fractions of the time so far: 0 is the start, 1 is now.

    Returns:
        (..., S).
    """
    return x.to(torch.float64) @ _legendre(2 * fractions.to(torch.float64) - 1, x.shape[-1]).T
