"""HiPPO matrices as normal plus low rank, and diagonal plus low rank in the basis of the normal part's eigenvectors.

A = N - sum_r P_r P_r^T with N normal, so A = V (diag(Lambda) - sum_r (V^* P_r)(V^* P_r)^*) V^*. That is what makes S4
cheap: V is unitary, while the eigenvectors of A itself are so close to parallel that no computer can use them.

Everything is computed in float64 with NumPy on the host: single precision eigenvectors differ between machines.

Source: S4 (Gu et al., 2021), Theorem 1 and appendix C; How to Train Your HiPPO (Gu et al., 2022), section 3 ("legt" and
"fout" on a window of length 2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._names import unknown
from .hippo import check_pairs, low_rank, normal_diagonal, system

# Families with matrices for S4, and the rank of what makes them normal.
DPLR_RANKS = {"legs": 1, "legt": 2, "fout": 1}


class DPLR(NamedTuple):
    """A = V (diag(Lambda) - sum_r P_r P_r^*) V^* plus its complex conjugate: half of each conjugate pair is kept.

    Args:
        Lambda: (n/2,) complex128, Re Lambda <= 0 and Im Lambda <= 0, ascending in Im.
        P: (rank, n/2) complex128.
        B: (n/2,) complex128, V^* B.
        V: (n, n/2) complex128, orthonormal.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def nplr(init: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (n, n), B (n,) and P (rank, n) of a HiPPO family; A + sum_r P_r P_r^T is a skew-symmetric matrix plus a
    multiple of the identity.

    Args:
        init: "legs" (memory that fades, rank 1), "legt" (Legendre polynomials on the last 2 time units, rank 2) or
            "fout" (a Fourier series on the last 2 time units, rank 1).
        n: state size, even and at least 2.
    """
    if init not in DPLR_RANKS:
        raise ValueError(unknown("init", init, DPLR_RANKS))
    check_pairs(n)
    return *system(init, n), low_rank(init, n)


def diagonal_plus_low_rank(init: str, n: int, rank: int | None = None, *, b_clip: float | None = 2.0) -> DPLR:
    """A HiPPO family in the basis of the eigenvectors of its normal part, half of each conjugate pair.

    Args:
        init, n: as in `nplr`.
        rank: number of rows of P; those that the family does not need are zero. None: as many as it needs.
        b_clip: bound on |Im B|, None for no bound. S4 clips at 2.

    Raises:
        ValueError: an unknown family, an odd size, or a rank below what the family needs.
    """
    _, B, P = nplr(init, n)
    rank = len(P) if rank is None else rank
    if rank < len(P):
        raise ValueError(f"rank: init={init!r} needs {len(P)}, got {rank}")
    Lambda, V = normal_diagonal(init, n)
    low = P.to(V.dtype) @ V.conj()
    low = torch.cat([low, low.new_zeros(rank - len(P), n // 2)])
    into = V.mH @ B.to(V.dtype)
    if b_clip is not None:
        into = torch.complex(into.real, into.imag.clamp(-b_clip, b_clip))
    return DPLR(Lambda, low, into, V)
