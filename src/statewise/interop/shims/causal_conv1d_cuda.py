"""The compiled extension of causal-conv1d, with the arguments of every release since 1.0.

They take positional arguments only, and their number tells the releases apart.
"""

from __future__ import annotations

from typing import Any

import torch

from ._missing import missing
from .causal_conv1d.cpp_functions import (
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
    causal_conv1d_update_function,
)

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update"]

__getattr__ = missing(__name__)


def _unknown(name: str, number: int, known: str) -> TypeError:
    return TypeError(f"causal_conv1d_cuda.{name}: want {known} arguments, got {number}")


@torch.no_grad()
def causal_conv1d_fwd(*args: Any) -> Any:
    """x, weight, bias, then by release:

    1.0: silu.  1.1: seq_idx, silu.  1.2: seq_idx, initial_states, final_states_out, silu.
    1.6: seq_idx, initial_states, out, final_states_out, silu, which returns nothing and writes to `out`.
    """
    match args:
        case (x, weight, bias, silu):
            return causal_conv1d_fwd_function(x, weight, bias, None, None, None, silu)
        case (x, weight, bias, seq_idx, silu):
            return causal_conv1d_fwd_function(x, weight, bias, seq_idx, None, None, silu)
        case (x, weight, bias, seq_idx, initial, final, silu):
            return causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial, final, silu)
        case (x, weight, bias, seq_idx, initial, out, final, silu):
            out.copy_(causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial, final, silu))
            return None
    raise _unknown("causal_conv1d_fwd", len(args), "4, 5, 7 or 8")


@torch.no_grad()
def causal_conv1d_bwd(*args: Any) -> Any:
    """x, weight, bias, dout, then by release:

    1.0: dx, silu.  1.1: seq_idx, dx, silu.
    1.2: seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu.
    1.6: seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu; all are written to.
    """
    match args:
        case (x, weight, bias, dout, dx, silu):
            return causal_conv1d_bwd_function(x, weight, bias, dout, None, None, None, dx, False, silu)[:3]
        case (x, weight, bias, dout, seq_idx, dx, silu):
            return causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, None, None, dx, False, silu)[:3]
        case (x, weight, bias, dout, seq_idx, initial, dfinal, dx, want, silu):
            return causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, initial, dfinal, dx, want, silu)
        case (x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu):
            found = causal_conv1d_bwd_function(
                x, weight, bias, dout, seq_idx, initial, dfinal, None, dinitial is not None, silu
            )
            for target, value in zip((dx, dweight, dbias, dinitial), found):
                if target is not None and value is not None:
                    target.copy_(value)
            return None
    raise _unknown("causal_conv1d_bwd", len(args), "6, 7, 10 or 12")


@torch.no_grad()
def causal_conv1d_update(*args: Any) -> Any:
    """x, conv_state, weight, bias, then by release:

    1.0: silu.  1.4: silu, cache_seqlens.  1.5: silu, cache_seqlens, conv_state_indices.
    1.6: out, silu, cache_seqlens, conv_state_indices, which returns nothing and writes to `out`.
    """
    match args:
        case (x, state, weight, bias, silu, *ring):
            if len(ring) < 3:
                return causal_conv1d_update_function(x, state, weight, bias, silu, *ring)
            if len(ring) == 3:
                out, (silu, cache_seqlens, indices) = silu, ring
                out.copy_(causal_conv1d_update_function(x, state, weight, bias, silu, cache_seqlens, indices))
                return None
    raise _unknown("causal_conv1d_update", len(args), "5, 6, 7 or 8")
