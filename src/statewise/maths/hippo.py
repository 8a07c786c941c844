"""HiPPO: matrices of systems that remember their input, and the eigen-decomposition of their normal parts.

x' = A x + B u holds coefficients of the past of u in some basis; which basis that is, and how to get the past back, is
in `maths.bases`. All are time-invariant. (The memory of the whole past with equal weight divides those of LegS by
the time: see `maths.memory.project_scaled`.)

Everything is computed in float64 with NumPy on the host, whatever torch's default device and dtype are: single
precision eigenvectors differ between machines.

Source: HiPPO (Gu et al., 2020), Theorems 1 and 2, Appendix D; How to Train Your HiPPO (Gu et al., 2022), section 3
(FouT, and what the kernels mean); S4 (Gu et al., 2021), Theorem 1 and Appendix C (normal plus low rank); S5 (Smith et
al., 2022), section 3.2 and Appendix B.1 (blocks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._names import unknown


def _check_size(n: int, name: str = "n") -> None:
    if n < 1:
        raise ValueError(f"{name}: want a positive state size, got {n}")


def legs(n: int) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of HiPPO-LegS in its time-invariant form, x' = A x + B u. Float64.

    (exp(s A) B)_k = sqrt(2k + 1) exp(-s) P_k(2 exp(-s) - 1) with P_k the Legendre polynomials.
    """
    _check_size(n)
    k = np.arange(n, dtype=np.float64)
    root = np.sqrt(2 * k + 1)
    A = -np.tril(np.outer(root, root), -1) - np.diag(k + 1)
    return torch.from_numpy(A), torch.from_numpy(root)


def _check_window(window: float) -> None:
    if not 0 < window < math.inf:
        raise ValueError(f"window: want a positive length of time, got {window}")


def legt(n: int, window: float = 2.0) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of HiPPO-LegT: Legendre polynomials over the last `window` units of time. Float64.

    (exp(s A) B)_k tends to sqrt(2k + 1) P_k(1 - 2 s / window) / window on [0, window], and to 0 after, as n grows. The
    papers have window 1, the matrices that are used in S4 window 2.
    """
    _check_size(n)
    _check_window(window)
    k = np.arange(n)
    root = np.sqrt(2.0 * k + 1)
    sign = np.where(k[:, None] < k, (-1.0) ** (k[:, None] - k), 1.0)
    return torch.from_numpy(-np.outer(root, root) * sign / window), torch.from_numpy(root / window)


def lmu(n: int, window: float = 1.0) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of the Legendre memory unit: LegT whose coefficients belong to plain Legendre polynomials.

    u(t - s) is about sum_k x_k P_k(2 s / window - 1): the coefficients are those of `legt` times (-1)^k sqrt(2k + 1).
    Float64.

    Source: Legendre Memory Units (Voelker et al., 2019), equation 2; HiPPO (Gu et al., 2020), Appendix D.1.
    """
    A, B = legt(n, window)
    k = torch.arange(n, dtype=torch.float64, device="cpu")
    scale = (-1.0) ** k * torch.sqrt(2 * k + 1)
    return scale[:, None] * A / scale, scale * B


def lagt(n: int, alpha: float = 0.0, beta: float = 0.0) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of HiPPO-LagT: Laguerre functions, for a past that never ends. Float64.

    (exp(s A) B)_k = h_k L_k^(alpha)(s) exp(-(1 + beta) s / 2), L_k^(alpha) the generalised Laguerre polynomials and
    h_k = sqrt(k! / Gamma(k + alpha + 1)). The past is weighted with s^-alpha exp(-beta s). With alpha = beta = 0 all of
    it counts alike (the kernels are orthonormal); with alpha = 0, beta = 1 it counts with exp(-s), as in LegS.

    The weight is not scaled to mass one. Multiply B by sqrt(beta^(1 - alpha) / Gamma(1 - alpha)) for that.

    Args:
        alpha: > -1.
        beta: rate at which the past loses weight, >= 0.
    """
    _check_size(n)
    if not -1 < alpha < math.inf:
        raise ValueError(f"alpha: want a number > -1, got {alpha}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta: want a number >= 0, got {beta}")
    norm = np.exp(0.5 * np.array([math.lgamma(k + 1) - math.lgamma(k + alpha + 1) for k in range(n)]))
    A = -np.tril(np.ones((n, n)), -1) * np.outer(norm, 1 / norm) - (1 + beta) / 2 * np.eye(n)
    return torch.from_numpy(A), torch.from_numpy(1 / (norm * math.gamma(alpha + 1)))


def _fourier(n: int, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """D and p(0) of p = 1, sin 0, sqrt2 cos(w_1 s), sqrt2 sin(w_1 s), ...: p' = D p, with w_0 = 0."""
    _check_size(n)
    if n % 2:
        raise ValueError(f"n: sines and cosines come in pairs, so want an even state size, got {n}")
    derivative, at_zero = np.zeros((n, n)), np.zeros(n)
    for k, frequency in enumerate(frequencies):
        derivative[2 * k, 2 * k + 1], derivative[2 * k + 1, 2 * k] = -frequency, frequency
    at_zero[::2] = math.sqrt(2)
    at_zero[0] = 1
    return derivative, at_zero


def fout(n: int, window: float = 2.0) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of FouT: a Fourier series over the last `window` units of time; n even. Float64.

    (exp(s A) B)_k tends to 1, 0, sqrt2 cos(w s), sqrt2 sin(w s), sqrt2 cos(2 w s), ... divided by `window`, with
    w = 2 pi / window, on [0, window], and to 0 after, as n grows. (Entry 1 is the sine of frequency 0.)
    """
    _check_window(window)
    derivative, at_zero = _fourier(n, 2 * math.pi / window * np.arange(n // 2))
    return torch.from_numpy(derivative - 2 / window * np.outer(at_zero, at_zero)), torch.from_numpy(
        2 / window * at_zero
    )


def fourier_decay(n: int) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of FouT (window 2) with half the low-rank term and half the input; n even. Float64."""
    derivative, at_zero = _fourier(n, math.pi * np.arange(n // 2))
    return torch.from_numpy(derivative - np.outer(at_zero, at_zero) / 2), torch.from_numpy(at_zero / 2)


def foud(n: int) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of the diagonal Fourier system: frequencies 2 pi k, all decaying at rate 1/2; n even.

    Float64. A is normal.
    """
    derivative, at_zero = _fourier(n, 2 * math.pi * np.arange(n // 2))
    return torch.from_numpy(derivative - np.eye(n) / 2), torch.from_numpy(at_zero)


def legsd(n: int) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,): the normal part of LegS with half the input, what S4D-LegS diagonalises. Float64."""
    _, B = legs(n)
    return legs_normal(n), B / 2


def _legt_low_rank(n: int) -> Tensor:
    # 1 + (-1)^(i - k) is 2 where i and k are both even or both odd, so each half has a rank-one part of its own.
    B, even = legt(n)[1], torch.arange(n, device="cpu") % 2 == 0
    return torch.stack([B * even, B * ~even]) * math.sqrt(2)


def _nothing(n: int) -> Tensor:
    return torch.zeros(0, n, dtype=torch.float64, device="cpu")


class Family(NamedTuple):
    """(A, B) of state size n, and the P of `low_rank`; None where there is none."""

    system: Callable[[int], tuple[Tensor, Tensor]]
    low_rank: Callable[[int], Tensor] | None


FAMILIES: dict[str, Family] = {
    "legs": Family(legs, lambda n: legs_low_rank(n).unsqueeze(0)),
    "legt": Family(legt, _legt_low_rank),
    "lagt": Family(lagt, lambda n: lagt(n)[1].unsqueeze(0) / math.sqrt(2)),
    "fout": Family(fout, lambda n: fout(n)[1].unsqueeze(0)),
    "lmu": Family(lmu, None),
    "legsd": Family(legsd, _nothing),
    "foud": Family(foud, _nothing),
    "fourier_decay": Family(fourier_decay, lambda n: fourier_decay(n)[1].unsqueeze(0) * math.sqrt(2)),
}


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(unknown("family", name, FAMILIES))
    return FAMILIES[name]


def system(family: str, n: int) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of a family by name (see `FAMILIES`). Float64."""
    return _family(family).system(n)


def low_rank(family: str, n: int) -> Tensor:
    """P (r, n): A + P^T P of `system(family, n)` is a multiple of the identity plus a skew-symmetric matrix. Float64.

    The rank r is 1 for "legs", "lagt", "fout" and "fourier_decay", 2 for "legt", and 0 for "legsd" and "foud".

    Raises:
        ValueError: an unknown family, or one without such a P ("lmu").
    """
    found = _family(family).low_rank
    if found is None:
        raise ValueError(f"family: {family!r} is no normal matrix plus one of low rank")
    return found(n)


def legs_low_rank(n: int) -> Tensor:
    """P (n,): A + P P^T is normal, -1/2 on the diagonal and skew-symmetric off it. Float64."""
    _check_size(n)
    return torch.from_numpy(np.sqrt(np.arange(n, dtype=np.float64) + 0.5))


def legs_normal(n: int) -> Tensor:
    """The normal part A + P P^T (n, n) of HiPPO-LegS. Float64."""
    A, _ = legs(n)
    P = legs_low_rank(n)
    return A + P[:, None] * P[None]


# Smaller eigenvalues than this stand for zero: those of the families that are not zero are above 1/10.
_ZERO = 1e-4


@lru_cache(maxsize=64)
def _eigen(family: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    A, P = system(family, n)[0].numpy(), low_rank(family, n).numpy()
    normal = A + P.T @ P
    # Exactly skew-symmetric, from the upper half: that of LegS is a plain product, A being zero there.
    upper = np.triu(normal, 1)
    w, V = np.linalg.eigh(-1j * (upper - upper.T))
    half = n // 2
    w, V = w[:half], V[:, :half]
    if abs(w[-1]) < _ZERO:
        # A Fourier basis has one pair of zeros, for the constant and a mode that nothing reaches. Any basis of that
        # plane is an eigenbasis; the kept vector and its conjugate have to span it.
        w[-1] = 0
        V[:, -1] = 0
        V[:2, -1] = np.array([1, 1j]) / np.sqrt(2)
    # An eigenvector is free up to a phase. Fixing it (first component that is not small real and positive) makes the
    # numbers that depend on it, such as a clipped V* B, the same everywhere.
    lead = V[np.argmax(np.abs(V) > 1e-3 / np.sqrt(n), axis=0), np.arange(half)]
    decay = round(2 * normal.diagonal().mean()) / 2  # all families have 0 or -1/2, which rounding may miss
    return decay + 1j * w, V * (np.abs(lead) / lead)


def check_pairs(n: int) -> None:
    """Raise ValueError for a state size that is no number of conjugate pairs."""
    if n < 2 or n % 2:
        raise ValueError(f"n: want an even state size >= 2 (eigenvalues come in conjugate pairs), got {n}")


def normal_diagonal(family: str, n: int) -> tuple[Tensor, Tensor]:
    """Half of the eigen-decomposition of the normal part A + P^T P of a family, the other half being its conjugate.

    Args:
        family: one that `low_rank` knows. n: full state size, even.

    Returns:
        Lambda (n/2,) complex128: decay + i w with w <= 0, ascending in w; the decay is 0 or -1/2.
        V (n, n/2) complex128: orthonormal eigenvectors. The normal part is 2 Re(V diag(Lambda) V^*).
    """
    check_pairs(n)
    Lambda, V = _eigen(family, n)
    return torch.from_numpy(Lambda.copy()), torch.from_numpy(V.copy())


def legs_diagonal(n: int) -> tuple[Tensor, Tensor]:
    """`normal_diagonal` of LegS: -1/2 + i w with w < 0."""
    return normal_diagonal("legs", n)


def legs_block_diagonal(n: int, blocks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`blocks` copies of the LegS decomposition of size n / blocks, as S5 uses it.

    Returns:
        Lambda (n/2,), V (n, n/2) and V^* (n/2, n), complex128; V is block-diagonal.
    """
    _check_size(n)
    if blocks < 1 or n % (2 * blocks):
        raise ValueError(f"blocks: want blocks of an even size, so 2 * blocks must divide {n}, got blocks={blocks}")
    Lambda, V = legs_diagonal(n // blocks)
    V = torch.block_diag(*[V] * blocks)
    return Lambda.repeat(blocks), V, V.mH.contiguous()
