"""What S4 and S4D share: one state space with one input and one output per channel, and what comes after it."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._names import unknown
from ..maths.initialisers import complex_normal, inverse_softplus, log_uniform_log_dt
from ..ops._precision import widen
from ..ops.lti import lti_conv
from ..ops.lti.documents import toeplitz
from ..segments import Segments
from .base import CausalMixer, HasImpulse, HasMixing, HasRate, Mixing, SequenceMixer, check_input
from .layers import Linear, check_tail, gated_tail

# How Re A < 0 is stored. "relu" and "none" are free parameters; "none" does not keep the system stable.
REAL_TRANSFORMS = ("exp", "relu", "softplus", "none")
DT_TRANSFORMS = ("exp", "softplus")
# Added to -relu(.), so that no mode is left without any decay.
_RELU_FLOOR = 1e-4


class SISO(SequenceMixer, HasRate):
    """Parameters of x' = A x + B u, y = 2 Re(C x) + D u in each channel; A has N/2 modes, halves of conjugate pairs.

    A subclass makes further parameters, calls `reset_dynamics` and sets `out_linear`.
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"log_dt", "A_real", "A_imag", "B"})
    # Read-outs C of one state: the second one looks at the future.
    directions: ClassVar[int] = 1
    B: Tensor
    out_linear: Linear | None

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        dt_min: float,
        dt_max: float,
        n_ssm: int | None,
        dt_tie: bool,
        dt_transform: str,
        real_transform: str,
        train_b: bool,
        rate: float,
        activation: str,
        dropout: float,
    ):
        super().__init__()
        what = type(self).__name__
        for name, value, known in (
            ("dt_transform", dt_transform, DT_TRANSFORMS),
            ("real_transform", real_transform, REAL_TRANSFORMS),
        ):
            if value not in known:
                raise ValueError(f"{what}: {unknown(name, value, known)}")
        n_ssm = d_model if n_ssm is None else n_ssm
        if n_ssm < 1 or d_model % n_ssm:
            raise ValueError(f"{what}: n_ssm: want a divisor of d_model = {d_model}, got {n_ssm}")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"{what}: d_state: want an even number >= 2 (it counts conjugate pairs), got {d_state}")
        if not rate > 0:
            raise ValueError(f"{what}: rate: want a positive number, got {rate}")
        check_tail(activation, dropout, f"{what}: ")
        self.d_model, self.d_state, self.n_ssm, self.rate = d_model, d_state, n_ssm, rate
        self.dt_min, self.dt_max = dt_min, dt_max
        self.dt_transform, self.real_transform = dt_transform, real_transform
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
        lead = (self.directions,) if self.directions > 1 else ()
        self.C = nn.Parameter(torch.empty(*lead, d_model, modes, 2))
        self.D = nn.Parameter(torch.empty(d_model))

    @abstractmethod
    def _initial(self) -> tuple[Tensor, Tensor]:
        """Initial A and B, (n_ssm, N/2) complex128 on the CPU, Im A >= 0."""

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw A, B, C, D and dt anew."""
        A, B = self._initial()
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

    def _shared(self, t: Tensor) -> Tensor:
        """From (..., n_ssm, N/2) to (..., D, N/2)."""
        copies = self.d_model // self.n_ssm
        return t if copies == 1 else t.repeat(*[1] * (t.ndim - 2), copies, 1)

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B (D, N/2), C (D, N/2) or (2, D, N/2), all complex, and dt (D, 1 or N/2), in time units of the input at
        the current `rate`."""
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
        return self._shared(A), self._shared(B), C, dt.unsqueeze(-1) if dt.ndim == 1 else dt

    @abstractmethod
    def kernels(self, length: int) -> Tensor:
        """Taps of the state space without D: (D, length), or (2, D, length) for two directions."""

    def _emit(self, y: Tensor, seg: Segments | None = None) -> Tensor:
        y = gated_tail(y, self.activation, self.out_linear, self.dropout if self.training else 0.0, twice=True)
        return y if seg is None else seg.mask(y)

    def _mixing(self, x: Tensor, dense: Tensor, seg: Segments | None) -> Mixing:
        v = x if seg is None else seg.mask(x)
        dense = dense.to(x.dtype).expand(x.shape[0], -1, -1, -1)
        return Mixing(dense, v.unsqueeze(-1), lambda y: self._emit(y.squeeze(-1), seg), "head")


class CausalSISO(SISO, CausalMixer, HasImpulse):
    """One direction: its state is (B, D, N/2), complex."""

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> Tensor:
        device = self._device() if device is None else device
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.zeros(batch, self.d_model, self.d_state // 2, device=device, dtype=kind)

    @abstractmethod
    def _system(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        """The state space alone, D included."""

    def _run(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        check_input(self, x, self.d_model)
        y, state = self._system(x, state, seg)
        return self._emit(y, seg), state

    def impulse(self, length: int) -> Tensor:
        """Response of the state space (before the activation) to a unit impulse, D included: (D, length)."""
        kernel = self.kernels(length)
        return torch.cat([kernel[:, :1] + widen(self.D).unsqueeze(-1), kernel[:, 1:]], 1) if length else kernel

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        return self._mixing(x, toeplitz(self.kernels(x.shape[1]), widen(self.D), seg), seg)


class TwoSidedSISO(SISO, HasMixing):
    """Two directions over each document: y_t = sum_{s <= t} k0[t - s] u_s + sum_{s > t} k1[s - t - 1] u_s + D u_t.

    The backward kernel begins at the next token, so that the present one is not counted twice.
    """

    directions = 2

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        check_input(self, x, self.d_model)
        before, after = self.kernels(max(x.shape[1], 1))
        return self._emit(lti_conv(x, before, widen(self.D), seg=seg, future=after), seg)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        before, after = self.kernels(x.shape[1])
        return self._mixing(x, toeplitz(before, widen(self.D), seg, after), seg)
