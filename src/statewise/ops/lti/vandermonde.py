"""The kernel of a diagonal state space, K_l = Re(sum_n c_n a_n^l): a Vandermonde product, and its back-ends.

All of them cut it in two: with l = q Q + r it is a matrix product of c a^(q Q) and a^r. So about 2 sqrt(L) powers per
mode are made, not L of them; no power is the product of many rounded ones; and the backward pass makes them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._backend import numba_reason, resolve, triton_reason
from .._precision import no_autocast, widen
from .._register import recomputing_kernels
from .modes import dot_parts, parts, split, steps
from .reference import powers

_OP = "diagonal_kernel"


def reasons(log_a: Tensor, coeff: Tensor) -> dict[str, str | None]:
    """For each back-end, None if it serves these inputs and else why not, in order of preference."""
    # The kernels compute in float32, and complex numbers are pairs of those.
    numbers = [t.new_empty(0).real for t in (log_a, coeff)]
    return {"triton": triton_reason(*numbers), "numba": numba_reason(*numbers), "reference": None}


def diagonal_kernel(
    log_a: Tensor, coeff: Tensor, length: int, *, conjugate: bool = True, backend: str | None = None
) -> Tensor:
    """The kernel K_l = sum_n coeff_n exp(l log_a_n), l = 0 ... length - 1 (a Vandermonde product).

    Args:
        log_a: (D, N), natural log of the factor per step, complex or real; real part <= 0 for a stable system.
        coeff: (..., D, N), the products c_n b_n; one kernel for each of the leading axes.
        conjugate: the modes stand for conjugate pairs of which one half is stored: twice the real part is returned.
            False: the real part. Without effect on real modes.
        backend: "triton", "numba" (both single precision), "reference" (matrix products), or None.

    Returns:
        (..., D, length), real. About 2 sqrt(length) powers per mode are held, never (D, N, length), and the kernels
        hold those of one channel at a time. Phases are exact to a small part of a turn at any length, so in float32 the
        result is within a few units of rounding times sum_n |coeff_n|.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not go together.
        BackendError: a back-end that cannot serve.

    Source: S4D (Gu et al., 2022), section 3.2; DSS (Gupta et al., 2022), Proposition 1.
    """
    sizes: dict[str, int] = {}
    _checks.shape(_OP, "log_a", log_a, ("D", "N"), sizes)
    lead = tuple(coeff.shape[:-2])
    _checks.shape(_OP, "coeff", coeff, (*lead, "D", "N"), sizes)
    _checks.same_kind(_OP, ("log_a", log_a.real), log_a=log_a, coeff=coeff)
    if length < 0:
        raise ValueError(f"{_OP}: length: want 0 or more, got {length}")
    log_a, coeff = widen(log_a), widen(coeff)
    dtype = torch.promote_types(log_a.dtype, coeff.dtype)
    coeff = coeff.to(dtype)
    with no_autocast(log_a):
        return vandermonde(
            log_a.to(dtype), 2 * coeff if dtype.is_complex and conjugate else coeff, length, backend
        )  # fmt: skip


def vandermonde(log_a: Tensor, coeff: Tensor, length: int, backend: str | None = None) -> Tensor:
    """Re(sum_n coeff_n a_n^l) for l < length: log_a (D, N), coeff (..., D, N) of one dtype -> (..., D, length)."""
    run = {"triton": _triton, "numba": _numba, "reference": products}
    return run[resolve(_OP, reasons(log_a, coeff), backend)](log_a, coeff, length)


def products(log_a: Tensor, coeff: Tensor, length: int) -> Tensor:
    """As `vandermonde`, in plain PyTorch."""
    Q, chunks = split(length)
    left = coeff.unsqueeze(-2) * powers(log_a, steps(chunks, log_a) * Q)  # (..., D, chunks, N)
    right = powers(log_a, steps(Q, log_a))  # (D, Q, N)
    return (parts(left) @ dot_parts(right).mT).flatten(-2)[..., :length]


def _fake(log_a: Tensor, coeff: Tensor, length: int) -> Tensor:
    return coeff.new_empty((*coeff.shape[:-1], length), dtype=_checks.real_dtype(coeff.dtype))


_numba, _triton = recomputing_kernels(
    "vandermonde_{}", "Tensor log_a, Tensor coeff, int length", 1, "statewise.ops.lti.vandermonde_{}", _fake, products
)
