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
    lead, rest = args[:3], args[3:]
    match len(rest):
        case 1:
            return causal_conv1d_fwd_function(*lead, None, None, None, *rest)
        case 2:
            return causal_conv1d_fwd_function(*lead, rest[0], None, None, rest[1])
        case 4:
            return causal_conv1d_fwd_function(*lead, *rest)
        case 5:
            seq_idx, initial, out, final, silu = rest
            out.copy_(causal_conv1d_fwd_function(*lead, seq_idx, initial, final, silu))
            return None
    raise _unknown("causal_conv1d_fwd", len(args), "4, 5, 7 or 8")


@torch.no_grad()
def causal_conv1d_bwd(*args: Any) -> Any:
    """x, weight, bias, dout, then by release:

    1.0: dx, silu.  1.1: seq_idx, dx, silu.
    1.2: seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu.
    1.6: seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu; all are written to.
    """
    lead, rest = args[:4], args[4:]
    match len(rest):
        case 2:
            return causal_conv1d_bwd_function(*lead, None, None, None, rest[0], False, rest[1])[:3]
        case 3:
            return causal_conv1d_bwd_function(*lead, rest[0], None, None, rest[1], False, rest[2])[:3]
        case 6:
            return causal_conv1d_bwd_function(*lead, *rest)
        case 8:
            seq_idx, initial, dfinal, *into, silu = rest
            want = into[3] is not None
            found = causal_conv1d_bwd_function(*lead, seq_idx, initial, dfinal, None, want, silu)
            for target, value in zip(into, found):
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
    lead, rest = args[:4], args[4:]
    match len(rest):
        case 1 | 2 | 3:
            return causal_conv1d_update_function(*lead, *rest)
        case 4:
            rest[0].copy_(causal_conv1d_update_function(*lead, *rest[1:]))
            return None
    raise _unknown("causal_conv1d_update", len(args), "5, 6, 7 or 8")
