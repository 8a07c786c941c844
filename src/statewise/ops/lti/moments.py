"""The last state of diagonal systems, sum_t a^(L-1-t) u_t: what a Vandermonde product does to a row, and its back-ends.

It is linear in u and the adjoint of `vandermonde`, so its gradients are products of that kind again.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .._backend import numba_reason, resolve, triton_reason
from .._register import recomputing_kernels
from .modes import parts, split, steps, whole
from .reference import powers


def moments(u: Tensor, log_a: Tensor) -> Tensor:
    """u (B, L, D), log_a (D, N), real or complex, in one precision -> (B, D, N) in the dtype of log_a."""
    real = log_a.new_empty(0).real
    reasons = {"triton": triton_reason(u, real), "numba": numba_reason(u, real), "reference": None}
    return {"triton": _triton, "numba": _numba, "reference": sums}[resolve("moments", reasons)](u, log_a)


def sums(u: Tensor, log_a: Tensor) -> Tensor:
    """As `moments`, in plain PyTorch.

    All powers have exponents >= 0 and are summed directly: nothing is divided by a small a^l.
    """
    B, length, D = u.shape
    Q, chunks = split(length)
    rows = F.pad(u.mT, (chunks * Q - length, 0)).view(B, D, chunks, Q)
    inner = rows @ parts(powers(log_a, Q - 1 - steps(Q, log_a)))
    outer = powers(log_a, Q * (chunks - 1 - steps(chunks, log_a)))
    return (whole(inner, log_a.is_complex()) * outer).sum(-2)


def adjoint(product: Any, grad: Tensor, u: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u and log_a, by the `forward` and `backward` of a module of kernels of the Vandermonde product."""
    weight, length = grad.conj().resolve_conj(), u.shape[1]
    du = product.forward(log_a, weight, length)
    d_log = product.backward(u.mT.flip(-1).to(du.dtype), log_a, weight, length)[0]
    return du.flip(-1).mT.to(u.dtype).contiguous(), d_log


def _fake(u: Tensor, log_a: Tensor) -> Tensor:
    return log_a.new_empty(u.shape[0], *log_a.shape)


_numba, _triton = recomputing_kernels(
    "moments_{}", "Tensor u, Tensor log_a", 1, "statewise.ops.lti.moments_{}", _fake, sums
)
