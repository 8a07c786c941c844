"""Passing states from chunk to chunk, in plain PyTorch (see `ssd_chunk_state`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._missing import missing
from .ssd_chunk_state import last_index

__all__ = ["state_passing", "state_passing_ref"]

__getattr__ = missing(__name__)


def _state_passing_fwd(
    states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
    chunk_size: int | None = None, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state with which each chunk is entered (B, C, H, D), and the state after the last one (B, H, D), float32.

    Args:
        states: (B, C, H, D), what each chunk leaves behind from zero. dA_chunk_cumsum: (B, H, C), its log decay.
        seq_idx: (B, L) with `chunk_size`: a state is not passed on over a chunk in which another document ends.
    """
    decay = dA_chunk_cumsum.exp().permute(2, 0, 1)[..., None]  # (C, B, H, 1)
    if seq_idx is not None:
        if chunk_size is None:
            raise ValueError("_state_passing_fwd: chunk_size: want a number with seq_idx, got None")
        ends = last_index(seq_idx, chunk_size)
        before = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
        decay = decay * (ends == before).t()[..., None, None]
    state = torch.zeros_like(states[:, 0], dtype=decay.dtype) if initial_states is None else initial_states
    state = state.to(decay.dtype)
    entering = []
    for chunk, d in enumerate(decay):
        entering.append(state)
        state = d * state + states[:, chunk].to(decay.dtype)
    return torch.stack(entering, 1).to(out_dtype or states.dtype), state


def state_passing(
    states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state with which each chunk is entered (B, C, H, D), and the state after the last one (B, H, D)."""
    return _state_passing_fwd(states, dA_chunk_cumsum, initial_states)


state_passing_ref = state_passing
