"""transformers: the functions that its Mamba and Mamba-2 models call when no CUDA kernels are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import Run


def selective_scan(inputs: Mapping[str, Any], mode: str) -> Run:
    """Mamba's loop over time, and its step with a cache."""
    from transformers.models.mamba import modeling_mamba as mamba

    x, dt, A, B, C, D, z, bias = (inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    if mode == "step":
        state = inputs["state"].clone()

        def step():
            y = mamba.mamba_selective_state_update(state, x, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)
            return y, state

        return step

    def run():
        x_, dt_, B_, C_, z_ = (t.transpose(1, 2) for t in (x, dt, B, C, z))
        y, state = mamba.mamba_selective_scan(
            x_, dt_, A, B_, C_, D, z=z_, delta_bias=bias, delta_softplus=True, return_last_state=True
        )
        return y.transpose(1, 2), state

    return run


def _ssd(inputs: Mapping[str, Any], mode: str, chunk: int) -> Run:
    from transformers.models.mamba2 import modeling_mamba2 as mamba2

    x, dt, A, B, C, D, bias = (inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
    if mode == "step":
        state = inputs["state"].clone()
        P, N = state.shape[2:]

        def step():
            y = mamba2.mamba2_selective_state_update(
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

    return lambda: mamba2.mamba2_chunk_scan(
        x, dt, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True
    )


def ssd(inputs: Mapping[str, Any], mode: str) -> Run:
    """Mamba-2 in chunks of 256, the default of its configuration; and its step with a cache."""
    return _ssd(inputs, mode, 256)


def ssd_64(inputs: Mapping[str, Any], mode: str) -> Run:
    """The same in chunks of 64, which suit a CPU better."""
    return _ssd(inputs, mode, 64)
