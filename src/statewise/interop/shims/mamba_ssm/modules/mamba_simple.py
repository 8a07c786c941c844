"""Mamba with the parameters, states and options of mamba_ssm; and of the fork of Vision Mamba."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .....maths.initialisers import inverse_softplus_dt
from .....ops._dt import decay_rate
from ..._missing import missing
from ...causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ..ops.selective_scan_interface import (
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    selective_scan_fn,
)
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from ..ops.triton.selective_state_update import selective_state_update
from . import block
from ._common import Cached, depthwise, last_inputs, no_decay

__all__ = [
    "Block",
    "Mamba",
    "RMSNorm",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "layer_norm_fn",
    "mamba_inner_fn",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_state_update",
]

__getattr__ = missing(__name__)


class Mamba(Cached, nn.Module):
    """The Mamba mixer, (B, L, D) to (B, L, D).

    Args:
        use_fast_path: has no effect on results or speed; both paths of the original are one here.
        bimamba_type: "none"; "v1": a second scan from the end, which shares all but its decay rates; "v2": one which
            shares nothing but the projections in and out (both from the fork of Vision Mamba).
        if_divide_out: with "v2", halve the sum of both directions.
        init_layer_scale: multiply the output by a learned scale per channel that starts here.
    """

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: float = 2, dt_rank: int | str = "auto",
        dt_min: float = 0.001, dt_max: float = 0.1, dt_init: str = "random", dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4, conv_bias: bool = True, bias: bool = False, use_fast_path: bool = True,
        layer_idx: int | None = None, device=None, dtype=None, bimamba_type: str | None = "none",
        if_divide_out: bool = False, init_layer_scale: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if bimamba_type not in (None, "none", "v1", "v2"):
            raise ValueError(f"Mamba: bimamba_type: want 'none', 'v1' or 'v2', got {bimamba_type!r}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.if_divide_out = bimamba_type, if_divide_out
        self.init_layer_scale = init_layer_scale
        self.activation, self.act = "silu", nn.SiLU()
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), device=device))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **options)

        def direction() -> tuple[nn.Conv1d, nn.Linear, nn.Linear]:
            conv = depthwise(self.d_inner, d_conv, conv_bias, **options)
            x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **options)
            return conv, x_proj, nn.Linear(self.dt_rank, self.d_inner, **options)

        self.conv1d, self.x_proj, self.dt_proj = direction()
        bound = dt_scale / math.sqrt(self.dt_rank)
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        else:
            raise NotImplementedError(f"Mamba: dt_init: want 'random' or 'constant', got {dt_init!r}")
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus_dt(self.d_inner, dt_min, dt_max, dt_init_floor, device, dtype))
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self.A_log = self._rates(device)
        self.D = no_decay(nn.Parameter(torch.ones(self.d_inner, device=device)))
        if bimamba_type in ("v1", "v2"):
            self.A_b_log = self._rates(device)
        if bimamba_type == "v2":
            self.conv1d_b, self.x_proj_b, self.dt_proj_b = direction()
            self.D_b = no_decay(nn.Parameter(torch.ones(self.d_inner, device=device)))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **options)

    def _rates(self, device) -> nn.Parameter:
        """log of 1 ... N in every channel (S4D-Real); in float32 whatever the other parameters are."""
        rates = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device).log()
        return no_decay(nn.Parameter(rates.repeat(self.d_inner, 1)))

    def forward(self, hidden_states: Tensor, inference_params=None) -> Tensor:
        if inference_params is not None:
            conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]
            out = self._prefill(hidden_states, conv_state, ssm_state)
        else:
            out = self._train(self.in_proj(hidden_states).transpose(1, 2))
        return out if self.init_layer_scale is None else out * self.gamma

    def _train(self, xz: Tensor) -> Tensor:
        A, D = decay_rate(self.A_log), self.D
        inner = (self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight)
        out = (self.out_proj.weight, self.out_proj.bias)
        if self.bimamba_type == "v1":
            A_b = decay_rate(self.A_b_log)
            return bimamba_inner_fn(xz, *inner, *out, A, A_b, None, None, D, self.dt_proj.bias)
        if self.bimamba_type != "v2":
            return mamba_inner_fn(xz, *inner, *out, A, None, None, D, self.dt_proj.bias)
        y = mamba_inner_fn_no_out_proj(xz, *inner, A, None, None, D, self.dt_proj.bias)
        back = (self.conv1d_b.weight, self.conv1d_b.bias, self.x_proj_b.weight, self.dt_proj_b.weight)
        y_b = mamba_inner_fn_no_out_proj(
            xz.flip(-1), *back, decay_rate(self.A_b_log), None, None, self.D_b, self.dt_proj_b.bias
        )
        y = (y + y_b.flip(-1)).transpose(1, 2)
        return linear(y / 2 if self.if_divide_out else y, *out)

    def _prefill(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """The whole prompt, forwards only; the states are written in place."""
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, 1)
        with torch.no_grad():
            conv_state.copy_(last_inputs(x, self.d_conv))
        x = causal_conv1d_fn(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation)
        dt, B, C = self._coefficients(x.transpose(1, 2))
        dt, B, C = (t.transpose(1, 2) for t in (dt, B, C))
        A = decay_rate(self.A_log)
        y, last = selective_scan_fn(x, dt, A, B, C, self.D, z, self.dt_proj.bias, True, return_last_state=True)
        with torch.no_grad():
            ssm_state.copy_(last)
        return self.out_proj(y.transpose(1, 2))

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before bias and softplus, B and C; the last axis of x is that of channels."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        return linear(dt, self.dt_proj.weight), B, C

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token: hidden_states (B, 1, D); both states are written in place and returned."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f"Mamba.step: hidden_states: want (B, 1, D), got {tuple(hidden_states.shape)}")
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, -1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        dt, B, C = self._coefficients(x)
        A = decay_rate(self.A_log)
        y = selective_state_update(ssm_state, x, dt, A, B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **_: Any) -> tuple[Tensor, Tensor]:
        """Zeros (B, D, K) and (B, D, N), in the dtype of the weights unless another is given."""
        weight = self.conv1d.weight
        options: dict[str, Any] = {"device": weight.device, "dtype": dtype or weight.dtype}
        conv = torch.zeros(batch_size, self.d_inner, self.d_conv, **options)
        return conv, torch.zeros(batch_size, self.d_inner, self.d_state, **options)


class Block(block.Block):
    """The block of mamba_ssm 1.x, which has no MLP."""

    def __init__(
        self, dim: int, mixer_cls, norm_cls=nn.LayerNorm, fused_add_norm: bool = False, residual_in_fp32: bool = False
    ):
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
