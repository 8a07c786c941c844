"""qLSTM: an LSTM without the way back from its state to its gates, which makes it a gated linear recurrence."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._precision import widen
from ..ops.linear_scan import linear_scan, linear_scan_matrix
from ..ops.short_conv import short_conv
from ..segments import Segments
from ..state import exportable
from .base import CausalMixer, HasMixing, Mixing, check_input
from .layers import Linear, ShortConv


@exportable
class QLSTMState(NamedTuple):
    conv: Tensor  # (B, K-1, D_in): last valid inputs of the convolution, oldest first
    h: Tensor  # (B, D_in)


class QLSTM(CausalMixer, HasMixing):
    """Quasi-LSTM: gates that see the input only, a short convolution before them and a GELU gate at the end.

    In each of D_in channels, with gates f_t, i_t and o_t linear in the convolved input u_t:

        h_t = a_t h_{t-1} + sigmoid(i_t) u_t,    y_t = sigmoid(o_t) h_t

    The forget gate a_t in (0, 1) is sigmoid(f_t), or, reversed, sigmoid(-f_t)^relu(alpha) with one learned alpha: that
    is exp(-alpha softplus(f_t)), the decay of a state space model with step softplus(f_t). alpha = 0 forgets nothing.

    Args:
        d_model: width D of input and output.
        expand: inner width D_in = expand * d_model.
        d_conv: K, width of the convolution, 1 to 8.
        reverse_gate: the reversed forget gate, which brings it near to selective state space models.

    Source: Sieber et al. 2024, "Understanding the Differences in Foundation Models" (arXiv 2405.15731), sections 3.4
    and 4.3; after Stollenga et al. 2015.
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"alpha"})

    def __init__(self, d_model: int, *, expand: float = 2, d_conv: int = 4, reverse_gate: bool = True):
        super().__init__()
        self.d_model, self.d_inner = d_model, int(expand * d_model)
        if self.d_inner < 1:
            raise ValueError(f"QLSTM: expand: want expand * d_model of at least 1, got {expand}")
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = ShortConv(self.d_inner, d_conv)
        self.gates = Linear(self.d_inner, 3 * self.d_inner)
        self.alpha = nn.Parameter(torch.ones(())) if reverse_gate else None
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        with torch.no_grad():
            self.in_proj.weight.normal_(std=d_model**-0.5)
            self.gates.weight.normal_(std=self.d_inner**-0.5)
            self.out_proj.weight.normal_(std=self.d_inner**-0.5)

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> QLSTMState:
        device = self._device() if device is None else device
        return QLSTMState(
            torch.zeros(batch, self.conv1d.width - 1, self.d_inner, device=device, dtype=dtype),
            torch.zeros(batch, self.d_inner, device=device, dtype=dtype),
        )

    def fused(self) -> dict[str, dict[str, int]]:
        width = self.d_inner
        return {
            "in_proj": {"z": width, "x": width},
            "gates": {"forget": width, "input": width, "output": width},
        }

    def _coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a in (0, 1], and the input and output gates in (0, 1): (B, L, D_in), wide."""
        forget, write, read = widen(self.gates(u)).chunk(3, -1)
        if self.alpha is None:
            a = torch.sigmoid(forget)
        else:
            a = torch.exp(F.relu(widen(self.alpha)) * F.logsigmoid(-forget))
        return a, torch.sigmoid(write), torch.sigmoid(read)

    def _convolve(self, x: Tensor, conv: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor, Tensor]:
        """The gate of the output, the convolved input and the state of the convolution."""
        z, u = self.in_proj(x if seg is None else seg.mask(x)).chunk(2, -1)
        u, conv = short_conv(u, self.conv1d.weight, self.conv1d.bias, state=conv, seg=seg)
        return z, u, conv

    def _emit(self, y: Tensor, z: Tensor, seg: Segments | None) -> Tensor:
        y = self.out_proj(F.gelu(z) * y.to(z.dtype))
        return y if seg is None else seg.mask(y)

    def _run(self, x: Tensor, state: QLSTMState | None, seg: Segments | None) -> tuple[Tensor, QLSTMState]:
        check_input(self, x, self.d_model)
        conv, h = (None, None) if state is None else state
        z, u, conv = self._convolve(x, conv, seg)
        a, write, read = self._coefficients(u)
        y, h = linear_scan(a, write * u, state=h, seg=seg)
        return self._emit(read * y, z, seg), QLSTMState(conv, h)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        z, u, _ = self._convolve(x, None, seg)
        a, write, read = self._coefficients(u)
        dense = read.mT.unsqueeze(-1) * linear_scan_matrix(a, seg=seg) * write.mT.unsqueeze(-2)
        return Mixing(dense, u.unsqueeze(-1), lambda y: self._emit(y.squeeze(-1), z, seg))
