"""Mamba-2: SSD with a short convolution before it and a gated norm after it."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..maths.initialisers import inverse_softplus_dt
from ..ops._dt import decay_rate
from ..ops.decode import Heads, Layer, Mamba2Weights, Norm, mamba2_layer
from ..ops.short_conv import short_conv
from ..ops.ssd import ssd, ssd_matrix
from ..segments import Segments
from ..state import exportable
from .base import HasMixing, Mixing, check_input
from .layers import Gate, GatedRMSNorm, Linear, ShortConv
from .one_step import OneStep, one_step


@exportable
class Mamba2State(NamedTuple):
    conv: Tensor  # (B, K-1, D_in + 2 G N): last valid inputs of the convolution, oldest first
    ssm: Tensor  # (B, H, P, N)


class Mamba2(OneStep, HasMixing):
    """Mamba-2 mixer: one scalar decay per head, input-dependent step, input and output directions.

    Args:
        d_model: width D of input and output.
        d_state: N, state width per head.
        expand: inner width D_in = expand * d_model.
        head_dim: P; D_in must be a multiple of it.
        n_groups: G, number of (B, C) pairs shared by H / G heads each.
        d_conv: K, width of the convolution over [x, B, C], 1 to 8.
        dt_min, dt_max, dt_floor: initial step sizes are log-uniform in [dt_min, dt_max], at least dt_floor.
        dt_limit: (low, high) to which the step is clamped, high None for no upper end; None for no clamp.
        a_range: the initial decay rates -A are uniform in this range.
        skip_per_channel: D has one weight per channel instead of one per head.
        chunk_size: see `ops.ssd`.
        bias, conv_bias: of the projections, of the convolution.
        rmsnorm: a norm beside the gate at the end; False: the gate alone.
        norm_before_gate: the norm comes before the gate, not after it. norm_eps: of the norm.
        scales: muP factors on z, x, B, C and dt as they leave the input projection; None: all 1.

    Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 7.
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"A_log", "D", "dt_bias"})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: float = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        d_conv: int = 4,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        dt_limit: tuple[float, float | None] | None = None,
        a_range: tuple[float, float] = (1.0, 16.0),
        skip_per_channel: bool = False,
        chunk_size: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        scales: tuple[float, float, float, float, float] | None = None,
    ):
        super().__init__()
        self.d_model, self.d_state, self.head_dim, self.n_groups = d_model, d_state, head_dim, n_groups
        self.d_inner = int(expand * d_model)
        if self.d_inner % head_dim:
            raise ValueError(f"Mamba2: head_dim: want a divisor of expand * d_model = {self.d_inner}, got {head_dim}")
        self.n_heads = self.d_inner // head_dim
        if self.n_heads % n_groups:
            raise ValueError(f"Mamba2: n_groups: want a divisor of the {self.n_heads} heads, got {n_groups}")
        if scales is not None and len(scales) != 5:
            raise ValueError(f"Mamba2: scales: want five factors, for z, x, B, C and dt, or None, got {scales}")
        self.dt_limit = None if dt_limit is None else (float(dt_limit[0]), _end(dt_limit[1]))
        self.scales = None if scales is None else tuple(float(s) for s in scales)
        self.chunk_size = chunk_size
        d_conv_in = self.d_inner + 2 * n_groups * d_state
        self.in_proj = Linear(d_model, self.d_inner + d_conv_in + self.n_heads, bias=bias)
        self.conv1d = ShortConv(d_conv_in, d_conv, conv_bias)
        self.dt_bias = nn.Parameter(inverse_softplus_dt((self.n_heads,), dt_min, dt_max, dt_floor))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(*a_range).log())
        self.D = nn.Parameter(torch.ones((self.n_heads, head_dim) if skip_per_channel else (self.n_heads,)))
        self.norm = (
            GatedRMSNorm(self.d_inner, n_groups, norm_eps, norm_before_gate=norm_before_gate) if rmsnorm else Gate()
        )
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> Mamba2State:
        device = self._device() if device is None else device
        conv = torch.zeros(batch, self.conv1d.width - 1, len(self.conv1d.weight), device=device, dtype=dtype)
        ssm = torch.zeros(batch, self.n_heads, self.head_dim, self.d_state, device=device, dtype=dtype)
        return Mamba2State(conv, ssm)

    def fused(self) -> dict[str, dict[str, int]]:
        width = self.n_groups * self.d_state
        return {"in_proj": {"z": self.d_inner, "x": self.d_inner, "B": width, "C": width, "dt": self.n_heads}}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.scales is None:
            z, conv_in, dt = self.in_proj(x).split((self.d_inner, len(self.conv1d.weight), self.n_heads), -1)
            return z, conv_in, dt
        width = self.n_groups * self.d_state
        parts = self.in_proj(x).split((self.d_inner, self.d_inner, width, width, self.n_heads), -1)
        z, v, b, c, dt = (part * scale for part, scale in zip(parts, self.scales))
        return z, torch.cat([v, b, c], -1), dt

    def _heads(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.n_groups * self.d_state
        v, b, c = conv_out.split((self.d_inner, width, width), -1)
        return (
            v.unflatten(-1, (self.n_heads, self.head_dim)),
            b.unflatten(-1, (self.n_groups, self.d_state)),
            c.unflatten(-1, (self.n_groups, self.d_state)),
        )

    def _layer(self, norm: Norm | None) -> Layer | None:
        gated, conv = self.norm, self.conv1d
        if self.scales is not None or not isinstance(gated, GatedRMSNorm) or gated.norm_before_gate:
            return None
        return mamba2_layer(
            Mamba2Weights(
                self.in_proj.weight, self.in_proj.bias, conv.weight, conv.bias, self.dt_bias, self.A_log, self.D,
                gated.weight, self.out_proj.weight, self.out_proj.bias,
            ),
            norm,
            Heads(self.n_groups, gated.groups, gated.eps, self.dt_limit),
        )  # fmt: skip

    def _run(self, x: Tensor, state: Mamba2State | None, seg: Segments | None) -> tuple[Tensor, Mamba2State]:
        check_input(self, x, self.d_model)
        if (one := one_step([(self, None)], x, [state], seg)) is not None:
            return one[0], one[1][0]
        if seg is not None:
            x = seg.mask(x)
        z, conv_in, dt = self._project(x)
        conv_state, ssm_state = (None, None) if state is None else state
        conv_out, conv_state = short_conv(
            conv_in, self.conv1d.weight, self.conv1d.bias, "silu", state=conv_state, seg=seg
        )
        v, b, c = self._heads(conv_out)
        y, ssm_state = ssd(
            v, dt, decay_rate(self.A_log), b, c, self.D, dt_bias=self.dt_bias, dt_softplus=True,
            chunk_size=self.chunk_size, dt_limit=self.dt_limit, state=ssm_state, seg=seg,
        )  # fmt: skip
        y = self.out_proj(self.norm(y.flatten(-2), z))
        return (y if seg is None else seg.mask(y)), Mamba2State(conv_state, ssm_state)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        if self.D.ndim > 1:
            raise ValueError("Mamba2.mixing: with skip_per_channel each channel has a matrix of its own")
        if seg is not None:
            x = seg.mask(x)
        z, conv_in, dt = self._project(x)
        v, b, c = self._heads(short_conv(conv_in, self.conv1d.weight, self.conv1d.bias, "silu", seg=seg)[0])
        dense = ssd_matrix(
            dt, decay_rate(self.A_log), b, c, self.D, self.dt_bias, True, dt_limit=self.dt_limit, seg=seg
        )

        def emit(y: Tensor) -> Tensor:
            y = self.out_proj(self.norm(y.flatten(-2), z))
            return y if seg is None else seg.mask(y)

        return Mixing(dense, v, emit)


def _end(high: float | None) -> float:
    return math.inf if high is None else float(high)
