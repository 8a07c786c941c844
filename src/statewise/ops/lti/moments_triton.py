"""The last state of diagonal systems on a GPU: what `vandermonde_triton` gives as the gradient of coefficients that are
zero, and as gradients of those."""

from __future__ import annotations

from torch import Tensor

from . import vandermonde_triton as vandermonde
from .moments import adjoint


def forward(u: Tensor, log_a: Tensor) -> Tensor:
    """u (B, L, D), log_a (D, N): (B, D, N)."""
    weight = log_a.new_zeros(u.shape[0], *log_a.shape)
    return vandermonde.backward(u.flip(1).mT.float(), log_a, weight, u.shape[1])[1].conj().resolve_conj()


def backward(grad: Tensor, u: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u and log_a."""
    return adjoint(vandermonde, grad, u, log_a)
