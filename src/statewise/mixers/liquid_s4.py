"""Liquid-S4: a diagonal state space that also sees products of neighbouring inputs."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .._names import unknown
from ..ops._precision import widen
from ..ops.lti import diagonal_ssm, diagonal_ssm_matrix
from ..ops.short_conv import short_conv
from ..segments import Segments
from ..state import exportable
from .base import CausalMixer, HasMixing, Mixing, check_input
from .layers import GatedTail
from .s4d import S4D

# As far back as `ops.short_conv` reaches.
_MAX_DEGREE = 8


@exportable
class LiquidS4State(NamedTuple):
    inputs: Tensor  # (B, P-1, D): last valid inputs of the document, oldest first
    ssm: Tensor  # (B, D, N/2), complex


class LiquidS4(CausalMixer, HasMixing):
    """Liquid-S4: an S4D whose transition depends on its input, expanded in products of up to P neighbouring inputs.

    A liquid system lets the input into its transition, x_t = (A_bar + B_bar u_t) x_{t-1} + B_bar u_t, mode by mode.
    Written out, y_t is a sum over products of inputs. Kept are those of neighbours,
    u^(p)_t = u_t u_{t-1} ... u_{t-p+1} for p up to the degree P, in one of two ways:

        "kb":  x_t = A_bar x_{t-1} + sum over p = 1 ... P of B_bar^p u^(p)_t,   y_t = 2 Re(C x_t) + D u_t
        "pb":  x_t = A_bar x_{t-1} + B_bar u_t,   y_t = 2 Re(C x_t + sum over p = 2 ... P of C B_bar^p u^(p)_t) + D u_t

    "kb" has exactly the terms of the liquid system in which the input acts on the transition in consecutive steps and
    not thereafter; in "pb" the products act at once and are not remembered. The matrix of `mixing` acts on u, and
    depends on the neighbours of each input.

    The released code differs: by default it picks products of the last inputs of a row, turns them around in time,
    so that early outputs see late inputs, and its `step` leaves them out. It also contracts powers of B over the state
    (B_bar times the sum of B_bar), where this mixer takes powers in each mode, as the expansion does. So parity
    with it is not sought. The modes are those of S4D here, diagonal without a low-rank part.

    Args:
        d_model: width D of input and output.
        d_state: N, counting both of each conjugate pair; even.
        degree: P, the longest product, 2 to 8.
        kernel: "pb" or "kb".
        init, discretization, dt_min, dt_max, n_ssm: of the state space, as in `S4D`. B is always trained.
        activation: "gelu" or "none", after the state space.
        glu: a linear map to 2 D and a gate at the end.
        dropout: before the gated map, one mask per row and channel for the whole sequence.

    Source: Hasani et al. 2022, "Liquid Structural State-Space Models" (arXiv 2209.12951), section 3.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        degree: int = 2,
        kernel: str = "pb",
        init: str = "legs",
        discretization: str = "bilinear",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        n_ssm: int | None = None,
        activation: str = "gelu",
        glu: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if kernel not in ("pb", "kb"):
            raise ValueError(f"LiquidS4: {unknown('kernel', kernel, ('pb', 'kb'))}")
        if not 2 <= degree <= _MAX_DEGREE:
            raise ValueError(f"LiquidS4: degree: want 2 to {_MAX_DEGREE}, got {degree}")
        self.d_model, self.degree, self.kernel = d_model, degree, kernel
        self.ssm = S4D(
            d_model, d_state=d_state, init=init, discretization=discretization, dt_min=dt_min, dt_max=dt_max,
            n_ssm=n_ssm, train_b=True, activation="none", glu=False,
        )  # fmt: skip
        self.tail = GatedTail(d_model, activation, glu, dropout)

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> LiquidS4State:
        device = self._device() if device is None else device
        return LiquidS4State(
            torch.zeros(batch, self.degree - 1, self.d_model, device=device, dtype=dtype),
            self.ssm.init_state(batch, device=device, dtype=dtype),
        )

    def _neighbours(self, u: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[list[Tensor], Tensor]:
        """u_{t-1} ... u_{t-p+1} for p = 2 ... P, each (B, L, D), and the last P-1 inputs."""
        delays = torch.eye(self.degree, dtype=u.dtype, device=u.device).flip(0)
        shifted = [short_conv(u, d.expand(self.d_model, -1), state=state, seg=seg) for d in delays[1:]]
        products = list(accumulate((earlier for earlier, _ in shifted), torch.mul))
        return products, shifted[-1][1]

    def _emit(self, y: Tensor, seg: Segments | None) -> Tensor:
        y = self.tail(y)
        return y if seg is None else seg.mask(y)

    def _run(self, x: Tensor, state: LiquidS4State | None, seg: Segments | None) -> tuple[Tensor, LiquidS4State]:
        check_input(self, x, self.d_model)
        u = widen(x) if seg is None else seg.mask(widen(x))
        inputs, h = (None, None) if state is None else state
        products, inputs = self._neighbours(u, inputs, seg)
        log_a, b, c, skip = self.ssm.discrete()
        if self.kernel == "pb":
            y, h = diagonal_ssm(u, log_a, b, c, skip, state=h, seg=seg)
            for p, product in enumerate(products, 2):
                y = y + _at_once(b**p, c) * product * u
        else:
            # One system per power. They share A and C, so their states add up to the one that is kept.
            P = self.degree
            v = torch.cat([u, *(product * u for product in products)], -1)
            b = torch.cat([b**p for p in range(1, P + 1)])
            skip = torch.cat([skip, skip.new_zeros((P - 1) * self.d_model)])
            if h is not None:
                h = torch.cat([h, h.new_zeros(h.shape[0], (P - 1) * self.d_model, h.shape[2])], 1)
            y, h = diagonal_ssm(v, log_a.repeat(P, 1), b, c.repeat(P, 1), skip, state=h, seg=seg)
            y, h = y.unflatten(-1, (P, -1)).sum(-2), h.unflatten(1, (P, -1)).sum(1)
        return self._emit(y.to(x.dtype), seg), LiquidS4State(inputs, h)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        u = widen(x) if seg is None else seg.mask(widen(x))
        log_a, b, c, skip = self.ssm.discrete()
        L = x.shape[1]
        dense = diagonal_ssm_matrix(log_a, b, c, skip, length=L, seg=seg)
        for p, product in enumerate(self._neighbours(u, None, seg)[0], 2):
            weight = product.mT  # (B, D, L): what the neighbours of each input make of it
            if self.kernel == "pb":
                dense = dense + torch.diag_embed(_at_once(b**p, c).unsqueeze(-1) * weight)
            else:
                dense = dense + diagonal_ssm_matrix(log_a, b**p, c, length=L, seg=seg) * weight.unsqueeze(-2)
        return Mixing(dense.to(x.dtype), u.to(x.dtype).unsqueeze(-1), lambda y: self._emit(y.squeeze(-1), seg), "head")


def _at_once(b: Tensor, c: Tensor) -> Tensor:
    """2 Re(c b): what an input adds to the output of its own time, (D,)."""
    return 2 * (c * b).real.sum(-1)
