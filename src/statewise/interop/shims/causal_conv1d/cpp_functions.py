"""The functions around the compiled extension of causal-conv1d, which mamba_ssm calls."""

from __future__ import annotations

from torch import Tensor

from .._adapt import gradients
from .._missing import missing
from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_bwd_function", "causal_conv1d_fwd_function", "causal_conv1d_update_function"]

__getattr__ = missing(__name__)


def causal_conv1d_fwd_function(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None,
    final_states_out: Tensor | None, silu_activation: bool,
) -> Tensor:  # fmt: skip
    """`causal_conv1d_fn`; final states are written to `final_states_out` if it is given."""
    want = final_states_out is not None
    activation = "silu" if silu_activation else None
    found = causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, want, final_states_out, activation)
    return found[0] if want else found


def causal_conv1d_bwd_function(
    x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, seq_idx: Tensor | None,
    initial_states: Tensor | None, dfinal_states: Tensor | None, dx: Tensor | None, return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dweight, dbias, dinitial_states); dx is written to the tensor of that name if it is given."""

    def run(x, weight, bias, initial_states):
        activation = "silu" if silu_activation else None
        return causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, True, None, activation)

    (grad, dweight, dbias, dinitial), _ = gradients(run, (x, weight, bias, initial_states), (dout, dfinal_states))
    if dx is not None and grad is not None:
        grad = dx.copy_(grad)
    return grad, dweight, dbias, dinitial if return_dinitial_states else None


def causal_conv1d_update_function(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu_activation: bool,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`causal_conv1d_update`."""
    activation = "silu" if silu_activation else None
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
