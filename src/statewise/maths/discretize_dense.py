"""From continuous time x' = A x + B u to steps x_k = A_bar x_{k-1} + B_bar u_k, for a full matrix A.

The rules of `maths.discretize`, under the same names. Each takes

- A (N, N), units 1 / time;
- dt (...), units of time, > 0: a number, or one for each of many steps;
- B (N,) for one input or (N, M) for M,

and returns A_bar (..., N, N) and B_bar (..., N) or (..., N, M), in the dtype of A: float64 in, float64 out. Costs a
matrix exponential or a linear solve for each entry of dt. For a diagonal A use `maths.discretize`.

Source: HiPPO (Gu et al., 2020), Appendix B.3 (generalised bilinear); Event-SSM (Schöne et al., 2024) (`dirac`,
`asynchronous`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._names import unknown


def _prepare(A: Tensor, dt: Tensor | float, B: Tensor) -> tuple[Tensor, Tensor]:
    """dt (..., 1, 1) and B (N, M), checked."""
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"A: want a square matrix (N, N), got {tuple(A.shape)}")
    if B.ndim not in (1, 2) or B.shape[0] != A.shape[0]:
        raise ValueError(f"B: want (N,) or (N, M) with N = {A.shape[0]}, got {tuple(B.shape)}")
    step = torch.as_tensor(dt, dtype=torch.empty(0, dtype=A.dtype, device="cpu").real.dtype, device=A.device)
    return step[..., None, None], (B.unsqueeze(-1) if B.ndim == 1 else B).to(A.dtype)


def _like(B_bar: Tensor, B: Tensor) -> Tensor:
    return B_bar.squeeze(-1) if B.ndim == 1 else B_bar


def _eye(A: Tensor) -> Tensor:
    return torch.eye(A.shape[0], dtype=A.dtype, device=A.device)


def _held(A: Tensor, step: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """exp(step A), and the integral of exp(s A) columns over 0 <= s <= step: one exponential gives both."""
    n, m = columns.shape
    # The mean over the step, not the integral: a short step then takes no digits from it.
    above = torch.cat([step * A, columns.expand(*step.shape[:-2], n, m)], -1)
    exponential = torch.linalg.matrix_exp(torch.cat([above, above.new_zeros(*above.shape[:-2], m, n + m)], -2))
    return exponential[..., :n, :n], step * exponential[..., :n, n:]


def zoh(A: Tensor, dt: Tensor | float, B: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: the input is constant over each step. Exact for such input; A may be singular."""
    step, columns = _prepare(A, dt, B)
    A_bar, B_bar = _held(A, step, columns)
    return A_bar, _like(B_bar, B)


def gbt(A: Tensor, dt: Tensor | float, B: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Generalised bilinear: A_bar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A), B_bar = (I - alpha dt A)^-1 dt B.

    Args:
        alpha: share of the step that is implicit, in [0, 1]: 0 forward Euler, 1/2 bilinear, 1 backward Euler.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: want a number in [0, 1], got {alpha}")
    step, columns = _prepare(A, dt, B)
    explicit = torch.cat([_eye(A) + (1 - alpha) * step * A, step * columns], -1)
    both = torch.linalg.solve(_eye(A) - alpha * step * A, explicit) if alpha else explicit
    A_bar, B_bar = both.split([A.shape[0], columns.shape[1]], -1)
    return A_bar, _like(B_bar, B)


def bilinear(A: Tensor, dt: Tensor | float, B: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear (Tustin): `gbt` with alpha = 1/2."""
    return gbt(A, dt, B, alpha=0.5)


def euler(A: Tensor, dt: Tensor | float, B: Tensor) -> tuple[Tensor, Tensor]:
    """Forward Euler: A_bar = I + dt A, B_bar = dt B. Stable only where |1 + dt lambda| <= 1 for every eigenvalue."""
    return gbt(A, dt, B, alpha=0.0)


def backward_euler(A: Tensor, dt: Tensor | float, B: Tensor) -> tuple[Tensor, Tensor]:
    """Backward Euler: `gbt` with alpha = 1."""
    return gbt(A, dt, B, alpha=1.0)


def dirac(A: Tensor, dt: Tensor | float, B: Tensor) -> tuple[Tensor, Tensor]:
    """The input is a train of Dirac impulses: A_bar = exp(dt A), B_bar = B, whatever the step."""
    step, columns = _prepare(A, dt, B)
    A_bar = torch.linalg.matrix_exp(step * A)
    return A_bar, _like(columns.expand(*step.shape[:-2], *columns.shape), B)


def asynchronous(A: Tensor, dt: Tensor | float, B: Tensor, *, elapsed: Tensor | float) -> tuple[Tensor, Tensor]:
    """Events at irregular times: A_bar = exp(dt elapsed A), B_bar as in `zoh` with the step dt.

    Args:
        elapsed: (...), time since the last event in units of dt, >= 0.
    """
    step, columns = _prepare(A, dt, B)
    since = torch.as_tensor(elapsed, dtype=step.dtype, device=A.device)[..., None, None]
    _, B_bar = _held(A, step, columns)
    A_bar = torch.linalg.matrix_exp(step * since * A)
    return A_bar, _like(B_bar.expand(*A_bar.shape[:-1], columns.shape[1]), B)


DISCRETIZATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "zoh": zoh,
    "bilinear": bilinear,
    "euler": euler,
    "backward_euler": backward_euler,
    "dirac": dirac,
}


def discretize(method: str, A: Tensor, dt: Tensor | float, B: Tensor) -> tuple[Tensor, Tensor]:
    """The rule called `method`, one of `DISCRETIZATIONS`; see the functions of this module."""
    if method not in DISCRETIZATIONS:
        raise ValueError(unknown("discretization", method, DISCRETIZATIONS))
    return DISCRETIZATIONS[method](A, dt, B)
