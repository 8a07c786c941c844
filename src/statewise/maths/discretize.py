"""From continuous time x' = A x + B u to steps x_k = A_bar x_{k-1} + B_bar u_k, for diagonal A.

(`maths.discretize_dense` has the same rules for a full matrix A.)

Each rule takes A (real or complex, units 1 / time), dt (real, > 0, units of time) and B, broadcast against each
other, and returns `(log_a, b)`: A_bar = exp(log_a) and B_bar = b. The logarithm is what stays accurate when A_bar is
close to 1 and what powers of A_bar are computed from. Without B, b is the factor that B is to be multiplied by.

Real A: `bilinear` with dt A <= -2 and `euler` with dt A <= -1 make A_bar <= 0, which has no real logarithm (the
result is NaN or -inf); pass A as complex there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._names import unknown

# Below this |z| the series of (exp(z) - 1) / z is used; what these numbers of terms leave out is below 1e-17 there,
# and below 1e-9 in single precision.
_SERIES_RADIUS = 0.5
_SERIES_TERMS, _SERIES_TERMS_SINGLE = 16, 10


def expm1(z: Tensor) -> Tensor:
    """exp(z) - 1, real or complex, to the last digits of its modulus near 0."""
    if not z.is_complex():
        return torch.expm1(z)
    x, y = z.real, z.imag
    half = torch.sin(y / 2)
    return torch.complex(torch.expm1(x) * torch.cos(y) - 2 * half * half, torch.exp(x) * torch.sin(y))


def phi1(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z with value 1 at 0; value and gradients keep their digits near 0."""
    small = z.abs() < _SERIES_RADIUS
    # Each branch sees only arguments that it can take, so that no NaN reaches the gradient through the other one.
    inner = torch.where(small, z, torch.zeros_like(z))
    outer = torch.where(small, torch.ones_like(z), z)
    series = torch.ones_like(z)
    terms = _SERIES_TERMS if z.dtype in (torch.float64, torch.complex128) else _SERIES_TERMS_SINGLE
    for k in range(terms, 1, -1):
        # Not a division: PyTorch divides complex numbers by a number thirty times as slowly as it multiplies them.
        series = 1 + inner * (1 / k) * series
    return torch.where(small, series, expm1(outer) / outer)


def _times(gain: Tensor, B: Tensor | None) -> Tensor:
    return gain if B is None else gain * B


def zoh(A: Tensor, dt: Tensor, B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Zero-order hold: the input is constant over each step. A_bar = exp(dt A), B_bar = (exp(dt A) - 1) / A B."""
    z = dt * A
    return z, _times(dt * phi1(z), B)


def gbt(A: Tensor, dt: Tensor, B: Tensor | None = None, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Generalised bilinear: a step of which the share `alpha` in [0, 1] is implicit.

    A_bar = (1 + (1 - alpha) dt A) / (1 - alpha dt A), B_bar = dt / (1 - alpha dt A) B. Second order for alpha = 1/2,
    else first order; for Re A < 0 stable at every dt if alpha >= 1/2.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: want a number in [0, 1], got {alpha}")
    z = dt * A
    gain = dt / (1 - alpha * z)
    # |1 + (1 - alpha) z|^2 - |1 - alpha z|^2 is written so that the modulus needs no difference of nearly equal
    # numbers; of the two ways to divide by one of them, the one that takes the logarithm of something above 1 keeps its
    # digits.
    if not z.is_complex():
        slow, fast = -torch.log1p(-z / (1 + (1 - alpha) * z)), torch.log1p(z / (1 - alpha * z))
        return torch.where(z < 0, slow, fast), _times(gain, B)
    x, y = z.real, z.imag
    square = x * x + y * y
    above, below = (1 + (1 - alpha) * x) ** 2 + ((1 - alpha) * y) ** 2, (1 - alpha * x) ** 2 + (alpha * y) ** 2
    difference = 2 * x + (1 - 2 * alpha) * square
    log_modulus = torch.where(difference < 0, -torch.log1p(-difference / above), torch.log1p(difference / below)) / 2
    angle = torch.atan2(y, 1 + (1 - 2 * alpha) * x - alpha * (1 - alpha) * square)
    return torch.complex(log_modulus, angle), _times(gain, B)


def bilinear(A: Tensor, dt: Tensor, B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bilinear (Tustin): A_bar = (1 + dt A / 2) / (1 - dt A / 2), B_bar = dt / (1 - dt A / 2) B."""
    return gbt(A, dt, B, alpha=0.5)


def euler(A: Tensor, dt: Tensor, B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Forward Euler: A_bar = 1 + dt A, B_bar = dt B. Stable only for |1 + dt A| <= 1."""
    return gbt(A, dt, B, alpha=0.0)


def backward_euler(A: Tensor, dt: Tensor, B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Backward Euler: A_bar = 1 / (1 - dt A), B_bar = dt / (1 - dt A) B."""
    return gbt(A, dt, B, alpha=1.0)


def dirac(A: Tensor, dt: Tensor, B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The input is a train of Dirac impulses: A_bar = exp(dt A), B_bar = B, whatever the step.

    Source: Event-SSM (Schöne et al., 2024), "Scalable Event-by-event Processing of Neuromorphic Sensory Signals".
    """
    z = dt * A
    return z, _times(torch.ones_like(z), B)


def asynchronous(A: Tensor, dt: Tensor, B: Tensor | None = None, *, elapsed: Tensor) -> tuple[Tensor, Tensor]:
    """Events at irregular times: the state decays over the time that passed, an event counts as one learned step.

    A_bar = exp(dt elapsed A), B_bar = (exp(dt A) - 1) / A B. `elapsed` (>= 0) is the time since the last event in
    units of dt, so that elapsed = 1 is `zoh`, and two events at one time simply add up.

    Source: Event-SSM (Schöne et al., 2024), asynchronous discretisation.
    """
    z = dt * A
    return z * elapsed, _times(dt * phi1(z), B)


DISCRETIZATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "zoh": zoh,
    "bilinear": bilinear,
    "euler": euler,
    "backward_euler": backward_euler,
    "dirac": dirac,
}


def discretize(method: str, A: Tensor, dt: Tensor, B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rule called `method`, one of `DISCRETIZATIONS`; see the functions of this module."""
    if method not in DISCRETIZATIONS:
        raise ValueError(unknown("discretization", method, DISCRETIZATIONS))
    return DISCRETIZATIONS[method](A, dt, B)
