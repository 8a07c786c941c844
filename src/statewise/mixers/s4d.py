"""S4D: one diagonal state space per channel, as a convolution and as a recurrence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._names import unknown
from ..maths.discretize import discretize
from ..maths.initialisers import complex_normal, diagonal_init, inverse_softplus, log_uniform_log_dt
from ..ops._precision import widen
from ..ops.lti import diagonal_kernel, diagonal_ssm, diagonal_ssm_matrix
from ..segments import Segments
from .base import CausalMixer, HasImpulse, Mixing, check_input
from .layers import Linear

# How Re A < 0 is stored. "relu" and "none" are free parameters; "none" does not keep the system stable.
REAL_TRANSFORMS = ("exp", "relu", "softplus", "none")
DT_TRANSFORMS = ("exp", "softplus")
_RULES = ("zoh", "bilinear", "dirac")
# Added to -relu(.), so that no mode is left without any decay.
_RELU_FLOOR = 1e-4


class S4D(CausalMixer, HasImpulse):
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
        dropout: before the gated map, one mask per row and channel for the whole sequence.

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models"
    (arXiv 2206.11893), sections 3 and 4.
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"log_dt", "A_real", "A_imag", "B"})
    B: Tensor

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
        super().__init__()
        for name, value, known in (
            ("discretization", discretization, _RULES),
            ("dt_transform", dt_transform, DT_TRANSFORMS),
            ("real_transform", real_transform, REAL_TRANSFORMS),
            ("activation", activation, ("gelu", "none")),
        ):
            if value not in known:
                raise ValueError(f"S4D: {unknown(name, value, known)}")
        n_ssm = d_model if n_ssm is None else n_ssm
        if n_ssm < 1 or d_model % n_ssm:
            raise ValueError(f"S4D: n_ssm: want a divisor of d_model = {d_model}, got {n_ssm}")
        if not rate > 0:
            raise ValueError(f"S4D: rate: want a positive number, got {rate}")
        if not 0 <= dropout < 1:
            raise ValueError(f"S4D: dropout: want 0 <= dropout < 1, got {dropout}")
        self.d_model, self.d_state, self.n_ssm = d_model, d_state, n_ssm
        self.init, self.discretization, self.rate, self.bandlimit = init, discretization, rate, bandlimit
        self.dt_transform, self.real_transform, self.real_random = dt_transform, real_transform, real_random
        self.dt_min, self.dt_max = dt_min, dt_max
        self.activation, self.dropout = activation, dropout
        modes = d_state // 2
        self.log_dt = nn.Parameter(torch.empty((d_model,) if dt_tie else (d_model, modes)))
        self.A_real = nn.Parameter(torch.empty(n_ssm, modes))
        self.A_imag = nn.Parameter(torch.empty(n_ssm, modes))
        # Complex numbers are kept as pairs of reals: .double() and .to(dtype) then do what they should.
        B = torch.empty(n_ssm, modes, 2)
        if train_b:
            self.B = nn.Parameter(B)
        else:
            self.register_buffer("B", B)
        self.C = nn.Parameter(torch.empty(d_model, modes, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_dynamics()
        self.out_linear = Linear(d_model, 2 * d_model) if glu else None

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw A, B, C, D and dt anew."""
        A, B = diagonal_init(self.init, self.n_ssm, self.d_state, real_random=self.real_random)
        decay = -A.real.clamp(max=-1e-4)
        stored = {
            "exp": lambda: decay.log(),
            "relu": lambda: decay - _RELU_FLOOR,
            "softplus": lambda: inverse_softplus(decay),
            "none": lambda: A.real,
        }[self.real_transform]()
        self.A_real.copy_(stored)
        self.A_imag.copy_(A.imag)
        self.B.copy_(torch.view_as_real(B))
        self.C.copy_(complex_normal(self.C.shape[:-1], device=self.C.device))
        self.D.normal_()
        log_dt = log_uniform_log_dt(tuple(self.log_dt.shape), self.dt_min, self.dt_max, device=self.log_dt.device)
        self.log_dt.copy_(log_dt if self.dt_transform == "exp" else inverse_softplus(log_dt.exp()))

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> Tensor:
        device = self._device() if device is None else device
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.zeros(batch, self.d_model, self.d_state // 2, device=device, dtype=kind)

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, C (D, N/2) complex and dt (D, 1 or N/2), in time units of the input at the current `rate`."""
        decay = {
            "exp": torch.exp,
            "relu": lambda p: F.relu(p) + _RELU_FLOOR,
            "softplus": F.softplus,
            "none": torch.neg,
        }[self.real_transform](widen(self.A_real))
        A = torch.complex(-decay, widen(self.A_imag))
        B = torch.view_as_complex(widen(self.B))
        C = torch.view_as_complex(widen(self.C))
        raw = widen(self.log_dt)
        dt = self.rate * (raw.exp() if self.dt_transform == "exp" else F.softplus(raw))
        dt = dt.unsqueeze(-1) if dt.ndim == 1 else dt
        copies = self.d_model // self.n_ssm
        if self.bandlimit is not None:
            frequency = dt * A.imag.abs().repeat(copies, 1) / (2 * math.pi)
            C = C * (frequency <= self.bandlimit / 2)
        return A.repeat(copies, 1), B.repeat(copies, 1), C, dt

    def discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log A_bar, B_bar, C (D, N/2) complex and D (D,), as `ops.diagonal_ssm` takes them."""
        A, B, C, dt = self.continuous()
        log_a, b = discretize(self.discretization, A, dt, B)
        return log_a, b, C, widen(self.D)

    def _emit(self, y: Tensor) -> Tensor:
        if self.activation == "gelu":
            y = F.gelu(y)
        if self.dropout and self.training:
            y = y * F.dropout(torch.ones_like(y[:, :1]), self.dropout)
        if self.out_linear is not None:
            value, gate = self.out_linear(y).chunk(2, -1)
            y = value * torch.sigmoid(gate)
        return y

    def _run(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        check_input(self, x, self.d_model)
        y, state = diagonal_ssm(x, *self.discrete(), state=state, seg=seg)
        y = self._emit(y)
        return (y if seg is None else seg.mask(y)), state

    def impulse(self, length: int) -> Tensor:
        """Response of the state space (before the activation) to a unit impulse, D included: (D, length)."""
        log_a, b, c, skip = self.discrete()
        kernel = diagonal_kernel(log_a, c * b, length)
        return torch.cat([kernel[:, :1] + skip.unsqueeze(-1), kernel[:, 1:]], 1) if length else kernel

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        dense = diagonal_ssm_matrix(*self.discrete(), length=x.shape[1], seg=seg).to(x.dtype)

        def emit(y: Tensor) -> Tensor:
            y = self._emit(y.squeeze(-1))
            return y if seg is None else seg.mask(y)

        v = x if seg is None else seg.mask(x)
        return Mixing(dense.expand(x.shape[0], -1, -1, -1), v.unsqueeze(-1), emit, "head")
