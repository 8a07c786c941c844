"""States of the convolution after each of several sequences laid end to end."""

from __future__ import annotations

import torch
from torch import Tensor

from .._missing import missing

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]

__getattr__ = missing(__name__)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each sequence, zeros where a sequence is shorter.

    Args:
        x: (T, D), sequences laid end to end.
        cu_seqlens: (S + 1,) where each begins, and where the last one ends.

    Returns:
        (S, D, state_len).
    """
    ends, begins = cu_seqlens[1:, None].long(), cu_seqlens[:-1, None].long()
    places = ends + torch.arange(-state_len, 0, device=x.device)  # (S, state_len)
    found = x[places.clamp(0, max(x.shape[0] - 1, 0))]
    return found.masked_fill((places < begins)[..., None], 0).transpose(1, 2)


causal_conv1d_varlen_states_ref = causal_conv1d_varlen_states
