"""Mamba: the selective scan with a short convolution before it and a gate after it."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..maths.initialisers import inverse_softplus_dt
from ..ops._dt import decay_rate
from ..ops.decode import Layer, MambaWeights, Norm, mamba_layer
from ..ops.selective_scan import selective_scan, selective_scan_matrix
from ..ops.short_conv import short_conv
from ..segments import Segments
from ..state import exportable
from .base import HasMixing, Mixing, check_input
from .layers import Linear, RMSNorm, ShortConv, StepProjection, UnitRMSNorm
from .one_step import OneStep, one_step


@exportable
class MambaState(NamedTuple):
    conv: Tensor  # (B, K-1, D_in): last valid inputs of the convolution, oldest first
    ssm: Tensor  # (B, D_in, N)


class Mamba(OneStep, HasMixing):
    """Mamba mixer (S6): every channel is a diagonal system whose step, input and output depend on the input.

    Args:
        d_model: width D of input and output.
        d_state: N, state width per channel.
        expand: inner width D_in = expand * d_model.
        d_conv: K, width of the convolution, 1 to 8.
        dt_rank: width of the bottleneck of the step size; ceil(d_model / 16) if None.
        dt_min, dt_max, dt_floor: initial step sizes are log-uniform in [dt_min, dt_max], at least dt_floor.
        dt_scale: the step projection starts uniform in +-dt_scale / sqrt(dt_rank).
        bias, conv_bias: of the projections, of the convolution.
        coefficient_norm: "rms" or "unit": an RMS norm, with or without weights, on each of B, C and the bottleneck of
            the step size; None: none.
        norm_eps: of these norms.

    The state matrix starts as A[c, n] = -(n + 1) (S4D-Real).

    Source: Gu & Dao 2023, "Mamba" (arXiv 2312.00752), algorithm 2 and section 3.4; norms of the coefficients: Jamba
    (arXiv 2403.19887), without weights: Falcon Mamba (arXiv 2410.05355).
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"A_log", "D", "dt_proj.bias"})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: float = 2,
        d_conv: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        dt_scale: float = 1.0,
        bias: bool = False,
        conv_bias: bool = True,
        coefficient_norm: str | None = None,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if coefficient_norm not in ("rms", "unit", None):
            raise ValueError(f"Mamba: coefficient_norm: want 'rms', 'unit' or None, got {coefficient_norm!r}")
        self.d_model, self.d_state, self.d_inner = d_model, d_state, int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = ShortConv(self.d_inner, d_conv, conv_bias)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = StepProjection(self.dt_rank, self.d_inner)
        bound = dt_scale / math.sqrt(self.dt_rank)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-bound, bound)
            self.dt_proj.bias.copy_(inverse_softplus_dt((self.d_inner,), dt_min, dt_max, dt_floor))
        self.norms = (
            None
            if coefficient_norm is None
            else nn.ModuleDict(
                {
                    name: RMSNorm(width, norm_eps) if coefficient_norm == "rms" else UnitRMSNorm(norm_eps)
                    for name, width in (("dt", self.dt_rank), ("B", d_state), ("C", d_state))
                }
            )
        )
        rates = torch.arange(1, d_state + 1, dtype=torch.float32).log()
        self.A_log = nn.Parameter(rates.repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> MambaState:
        device = self._device() if device is None else device
        conv = torch.zeros(batch, self.conv1d.width - 1, self.d_inner, device=device, dtype=dtype)
        return MambaState(conv, torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=dtype))

    def fused(self) -> dict[str, dict[str, int]]:
        return {
            "in_proj": {"x": self.d_inner, "z": self.d_inner},
            "x_proj": {"dt": self.dt_rank, "B": self.d_state, "C": self.d_state},
        }

    def _coefficients(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before bias and softplus, B and C from the convolved input."""
        dt, b, c = self.x_proj(v).split((self.dt_rank, self.d_state, self.d_state), -1)
        if self.norms is not None:
            dt, b, c = self.norms["dt"](dt), self.norms["B"](b), self.norms["C"](c)
        return self.dt_proj(dt), b, c

    def _layer(self, norm: Norm | None) -> Layer | None:
        conv = self.conv1d
        return mamba_layer(
            MambaWeights(
                self.in_proj.weight, self.in_proj.bias, conv.weight, conv.bias, self.x_proj.weight, self.dt_proj.weight,
                self.dt_proj.bias, self.A_log, self.D, self.out_proj.weight, self.out_proj.bias,
            ),
            norm,
        )  # fmt: skip

    def _run(self, x: Tensor, state: MambaState | None, seg: Segments | None) -> tuple[Tensor, MambaState]:
        check_input(self, x, self.d_model)
        if (one := one_step([(self, None)], x, [state], seg)) is not None:
            return one[0], one[1][0]
        if seg is not None:
            x = seg.mask(x)
        v, z = self.in_proj(x).chunk(2, -1)
        conv_state, ssm_state = (None, None) if state is None else state
        v, conv_state = short_conv(v, self.conv1d.weight, self.conv1d.bias, "silu", state=conv_state, seg=seg)
        dt, b, c = self._coefficients(v)
        y, ssm_state = selective_scan(
            v, dt, decay_rate(self.A_log), b, c, self.D, z, self.dt_proj.bias, True, state=ssm_state, seg=seg
        )
        y = self.out_proj(y)
        return (y if seg is None else seg.mask(y)), MambaState(conv_state, ssm_state)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        if seg is not None:
            x = seg.mask(x)
        v, z = self.in_proj(x).chunk(2, -1)
        v, _ = short_conv(v, self.conv1d.weight, self.conv1d.bias, "silu", seg=seg)
        dt, b, c = self._coefficients(v)
        dense = selective_scan_matrix(dt, decay_rate(self.A_log), b, c, self.D, self.dt_proj.bias, True, seg=seg)

        def emit(y: Tensor) -> Tensor:
            y = self.out_proj(y.squeeze(-1) * nn.functional.silu(z))
            return y if seg is None else seg.mask(y)

        return Mixing(dense, v[..., None], emit)
