"""SSD on coefficients that are discretised already."""

from __future__ import annotations

import torch
from torch import Tensor

from .....ops.ssd import reference
from ..._missing import missing

__all__ = ["segsum", "ssd_minimal_discrete"]

__getattr__ = missing(__name__)


def segsum(x: Tensor) -> Tensor:
    """(..., T) -> (..., T, T): the sum of x over j+1..i at (i, j), minus infinity above the diagonal."""
    return reference.decay_matrix(x, None).log()


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) and the last state (B, H, P, N).

    Args:
        X: (B, L, H, P), values times their step size. A: (B, L, H), natural log of the decay per step, <= 0.
        B, C: (B, L, H, N). initial_states: (B, 1, H, P, N) or (B, H, P, N).
    """
    rows, _, heads, width = X.shape
    state = X.new_zeros(rows, heads, width, B.shape[-1])
    if initial_states is not None:
        state = initial_states.reshape_as(state)
    return reference.chunked(X, torch.ones_like(A), A, B, C, state, None, block_len)
