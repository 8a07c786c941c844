"""DSS and DLR: time-invariant systems of complex modes that all channels share."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._names import unknown
from ..maths.discretize import expm1
from ..maths.hippo import legs_diagonal
from ..maths.initialisers import complex_normal, log_uniform_log_dt
from ..ops._precision import widen
from ..ops.lti import diagonal_kernel, diagonal_ssm, diagonal_ssm_matrix
from ..ops.lti.one_token import Factors, advance, apart, factors
from ..ops.lti.shared import shared_ssm
from ..segments import Segments
from .base import CausalMixer, HasImpulse, Mixing, check_input
from .kept import kept
from .layers import GatedTail

# A growing mode of DSS grows by a factor of exp(64) at most over `l_norm` tokens: in float32, what enters then
# neither vanishes nor overflows.
_GROWTH = 64.0
# Largest real part of Lambda where a mode must decay.
_DECAY = -1e-4
# A normaliser, or Lambda, counts for no less than the root of this beside what it divides: the sum of exp(r z) passes
# through zero where Re Lambda = 0.
_LEAST = 1e-7


class FullModes(CausalMixer, HasImpulse):
    """A diagonal state space in each channel, y_t = Re(sum over n < N of c_n h_n) + D u_t, with N complex modes.

    Modes stand for themselves: none is left out for its conjugate, and there is no factor 2. State (B, D, N), complex.
    A subclass says what the modes are (`discrete`).
    """

    d_model: int
    d_state: int
    D: Tensor
    tail: nn.Module

    @abstractmethod
    def discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log A_bar, B_bar, C (D, N) complex and D (D,), as `ops.diagonal_ssm` takes them with conjugate=False."""

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> Tensor:
        device = self._device() if device is None else device
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.zeros(batch, self.d_model, self.d_state, device=device, dtype=kind)

    def _emit(self, y: Tensor, seg: Segments | None) -> Tensor:
        y = self.tail(y)
        return y if seg is None else seg.mask(y)

    @kept()
    def _factors(self) -> Factors:
        return factors(*self.discrete(), conjugate=False)

    def _system(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        return diagonal_ssm(x, *self.discrete(), conjugate=False, state=state, seg=seg)

    def _run(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        check_input(self, x, self.d_model)
        if state is not None and apart(x, seg):
            y, state = advance(self._factors(), x, state)
        else:
            y, state = self._system(x, state, seg)
        return self._emit(y, seg), state

    def impulse(self, length: int) -> Tensor:
        """Response of the state space (before the activation) to a unit impulse, D included: (D, length)."""
        log_a, b, c, skip = self.discrete()
        kernel = diagonal_kernel(log_a, c * b, length, conjugate=False)
        return torch.cat([kernel[:, :1] + skip.unsqueeze(-1), kernel[:, 1:]], 1) if length else kernel

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        dense = diagonal_ssm_matrix(*self.discrete(), conjugate=False, length=x.shape[1], seg=seg).to(x.dtype)
        v = x if seg is None else seg.mask(x)
        return Mixing(
            dense.expand(x.shape[0], -1, -1, -1), v.unsqueeze(-1), lambda y: self._emit(y.squeeze(-1), seg), "head"
        )


class StepFree(FullModes):
    """`FullModes` of which all channels have the same, since there is no step size of each channel's own."""

    @abstractmethod
    def _modes(self) -> tuple[Tensor, Tensor]:
        """log A_bar (N,) and the factors (D, N) on outputs, C times B_bar."""

    def discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log A_bar, B_bar = 1, C (D, N) complex and D (D,), as `ops.diagonal_ssm` takes them with conjugate=False."""
        log_a, c = self._modes()
        return log_a.expand_as(c), torch.ones_like(c), c, widen(self.D)

    @kept()
    def _factors(self) -> Factors:
        log_a, c = self._modes()
        return factors(log_a, log_a.new_ones(1), c, widen(self.D), conjugate=False)

    def _system(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        return shared_ssm(x, *self._modes(), widen(self.D), state=state, seg=seg)


class DSS(FullModes):
    """DSS: N complex modes shared by all channels, each weighed by a softmax over time, or by zero-order hold.

    With z_n = dt Lambda_n, dt one step per channel, the kernel is K_l = Re sum_n W_n / Lambda_n p_n(l), with

        softmax:  p_n(l) = exp(l z_n) / sum over r < l_norm of exp(r z_n)
        exp:      p_n(l) = exp(l z_n) (exp(z_n) - 1)                           (input held over each step)

    The paper normalises over the length of the row at hand, so that one token changes the weights of all others and
    nothing can be streamed. Here the length that is normalised over is an option, and rows may have any length. With
    l_norm = None it is infinite: p_n(l) = exp(l z_n) (1 - exp(z_n)), a plain recurrence that needs Re Lambda < 0 and
    keeps it (at most -1e-4). With l_norm = L, rows of L tokens get what the paper gives them, and modes may also
    grow: then the oldest tokens weigh most. Growth is limited to Re z <= 64 / l_norm, and goes on beyond l_norm, so
    choose l_norm no shorter than the longest document.

    Args:
        d_model: width D of input and output.
        d_state: N, the number of complex modes (no conjugates are left out).
        kernel: "softmax" or "exp". With "exp", Re Lambda = -exp of its parameter.
        l_norm: tokens that "softmax" normalises over; None for the limit of infinitely many.
        init: initial Lambda: "legs" (the N eigenvalues with Im > 0 of the normal part of HiPPO-LegS of size 2 N), "lin"
            (-1/2 + i pi n) or "rand" (-1/2 + i normal).
        dt_min, dt_max: initial steps are log-uniform in [dt_min, dt_max].
        dt_tie: one dt per channel; False: one for the real and one for the imaginary part of Lambda, as in the
            released code, equal at first.
        activation: "gelu" or "none", after the state space.
        glu: a linear map to 2 D and a gate at the end. With activation="none" and glu=False the mixer is the bare
            state space, which is linear.
        dropout: before the gated map, one mask per row and channel for the whole sequence.

    Source: Gupta et al. 2022, "Diagonal State Spaces are as Effective as Structured State Spaces" (arXiv 2203.14343),
    Proposition 1 and section 3.
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"log_dt", "Lambda_re", "Lambda_im"})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        kernel: str = "softmax",
        l_norm: int | None = None,
        init: str = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        activation: str = "gelu",
        glu: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, value, known in (("kernel", kernel, ("softmax", "exp")), ("init", init, ("legs", "lin", "rand"))):
            if value not in known:
                raise ValueError(f"DSS: {unknown(name, value, known)}")
        if d_state < 1:
            raise ValueError(f"DSS: d_state: want at least one mode, got {d_state}")
        if l_norm is not None and (kernel != "softmax" or l_norm < 1):
            raise ValueError(f"DSS: l_norm: want a positive length with kernel='softmax', got {l_norm} with {kernel!r}")
        self.d_model, self.d_state, self.kernel, self.l_norm = d_model, d_state, kernel, l_norm
        self.init, self.dt_min, self.dt_max = init, dt_min, dt_max
        self.log_dt = nn.Parameter(torch.empty((d_model, 1) if dt_tie else (d_model, 2)))
        self.Lambda_re = nn.Parameter(torch.empty(d_state))
        self.Lambda_im = nn.Parameter(torch.empty(d_state))
        # Complex numbers are kept as pairs of reals: .double() and .to(dtype) then do what they should.
        self.W = nn.Parameter(torch.empty(d_model, d_state, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_dynamics()
        self.tail = GatedTail(d_model, activation, glu, dropout)

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw Lambda, W, D and the steps anew."""
        device = self.W.device
        self.Lambda_re.fill_(math.log(0.5) if self.kernel == "exp" else -0.5)
        if self.init == "legs":
            self.Lambda_im.copy_(-legs_diagonal(2 * self.d_state)[0].imag)
        elif self.init == "lin":
            self.Lambda_im.copy_(math.pi * torch.arange(self.d_state, device=device))
        else:
            self.Lambda_im.normal_()
        self.W.copy_(complex_normal(self.W.shape[:-1], 2.0, device=device))
        self.D.normal_()
        self.log_dt.copy_(log_uniform_log_dt((self.d_model, 1), self.dt_min, self.dt_max, device=device))

    def continuous(self) -> tuple[Tensor, Tensor]:
        """Lambda (N,) complex, and dt Lambda (D, N)."""
        real, imag, dt = widen(self.Lambda_re), widen(self.Lambda_im), widen(self.log_dt).exp()
        if self.kernel == "exp":
            real = -real.exp()
        elif self.l_norm is None:
            real = real.clamp(max=_DECAY)
        z_re, z_im = dt[:, :1] * real, dt[:, -1:] * imag
        if self.l_norm is not None:
            z_re = z_re.clamp(max=_GROWTH / self.l_norm)
        return torch.complex(real, imag), torch.complex(z_re, z_im)

    def discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log A_bar, B_bar, W (D, N) complex and D (D,), as `ops.diagonal_ssm` takes them with conjugate=False."""
        Lambda, z = self.continuous()
        W, skip = torch.view_as_complex(widen(self.W)), widen(self.D)
        if self.kernel == "exp":
            return z, expm1(z) / Lambda, W, skip
        if self.l_norm is None:
            return z, _divide(-expm1(z), Lambda), W, skip
        # Of a growing mode, the series is summed from its far end: exp(l z) over exp((l_norm - 1) z) and a falling sum.
        grows = z.real > 0
        falling = torch.where(grows, -z, z)
        at_end = torch.exp(-_multiple(torch.where(grows, z, 0), self.l_norm - 1))
        share = _divide(expm1(falling), expm1(_multiple(falling, self.l_norm)))
        return z, _divide(at_end * share, Lambda), W, skip

    def _whole(self, x: Tensor, seg: Segments | None) -> Tensor:
        check_input(self, x, self.d_model)
        y, _ = diagonal_ssm(x, *self.discrete(), conjugate=False, seg=seg, final_state=False)
        return self._emit(y, seg)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, at most about 3000 in size."""
    # No smaller than what float32 can square.
    least = (_LEAST * (a.real.square() + a.imag.square())).clamp(min=1e-18)
    return a * b.conj() / torch.maximum(b.real.square() + b.imag.square(), least)


def _multiple(z: Tensor, n: int) -> Tensor:
    """n z, less whole turns of its angle, which is taken in float64: in float32 it would be wrong by n roundings."""
    angle = z.imag.to(z.real.dtype if z.device.type == "mps" else torch.float64) * n
    turns = torch.round(angle.detach() / (2 * math.pi))
    return torch.complex(z.real * n, (angle - 2 * math.pi * turns).to(z.real.dtype))


class DLR(StepFree):
    """DLR: a diagonal linear RNN. x_t = Lambda x_{t-1} + u_t in each channel, y_t = Re(W x_t) + D u_t, no step size.

    log Lambda_n = -p_n^2 + i theta_n is shared by all D channels; N is large, 1024 to 4096 in the paper. State
    (B, D, N), complex.

    Args:
        d_model: width D of input and output.
        d_state: N, the number of complex modes (no conjugates are left out).
        init: initial theta: "omega" (2 pi n / N: the Fourier modes of N tokens) or "rand" (normal).
        dt_min, dt_max: initial p_n^2 is half of a number log-uniform in [dt_min, dt_max].
        activation, glu, dropout: what follows, as in `DSS`.

    Source: Gupta et al. 2022, "Simplifying and Understanding State Space Models with Diagonal Linear RNNs"
    (arXiv 2212.00768), sections 3 and 4.
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"p", "theta"})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 1024,
        init: str = "omega",
        dt_min: float = 1e-4,
        dt_max: float = 0.1,
        activation: str = "gelu",
        glu: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if init not in ("omega", "rand"):
            raise ValueError(f"DLR: {unknown('init', init, ('omega', 'rand'))}")
        if d_state < 1:
            raise ValueError(f"DLR: d_state: want at least one mode, got {d_state}")
        self.d_model, self.d_state = d_model, d_state
        self.init, self.dt_min, self.dt_max = init, dt_min, dt_max
        self.p = nn.Parameter(torch.empty(d_state))
        self.theta = nn.Parameter(torch.empty(d_state))
        self.W = nn.Parameter(torch.empty(d_model, d_state, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_dynamics()
        self.tail = GatedTail(d_model, activation, glu, dropout)

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw Lambda, W and D anew."""
        N, device = self.d_state, self.W.device
        self.p.copy_((0.5 * log_uniform_log_dt(N, self.dt_min, self.dt_max, device=device).exp()).sqrt())
        if self.init == "omega":
            self.theta.copy_(2 * math.pi / N * torch.arange(N, device=device))
        else:
            self.theta.copy_(torch.randn(N, device=device) % (2 * math.pi))
        self.W.copy_(complex_normal((self.d_model, N), 2 / N**2, device=device))
        self.D.normal_()

    def _modes(self) -> tuple[Tensor, Tensor]:
        log_a = torch.complex(-widen(self.p).square(), widen(self.theta))
        return log_a, torch.view_as_complex(widen(self.W))
