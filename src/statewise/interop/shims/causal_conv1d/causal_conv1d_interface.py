"""The short causal convolution with the arguments of causal-conv1d: channels first, (B, D, L)."""

from __future__ import annotations

import torch
from torch import Tensor

from ....ops.short_conv import short_conv
from .._adapt import conv_activation, documents, fit, like
from .._missing import missing

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]

__getattr__ = missing(__name__)


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False,
    final_states_out: Tensor | None = None, activation: str | None = None,
):  # fmt: skip
    """`statewise.ops.short_conv`, channels first.

    Args:
        x: (B, D, L), in either layout; the result has the same. weight: (D, K). bias: (D,).
        seq_idx: (B, L), the document of each position; negative: padding.
        initial_states: (B, D, K - 1), the inputs before x; with seq_idx they belong to the document with index 0.
        return_final_states: also return the last K - 1 inputs (B, D, K - 1), or write them to `final_states_out`.
        activation: None, "silu" or "swish".
    """
    y, final = conv(x, weight, bias, seq_idx, initial_states, conv_activation(activation))
    if not return_final_states:
        return y
    return y, final if final_states_out is None else final_states_out.copy_(final)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`causal_conv1d_fn` with the last inputs (B, D, K - 1) always returned."""
    state = None if initial_states is None else initial_states.transpose(1, 2)
    weight, bias, state = fit(x, weight, bias, state)
    seg = documents(seq_idx, continues=state is not None)
    y, state = short_conv(x.transpose(1, 2), weight, bias, activation, state=state, seg=seg)
    return like(y.transpose(1, 2), x), state.transpose(1, 2).to(x.dtype)


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_states: Tensor | None = None,
    return_final_states: bool = False, final_states_out: Tensor | None = None, activation: str | None = None,
):  # fmt: skip
    """The same on the plain PyTorch definition."""
    from ....ops import use_backend

    with use_backend("reference"):
        return causal_conv1d_fn(
            x, weight, bias, None, initial_states, return_final_states, final_states_out, activation
        )


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One or more positions of the convolution; `conv_state` is written in place.

    Args:
        x: (B, D) or (B, D, L).
        conv_state: (B, D, S) with S >= K - 1: the last S inputs, oldest first.
        cache_seqlens: (B,), then conv_state is a ring: the inputs x go to places cache_seqlens, cache_seqlens + 1, ...
            modulo S.
        conv_state_indices: (B,) row of conv_state for each row of x; a negative index is padding, whose output is zero.

    Returns:
        The shape of x. No gradient flows through the state.
    """
    active = conv_activation(activation)
    if conv_state_indices is None:
        return _update(x, conv_state, weight, bias, active, cache_seqlens)
    taken = conv_state_indices >= 0
    rows = conv_state_indices[taken].long()
    state = conv_state[rows]
    y = _update(x[taken], state, weight, bias, active, None if cache_seqlens is None else cache_seqlens[taken])
    with torch.no_grad():
        conv_state[rows] = state
    return torch.zeros_like(x).masked_scatter(taken.reshape(-1, *(1,) * (x.ndim - 1)), y)


def _update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    cache_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    new = x if x.ndim == 3 else x[..., None]
    size, places = conv_state.shape[-1], weight.shape[1] - 1
    if size < places:
        raise ValueError(f"causal_conv1d_update: conv_state: want (B, D, S) with S >= {places}, got S = {size}")
    if cache_seqlens is None:
        before = conv_state[..., size - places :].detach().clone()
        with torch.no_grad():
            conv_state.copy_(torch.cat([conv_state, new.to(conv_state.dtype)], -1)[..., -size:])
    else:
        steps = torch.arange(-places, new.shape[-1], device=x.device)
        ring = ((steps + cache_seqlens[:, None]) % size)[:, None].expand(-1, x.shape[1], -1).long()
        before = conv_state.gather(2, ring[..., :places]).detach()
        with torch.no_grad():
            conv_state.scatter_(2, ring[..., places:], new.to(conv_state.dtype))
    y, _ = conv(new, weight, bias, None, before, activation)
    return y if x.ndim == 3 else y[..., 0]


def causal_conv1d_update_ref(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same on the plain PyTorch definition."""
    from ....ops import use_backend

    with use_backend("reference"):
        return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)
