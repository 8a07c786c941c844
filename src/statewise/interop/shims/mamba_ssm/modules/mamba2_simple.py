"""Mamba-2 without inference states, as mamba_ssm has it for reading and experiments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .....maths.initialisers import inverse_softplus_dt
from .....ops._dt import decay_rate
from ..._adapt import UNLIMITED
from ..._missing import missing
from ..ops.triton.layernorm_gated import LayerNorm
from ..ops.triton.layernorm_gated import RMSNorm as RMSNormGated
from ..ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from ._common import depthwise, no_decay

__all__ = ["LayerNorm", "Mamba2Simple", "RMSNormGated", "mamba_chunk_scan_combined"]

__getattr__ = missing(__name__)


class Mamba2Simple(nn.Module):
    """The Mamba-2 mixer, (B, L, D) to (B, L, D).

    Args:
        learnable_init_states: the state before the first position is a parameter (H, P, N), zero at first.
        chunk_size, use_mem_eff_path, layer_idx: have no effect.
    """

    def __init__(
        self, d_model: int, d_state: int = 64, d_conv: int = 4, conv_init: float | None = None, expand: int = 2,
        headdim: int = 128, ngroups: int = 1, A_init_range: tuple[float, float] = (1, 16), dt_min: float = 0.001,
        dt_max: float = 0.1, dt_init_floor: float = 1e-4, dt_limit: tuple[float, float] = UNLIMITED,
        learnable_init_states: bool = False, activation: str = "swish", bias: bool = False, conv_bias: bool = True,
        chunk_size: int = 256, use_mem_eff_path: bool = True, layer_idx: int | None = None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.conv_init, self.headdim, self.ngroups, self.dt_limit = conv_init, headdim, ngroups, dt_limit
        self.d_inner = int(expand * d_model)
        if self.d_inner % headdim:
            raise ValueError(f"Mamba2Simple: headdim: want a divisor of the {self.d_inner} channels, got {headdim}")
        self.nheads = self.d_inner // headdim
        self.learnable_init_states, self.activation, self.act = learnable_init_states, activation, nn.SiLU()
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        options = {"device": device, "dtype": dtype}

        directions = 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + directions + self.nheads, bias=bias, **options)
        self.conv1d = depthwise(self.d_inner + directions, d_conv, conv_bias, **options)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        if learnable_init_states:
            self.init_states = no_decay(nn.Parameter(torch.zeros(self.nheads, headdim, d_state, **options)))
        self.dt_bias = no_decay(
            nn.Parameter(inverse_softplus_dt(self.nheads, dt_min, dt_max, dt_init_floor, device, dtype))
        )
        rates = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = no_decay(nn.Parameter(rates.log().to(dtype)))
        self.D = no_decay(nn.Parameter(torch.ones(self.nheads, device=device)))
        self.norm = RMSNormGated(self.d_inner, eps=1e-5, norm_before_gate=False, **options)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **options)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        states = self.init_states.expand(u.shape[0], -1, -1, -1) if self.learnable_init_states else None
        out = mamba_split_conv1d_scan_combined(
            self.in_proj(u), self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, decay_rate(self.A_log),
            self.D, self.chunk_size, states, seq_idx, self.dt_limit, activation=self.activation,
            headdim=self.headdim, ngroups=self.ngroups, rmsnorm_weight=self.norm.weight, rmsnorm_eps=self.norm.eps,
            outproj_weight=self.out_proj.weight, outproj_bias=self.out_proj.bias, norm_before_gate=False,
        )  # fmt: skip
        return out
