"""CUDA and Triton kernels of other libraries, where they are installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import softplus

from . import Run


def selective_scan(inputs: Mapping[str, Any], mode: str) -> Run:
    """mamba_ssm's CUDA scan, and its Triton step."""
    x, dt, A, B, C, D, z, bias = (inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    if mode == "step":
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        state = inputs["state"].clone()
        return lambda: (
            selective_state_update(state, x, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True),
            state,
        )
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def run():
        x_, dt_, B_, C_, z_ = (t.transpose(1, 2) for t in (x, dt, B, C, z))
        y, state = selective_scan_fn(
            x_, dt_, A, B_, C_, D, z=z_, delta_bias=bias, delta_softplus=True, return_last_state=True
        )
        return y.transpose(1, 2), state

    return run


def ssd(inputs: Mapping[str, Any], mode: str) -> Run:
    """mamba_ssm's five Triton kernels in chunks of 256, and its step."""
    x, dt, A, B, C, D, bias = (inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
    if mode == "step":
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        state = inputs["state"].clone()
        P, N = state.shape[2:]

        def step():
            y = selective_state_update(
                state,
                x,
                dt[..., None].expand(-1, -1, P),
                A[:, None, None].expand(-1, P, N),
                B,
                C,
                D[:, None].expand(-1, P),
                dt_bias=bias[:, None].expand(-1, P),
                dt_softplus=True,
            )
            return y, state

        return step
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return lambda: mamba_chunk_scan_combined(
        x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True
    )


def simple_gla(inputs: Mapping[str, Any], mode: str) -> Run:
    """flash-linear-attention: SSD as linear attention with one decay per head (the step and the skip are ours)."""
    from fla.ops.simple_gla import chunk_simple_gla

    x, dt, A, B, C, D, bias = (inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "dt_bias"))

    def run():
        step = softplus((dt + bias).float())
        heads = (*B.shape[:2], x.shape[2], B.shape[3])
        y, state = chunk_simple_gla(
            q=C.expand(heads),
            k=B.expand(heads),
            v=(x * step[..., None]).to(x.dtype),
            g=step * A.float(),
            scale=1.0,
            output_final_state=True,
        )
        return y + D[:, None] * x, state.transpose(-1, -2)

    return run


def short_conv(inputs: Mapping[str, Any], mode: str) -> Run:
    """causal-conv1d's CUDA kernel with bias and SiLU fused, and its step."""
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    if mode == "step":
        # Its state holds the current input as well.
        old = inputs["state"].transpose(1, 2)
        state = torch.cat([torch.zeros_like(old[..., :1]), old], -1).contiguous()
        return lambda: (causal_conv1d_update(x, state, weight, bias, "silu"), None)
    return lambda: (causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2), None)
