"""Mamba-2 with the parameters, states and options of mamba_ssm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .....maths.initialisers import inverse_softplus_dt
from .....ops._dt import decay_rate
from ..._adapt import UNLIMITED
from ..._missing import missing
from ...causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ...causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from ..ops.triton.layernorm_gated import RMSNorm as RMSNormGated
from ..ops.triton.selective_state_update import selective_state_update
from ..ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from ._common import Cached, depthwise, last_inputs, no_decay

__all__ = ["Mamba2", "RMSNormGated", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]

__getattr__ = missing(__name__)


class Mamba2(Cached, nn.Module):
    """The Mamba-2 mixer, (B, L, D) to (B, L, D).

    Args:
        d_ssm: width that goes through the scan; the rest of the inner width is a gated MLP. All of it if None.
        conv_init: the convolution's weights start uniform in +-conv_init.
        chunk_size, use_mem_eff_path: have no effect on results; the kernels choose.
        process_group, sequence_parallel: tensor parallelism is not offered, process_group must be None.
    """

    def __init__(
        self, d_model: int, d_state: int = 128, d_conv: int = 4, conv_init: float | None = None, expand: int = 2,
        headdim: int = 64, d_ssm: int | None = None, ngroups: int = 1, A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False, rmsnorm: bool = True, norm_before_gate: bool = False, dt_min: float = 0.001,
        dt_max: float = 0.1, dt_init_floor: float = 1e-4, dt_limit: tuple[float, float] = UNLIMITED,
        bias: bool = False, conv_bias: bool = True, chunk_size: int = 256, use_mem_eff_path: bool = True,
        layer_idx: int | None = None, process_group=None, sequence_parallel: bool = True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if process_group is not None:
            raise NotImplementedError("Mamba2: process_group: Statewise has no tensor parallel Mamba2; want None")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.conv_init, self.headdim, self.ngroups = conv_init, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim:
            raise ValueError(f"Mamba2: headdim: want a divisor of the {self.d_ssm} channels, got {headdim}")
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.chunk_size, self.use_mem_eff_path = dt_limit, chunk_size, use_mem_eff_path
        self.layer_idx, self.activation, self.act = layer_idx, "silu", nn.SiLU()
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        directions = 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + directions + self.nheads, bias=bias, **options)
        self.conv1d = depthwise(self.d_ssm + directions, d_conv, conv_bias, **options)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = no_decay(
            nn.Parameter(inverse_softplus_dt(self.nheads, dt_min, dt_max, dt_init_floor, device, dtype))
        )
        rates = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = no_decay(nn.Parameter(rates.log().to(dtype)))
        skips = self.d_ssm if D_has_hdim else self.nheads
        self.D = no_decay(nn.Parameter(torch.ones(skips, device=device)))
        if rmsnorm:
            self.norm = RMSNormGated(
                self.d_ssm, eps=1e-5, norm_before_gate=norm_before_gate, group_size=self.d_ssm // ngroups, **options
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **options)

    def forward(
        self, u: Tensor, seqlen: int | None = None, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None,
        inference_params=None,
    ) -> Tensor:  # fmt: skip
        """u: (B, L, D), or (B L, D) with `seqlen` L. With cu_seqlens, for inference, one row holds all sequences."""
        shape = u.shape
        u = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if inference_params is None:
            return self._train(self.in_proj(u), seq_idx).view(shape)
        rows = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        conv_state, ssm_state = self._get_states_from_cache(inference_params, rows)
        if inference_params.seqlen_offset > 0:
            return self.step(u, conv_state, ssm_state)[0].view(shape)
        return self._prefill(self.in_proj(u), seq_idx, cu_seqlens, conv_state, ssm_state).view(shape)

    def _skip(self) -> Tensor:
        return self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D

    def _train(self, zxbcdt: Tensor, seq_idx: Tensor | None) -> Tensor:
        return mamba_split_conv1d_scan_combined(
            zxbcdt, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, decay_rate(self.A_log),
            self._skip(), self.chunk_size, seq_idx=seq_idx, dt_limit=self.dt_limit, activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6, outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias, headdim=self.headdim, ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )  # fmt: skip

    def _split(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        """Gate and value of the MLP, the gate z, the convolution's channels, and dt."""
        mlp, width = self.d_inner - self.d_ssm, self.conv1d.weight.shape[0]
        return zxbcdt.split([mlp, mlp, self.d_ssm, width, self.nheads], -1)

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        directions = self.ngroups * self.d_state
        x, B, C = xbc.split([self.d_ssm, directions, directions], -1)
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        return x.unflatten(-1, (self.nheads, self.headdim)), B, C

    def _emit(self, y: Tensor, z: Tensor, z0: Tensor, x0: Tensor) -> Tensor:
        y = y.flatten(-2)
        y = self.norm(y, z) if self.rmsnorm else y
        return self.out_proj(torch.cat([silu(z0) * x0, y], -1) if z0.shape[-1] else y)

    def _prefill(
        self, zxbcdt: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, conv_state: Tensor,
        ssm_state: Tensor,
    ) -> Tensor:  # fmt: skip
        z0, x0, z, xbc, dt = self._split(zxbcdt)
        with torch.no_grad():
            if cu_seqlens is None:
                conv_state.copy_(last_inputs(xbc.transpose(1, 2), self.d_conv))
            else:
                conv_state.copy_(causal_conv1d_varlen_states(xbc[0], cu_seqlens, self.d_conv))
        xbc = causal_conv1d_fn(
            xbc.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx, activation=self.activation
        ).transpose(1, 2)
        x, B, C = self._heads(xbc)
        y, *states = mamba_chunk_scan_combined(
            x, dt, decay_rate(self.A_log), B, C, self.chunk_size, self._skip(), self._gate(z), self.dt_bias,
            seq_idx=seq_idx, cu_seqlens=cu_seqlens, dt_softplus=True, dt_limit=self.dt_limit,
            return_final_states=cu_seqlens is None, return_varlen_states=cu_seqlens is not None,
        )  # fmt: skip
        with torch.no_grad():
            ssm_state.copy_(states[0])
        return self._emit(y, z, z0, x0)

    def _gate(self, z: Tensor) -> Tensor | None:
        """z for the scan; the norm takes it if there is one."""
        return None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token: hidden_states (B, 1, D); both states are written in place and returned."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f"Mamba2.step: hidden_states: want (B, 1, D), got {tuple(hidden_states.shape)}")
        z0, x0, z, xbc, dt = self._split(self.in_proj(hidden_states[:, 0]))
        xbc = causal_conv1d_update(xbc, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        x, B, C = self._heads(xbc)
        if self.dt_limit != UNLIMITED:  # the interface of one step has no limits
            dt = nn.functional.softplus(dt + self.dt_bias).clamp(*self.dt_limit)
        spread = (self.nheads, self.headdim)
        limited = self.dt_limit != UNLIMITED
        y = selective_state_update(
            ssm_state, x, dt[..., None].expand(-1, *spread),
            decay_rate(self.A_log)[:, None, None].expand(*spread, self.d_state), B, C,
            self._skip() if self.D_has_hdim else self.D[:, None].expand(spread), self._gate(z),
            None if limited else self.dt_bias[:, None].expand(spread), not limited,
        )  # fmt: skip
        return self._emit(y, z, z0, x0)[:, None], conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **_: Any) -> tuple[Tensor, Tensor]:
        """Zeros (B, channels of the convolution, K) and (B, H, P, N), in the dtype of the weights unless given."""
        weight = self.conv1d.weight
        options: dict[str, Any] = {"device": weight.device, "dtype": dtype or weight.dtype}
        conv = torch.zeros(batch_size, self.d_conv, weight.shape[0], **options).transpose(1, 2)
        return conv, torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, **options)
