"""Functions that take the place of those in the modeling files of transformers.

Each takes the arguments of the function it replaces, and calls that one where Statewise has no fast kernel: other
devices, float64, activations and widths the kernels do not know, a program that is being exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..ops._backend import numba_reason, triton_reason
from ..ops.short_conv import ACTIVATIONS, MAX_WIDTH
from ._accelerate import PARTS
from .shims._adapt import UNLIMITED
from .shims.causal_conv1d.causal_conv1d_interface import conv
from .shims.mamba_ssm.ops.selective_scan_interface import scan as selective
from .shims.mamba_ssm.ops.triton.selective_state_update import step
from .shims.mamba_ssm.ops.triton.ssd_combined import scan as ssd

Function = Callable[..., Any]


def fast(package: str, *tensors: Tensor | None) -> bool:
    """Whether Statewise has kernels for these tensors, and nothing better is installed for them."""
    if torch.compiler.is_exporting():
        return False
    if numba_reason(*tensors) is None:
        return True
    return triton_reason(*tensors) is None and find_spec(package) is None


def _packed(packs: bool, kwargs: dict[str, Any]) -> bool:
    """Whether the call is about packed rows in a model of which not all parts would get to know of it."""
    if kwargs.get("cu_seqlens") is not None and kwargs.get("seq_idx") is None:
        return True
    return not packs and kwargs.get("seq_idx") is not None


def _convolves(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    known = activation in (*ACTIVATIONS, "swish") and weight.shape[-1] <= MAX_WIDTH
    return known and fast("causal_conv1d", hidden_states, weight, bias)


def _silu(activation: str | None) -> str | None:
    return None if activation is None else "silu"


def causal_conv1d_fn(original: Function, packs: bool) -> Function:
    @wraps(original)
    def replacement(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if _packed(packs, kwargs) or not _convolves(hidden_states, weight, bias, activation):
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        return conv(hidden_states, weight, bias, kwargs.get("seq_idx"), None, _silu(activation))[0]

    return replacement


def causal_conv1d_update(original: Function, packs: bool) -> Function:
    @wraps(original)
    def replacement(
        hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:  # fmt: skip
        size, before = conv_state.shape[-1], weight.shape[-1] - 1
        if size < before or not _convolves(hidden_states, weight, bias, activation):
            return original(hidden_states, conv_state, weight, bias, activation=activation)
        window = torch.cat([conv_state, hidden_states.to(conv_state.dtype)], -1)
        conv_state.copy_(window[..., -size:])
        return conv(hidden_states, weight, bias, None, window[..., size - before : size], _silu(activation))[0]

    return replacement


def fused(original: Function, packs: bool) -> Function:
    """None: "not fused", upon which transformers goes on with its own modules and the functions here, one by one.

    There is nothing to gain from doing all at once, and the modules stay in use: adapters on them (LoRA) are respected,
    and so is an activation other than silu.
    """

    @wraps(original)
    def replacement(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        return None if fast("mamba_ssm", first) else original(first, *args, **kwargs)

    return replacement


def mamba_selective_scan(original: Function, packs: bool) -> Function:
    @wraps(original)
    def replacement(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        return_last_state: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if _packed(packs, kwargs) or not fast("mamba_ssm", hidden_states, dt, A, B, C, D, z, delta_bias):
            return original(
                hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
                return_last_state=return_last_state, **kwargs,
            )  # fmt: skip
        y, state = selective(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus)
        return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)

    return replacement


def selective_state_update(original: Function, packs: bool) -> Function:
    @wraps(original)
    def replacement(
        state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        dt_bias: Tensor | None = None, dt_softplus: bool = False, z: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if not fast("mamba_ssm", state, hidden_states, dt, A, B, C, D, z, dt_bias):
            return original(
                state, hidden_states, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **kwargs
            )
        y, new = step(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)
        state.copy_(new)
        return y

    return replacement


def mamba2_chunk_scan(original: Function, packs: bool) -> Function:
    @wraps(original)
    def replacement(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
        dt_bias: Tensor | None = None, initial_states: Tensor | None = None, dt_softplus: bool = False,
        dt_limit: Sequence[float] = UNLIMITED, return_final_states: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        tensors = (hidden_states, dt, A, B, C, D, dt_bias, initial_states)
        if _packed(packs, kwargs) or kwargs.get("z") is not None or not fast("mamba_ssm", *tensors):
            return original(
                hidden_states, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, initial_states=initial_states,
                dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states, **kwargs,
            )  # fmt: skip
        # The original returns float32, and the norm after it takes float32: half precision is not rounded in between.
        y, state = ssd(
            hidden_states.float(), dt, A, B, C, None, D, None, dt_bias, initial_states, kwargs.get("seq_idx"),
            dt_softplus, dt_limit,
        )  # fmt: skip
        return (y, state) if return_final_states else y

    return replacement


# Name in a modeling file: what makes its replacement, and the op that then runs.
HOOKS: dict[str, tuple[Callable[[Function, bool], Function], str]] = {
    "causal_conv1d_fn": (causal_conv1d_fn, "short_conv"),
    "causal_conv1d_update": (causal_conv1d_update, "short_conv"),
    "mamba_inner_fn": (fused, PARTS),
    "mamba_selective_scan": (mamba_selective_scan, "selective_scan"),
    "mamba_selective_state_update": (selective_state_update, "selective_scan_step"),
    "mamba2_split_conv1d_scan_combined": (fused, PARTS),
    "mamba2_selective_state_update": (selective_state_update, "ssd_step"),
    "mamba2_chunk_scan": (mamba2_chunk_scan, "ssd"),
}
