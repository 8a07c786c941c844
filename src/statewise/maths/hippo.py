"""HiPPO-LegS: the matrices, their normal part, and its eigen-decomposition.

Everything is computed in float64 with NumPy on the host, whatever torch's default device and dtype are: single
precision eigenvectors differ between machines.

Source: HiPPO (Gu et al., 2020), Theorem 2; S4 (Gu et al., 2021), Theorem 1 and Appendix C (normal plus low rank);
S5 (Smith et al., 2022), section 3.2 and Appendix B.1 (blocks).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


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


def legs_low_rank(n: int) -> Tensor:
    """P (n,): A + P P^T is normal, -1/2 on the diagonal and skew-symmetric off it. Float64."""
    _check_size(n)
    return torch.from_numpy(np.sqrt(np.arange(n, dtype=np.float64) + 0.5))


def legs_normal(n: int) -> Tensor:
    """The normal part A + P P^T (n, n) of HiPPO-LegS. Float64."""
    A, _ = legs(n)
    P = legs_low_rank(n)
    return A + P[:, None] * P[None]


@lru_cache(maxsize=64)
def _legs_eigen(n: int) -> tuple[np.ndarray, np.ndarray]:
    k = np.arange(n, dtype=np.float64)
    root = np.sqrt(k + 0.5)
    skew = np.tril(np.outer(root, root), -1)
    skew = skew.T - skew
    w, V = np.linalg.eigh(-1j * skew)
    # An eigenvector is free up to a phase. Fixing it (first component real and positive) makes the numbers that
    # depend on it, such as a clipped V* B, the same everywhere.
    V = V * (np.abs(V[0]) / V[0])
    return w, V


def legs_diagonal(n: int) -> tuple[Tensor, Tensor]:
    """Half of the eigen-decomposition of the normal part of HiPPO-LegS, the other half being its conjugate.

    Args:
        n: full state size, even.

    Returns:
        Lambda (n/2,) complex128: -1/2 + i w with w < 0, ascending in w.
        V (n, n/2) complex128: orthonormal eigenvectors. The normal part is 2 Re(V diag(Lambda) V^*).
    """
    _check_size(n)
    if n % 2:
        raise ValueError(f"n: eigenvalues come in conjugate pairs only for an even state size, got {n}")
    w, V = _legs_eigen(n)
    half = n // 2
    return torch.from_numpy(-0.5 + 1j * w[:half]), torch.from_numpy(V[:, :half].copy())


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
