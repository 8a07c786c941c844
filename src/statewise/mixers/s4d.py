"""S4D: one diagonal state space per channel, as a convolution and as a recurrence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._names import unknown
from ..maths.discretize import discretize
from ..maths.initialisers import diagonal_init
from ..ops._precision import widen
from ..ops.lti import diagonal_kernel, diagonal_ssm
from ..ops.lti.one_token import Factors, advance, apart, factors
from ..segments import Segments
from .base import check_input
from .kept import kept
from .layers import Linear
from .siso import DT_TRANSFORMS, REAL_TRANSFORMS, SISO, CausalSISO, TwoSidedSISO

__all__ = ["DT_TRANSFORMS", "REAL_TRANSFORMS", "S4D", "BidirectionalS4D"]

_RULES = ("zoh", "bilinear", "dirac")


class _Diagonal(SISO):
    """Initialisation and discretisation of a diagonal A."""

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: str | Mapping[str, Any] = "legs",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        n_ssm: int | None = None,
        dt_tie: bool = True,
        dt_transform: str = "exp",
        real_transform: str = "exp",
        real_random: bool = False,
        train_b: bool = False,
        bandlimit: float | None = None,
        rate: float = 1.0,
        activation: str = "gelu",
        glu: bool = True,
        dropout: float = 0.0,
    ):
        if discretization not in _RULES:
            raise ValueError(f"{type(self).__name__}: {unknown('discretization', discretization, _RULES)}")
        super().__init__(
            d_model, d_state, dt_min=dt_min, dt_max=dt_max, n_ssm=n_ssm, dt_tie=dt_tie, dt_transform=dt_transform,
            real_transform=real_transform, train_b=train_b, rate=rate, activation=activation, dropout=dropout,
        )  # fmt: skip
        self.init, self.discretization, self.bandlimit = init, discretization, bandlimit
        self.real_random = real_random
        self.reset_dynamics()
        self.out_linear = Linear(d_model, 2 * d_model) if glu else None

    def _initial(self) -> tuple[Tensor, Tensor]:
        return diagonal_init(self.init, self.n_ssm, self.d_state, real_random=self.real_random)

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        A, B, C, dt = super().continuous()
        if self.bandlimit is not None:
            C = C * (dt * A.imag.abs() / (2 * math.pi) <= self.bandlimit / 2)
        return A, B, C, dt

    def discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log A_bar, B_bar, C (D, N/2) complex and D (D,), as `ops.diagonal_ssm` takes them; C (2, D, N/2) for two
        directions."""
        A, B, C, dt = self.continuous()
        log_a, b = discretize(self.discretization, A, dt, B)
        return log_a, b, C, widen(self.D)

    def kernels(self, length: int) -> Tensor:
        log_a, b, c, _ = self.discrete()
        return diagonal_kernel(log_a, c * b, length)


class S4D(_Diagonal, CausalSISO):
    """S4D: a diagonal state space with N/2 complex modes for each channel, then GELU and a gated linear map.

    x' = diag(A) x + B u and y = 2 Re(C x) + D u in each channel, discretised with the channel's own step dt. The
    state (B, D, N/2) is complex.

    Args:
        d_model: width D of input and output.
        d_state: N, counting both of each conjugate pair; even.
        init: initial A and B: "legs" (S4D-LegS), "lin", "inv", "inv2", "quad", "real", "rand", "diag" (half of the
            systems "inv", half "lin") or "ptd" (see `S4PTD`); see `maths.initialisers.diagonal_init`.
        discretization: "zoh" (input held over a step), "bilinear" or "dirac".
        dt_min, dt_max: initial steps are log-uniform in [dt_min, dt_max]. A mode sees lags in units of dt: for
            sequences of length L, dt_min of about 1 / L is a good choice.
        n_ssm: number of different (A, B), shared by the channels h, h + n_ssm, ...; a divisor of D. None: D.
        dt_tie: one dt per channel; False: one per channel and mode.
        dt_transform: dt is "exp" or "softplus" of its parameter (with the same initial values).
        real_transform: Re A is -"exp", -"relu" - 1e-4 or -"softplus" of its parameter, or the parameter ("none",
            which lets training make the system unstable).
        real_random: initial Re A uniform in (-1, 0).
        train_b: B is a parameter. It only ever acts through the product C B, so False loses nothing but a rate.
        bandlimit: modes with dt |Im A| / (2 pi) > bandlimit / 2 are silenced (1.0 is the Nyquist limit at rate 1).
        rate: multiplies dt; 2 for input that is sampled half as often as in training.
        activation: "gelu" or "none", after the state space.
        glu: a linear map to 2 D and a gate at the end. With activation="none" and glu=False the mixer is the bare
            state space, which is linear.
        dropout: before and after the activation, each one mask per row and channel for the whole sequence.

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models"
    (arXiv 2206.11893), sections 3 and 4.
    """

    @kept()
    def _factors(self) -> Factors:
        return factors(*self.discrete())

    def _system(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        if state is not None and apart(x, seg):
            return advance(self._factors(), x, state)
        return diagonal_ssm(x, *self.discrete(), state=state, seg=seg)

    def _whole(self, x: Tensor, seg: Segments | None) -> Tensor:
        check_input(self, x, self.d_model)
        return self._emit(diagonal_ssm(x, *self.discrete(), seg=seg, final_state=False)[0], seg)


class BidirectionalS4D(_Diagonal, TwoSidedSISO):
    """S4D that looks both ways: one A, B and dt, read out by C[0] over the past and by C[1] over the future.

    The backward kernel begins at the next token. It has no state: a later token changes every earlier output.
    Arguments as in `S4D`.

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models"
    (arXiv 2206.11893), section 5 (models on the Long Range Arena); two directions as in Goel et al. 2022
    (arXiv 2202.09729), section 4.2.
    """
