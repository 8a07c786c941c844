"""What a HiPPO state means: functions of the lag, a weight on the past, and the system that follows from both.

Let p_0 ... p_{N-1} be functions of the lag s >= 0 that are orthonormal under a weight w: sum or integral of
p_i p_k w = 1 if i = k, else 0. The coefficients of the past of a signal,

    x_i(t) = integral of u(t - s) p_i(s) w(s) over s,

give its best approximation u(t - s) = sum_i x_i(t) p_i(s) in the mean weighted with w. As time goes on the whole past
moves to larger lags, and the newest sample comes in at lag 0. That is a linear system:

    x' = -M x + B (u - p(0)^T x),    M_ik = integral of p_i p_k' w,    B = w(0) p(0):

shift the history, then correct what it says about the present by what the present is. So A = -M - B p(0)^T. If the
weight does not grow with the lag, A + A^T is negative semidefinite: every such memory is stable.

Where a basis cannot follow p_i w under the shift (a window that ends), the system keeps its coefficients approximately;
LegS and LagT are exact.

Source: How to Train Your HiPPO (Gu et al., 2022), section 3 and Appendix C; the form with M is our own rewriting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .hippo import _check_size, _check_window

Functions = Callable[[Tensor], Tensor]


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))


@dataclass(frozen=True)
class Basis:
    """Functions of the lag that are orthonormal under a weight; all in float64 on the CPU.

    Args:
        functions: lags (...) to values (..., N); made of torch operations, entry by entry.
        weight: lags (...) to w (...), >= 0 and finite at lag 0.
        lags, masses: (Q,), a quadrature: the integral of f over the support of w is sum(masses * f(lags)). It has to be
            good for f = p_i p_k w and p_i p_k' w.
        periodic: the functions have the same values at both ends of a window. Where a periodic series meets a jump it
            goes through the middle, so what it says about lag 0 is half the newest sample and half the oldest; the
            correction then has to be twice as large.
    """

    functions: Functions
    weight: Functions
    lags: Tensor
    masses: Tensor
    periodic: bool = False

    def __call__(self, lags: Tensor) -> Tensor:
        """p(s): lags (...) to (..., N)."""
        return self.functions(lags.to(torch.float64))

    def _zero(self) -> Tensor:
        return self.lags.new_zeros(())

    def gram(self) -> Tensor:
        """Integrals of p_i p_k w, (N, N): the identity, by the quadrature."""
        p = self(self.lags)
        return p.T @ ((self.masses * self.weight(self.lags))[:, None] * p)

    def system(self) -> tuple[Tensor, Tensor]:
        """A (N, N) and B (N,) of the system x' = A x + B u that keeps the coefficients of the past of u."""
        p, derivative, *_ = torch.func.jvp(self.functions, (self.lags,), (torch.ones_like(self.lags),))
        M = p.T @ ((self.masses * self.weight(self.lags))[:, None] * derivative)
        now = self(self._zero())
        B = (2 if self.periodic else 1) * self.weight(self._zero()) * now
        return -M - torch.outer(B, now), B

    def kernel(self, lags: Tensor) -> Tensor:
        """p(s) w(s), what exp(s A) B stands for: (..., N)."""
        return self(lags) * self.weight(lags.to(torch.float64)).unsqueeze(-1)

    def project(self, past: Functions) -> Tensor:
        """Coefficients (N,) of a known past, a function of the lag, by the quadrature."""
        return (self.masses * past(self.lags)) @ self.kernel(self.lags)

    def reconstruct(self, x: Tensor, lags: Tensor) -> Tensor:
        """The past from its coefficients: x (..., N), lags (S,) to u(t - lags) (..., S)."""
        return x.to(torch.float64) @ self(lags).T


def _legendre(y: Tensor, n: int) -> Tensor:
    """sqrt(2k + 1) P_k(y): (..., n); orthonormal under weight 1/2 on [-1, 1]."""
    values = [torch.ones_like(y), y]
    for k in range(1, n - 1):
        values.append(((2 * k + 1) * y * values[k] - k * values[k - 1]) / (k + 1))
    return torch.stack([math.sqrt(2 * k + 1) * value for k, value in enumerate(values[:n])], -1)


def _gauss(count: int, end: float) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre quadrature on [0, end]."""
    nodes, masses = np.polynomial.legendre.leggauss(count)
    return _tensor((nodes + 1) / 2 * end), _tensor(masses / 2 * end)


def legs(n: int) -> Basis:
    """The basis of `hippo.legs`: sqrt(2k + 1) P_k(2 exp(-s) - 1), weight exp(-s). Memory of about one unit of time."""
    _check_size(n)
    y, masses = _gauss(n + 2, 1.0)  # exact for polynomials in y = exp(-s) of degree 2 n + 3
    return Basis(lambda s: _legendre(2 * torch.exp(-s) - 1, n), lambda s: torch.exp(-s), -torch.log(y), masses / y)


def legt(n: int, window: float = 2.0) -> Basis:
    """The basis of `hippo.legt`: sqrt(2k + 1) P_k(1 - 2 s / window), equal weight on [0, window]."""
    _check_size(n)
    _check_window(window)
    return Basis(lambda s: _legendre(1 - 2 / window * s, n), lambda s: _box(s, window), *_gauss(n + 2, window))


def fout(n: int, window: float = 2.0) -> Basis:
    """The basis of `hippo.fout`: 1, 0, sqrt2 cos(w s), sqrt2 sin(w s), ..., w = 2 pi / window, equal weight; n even.

    Entry 1 is the sine of frequency 0: nothing. It keeps cosines and sines in pairs.
    """
    _check_size(n)
    _check_window(window)
    if n % 2:
        raise ValueError(f"n: sines and cosines come in pairs, so want an even state size, got {n}")

    def functions(s: Tensor) -> Tensor:
        angle = s.unsqueeze(-1) * (2 * math.pi / window * torch.arange(n // 2, dtype=s.dtype, device="cpu"))
        pairs = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
        return torch.cat(
            [torch.ones_like(s).unsqueeze(-1), torch.zeros_like(s).unsqueeze(-1), pairs[..., 1:, :].flatten(-2)], -1
        )

    # Gauss takes about pi / 2 nodes a period before it converges, then to all digits with a few more.
    return Basis(functions, lambda s: _box(s, window), *_gauss(2 * n + 40, window), periodic=True)


def lagt(n: int, beta: float = 0.0) -> Basis:
    """The basis of `hippo.lagt` with alpha = 0: L_k(s) exp((beta - 1) s / 2), weight exp(-beta s), for all s >= 0.

    Args:
        n: up to 128; the quadrature leaves the range of float64 beyond.
    """
    if not 1 <= n <= 128:
        raise ValueError(f"n: want a state size from 1 to 128, got {n}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta: want a number >= 0, got {beta}")

    def functions(s: Tensor) -> Tensor:
        values = [torch.exp((beta - 1) / 2 * s)]
        values.append((1 - s) * values[0])
        for k in range(1, n - 1):
            values.append(((2 * k + 1 - s) * values[k] - k * values[k - 1]) / (k + 1))
        return torch.stack(values[:n], -1)

    nodes, masses = np.polynomial.laguerre.laggauss(n + 2)
    return Basis(functions, lambda s: torch.exp(-beta * s), _tensor(nodes), _tensor(masses * np.exp(nodes)))


def orthonormalise(functions: Functions, weight: Functions, window: float, *, points: int = 400) -> Basis:
    """A basis of your own: any independent functions, made orthonormal under any weight on [0, window].

    Args:
        functions: lags (...) to values (..., N), made of torch operations; smooth.
        weight: lags (...) to w (...), >= 0; smooth on [0, window]. The system is stable if it does not grow with the
            lag.
        window: where the past that counts ends.
        points: Gauss nodes of the quadrature.

    Raises:
        ValueError: the functions depend on each other.
    """
    _check_window(window)
    lags, masses = _gauss(points, window)
    root = torch.sqrt(masses * weight(lags)).unsqueeze(-1)
    _, R = torch.linalg.qr(root * functions(lags))
    size = torch.diagonal(R).abs()
    if not size.min() > 1e-10 * size.max():
        raise ValueError(f"functions: {R.shape[0]} of them are not independent under this weight")
    change = torch.linalg.inv(R * torch.diagonal(R).sign().unsqueeze(-1))
    return Basis(lambda s: functions(s) @ change, lambda s: weight(s) * (s <= window), lags, masses)


def _box(s: Tensor, window: float) -> Tensor:
    """Mass one, spread over [0, window]."""
    return (s <= window).to(s.dtype) / window
