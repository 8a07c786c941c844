"""S5: one diagonal state space with many inputs and outputs for the whole layer, run as a scan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._names import unknown
from ..maths.discretize import asynchronous, discretize
from ..maths.initialisers import block_init, block_input, complex_normal, log_uniform_log_dt, truncated_normal
from ..ops._checks import compute_dtype
from ..ops._precision import no_autocast, widen
from ..ops.linear_scan import linear_scan
from ..ops.lti.reference import lags, powers
from ..segments import Segments
from .base import CausalMixer, HasImpulse, HasMixing, HasRate, Mixing, SequenceMixer, check_input
from .kept import kept
from .layers import Linear, drop_channels

B_INITS = ("lecun_normal", "hippo")
C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")
ACTIVATIONS = ("half_glu1", "half_glu2", "full_glu", "gelu", "none")
_RULES = ("zoh", "bilinear", "dirac", "async")
# Largest real part that clip_eigs allows.
_CLIP = -1e-4


class _S5System(SequenceMixer, HasRate):
    """Parameters, discretisation and the parts around the scan that the two directions share."""

    dynamics: ClassVar[frozenset[str]] = frozenset({"Lambda_re", "Lambda_im", "B", "log_step"})
    # Names of the C parameters (D, P/2, 2), one a direction.
    readouts: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        blocks: int = 1,
        init: str | Mapping[str, Any] = "legs",
        b_init: str = "lecun_normal",
        c_init: str = "lecun_normal",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        clip_eigs: bool = False,
        step_rescale: float = 1.0,
        activation: str = "half_glu1",
        dropout: float = 0.0,
    ):
        super().__init__()
        what = type(self).__name__
        for name, value, known in (
            ("b_init", b_init, B_INITS),
            ("c_init", c_init, C_INITS),
            ("discretization", discretization, _RULES),
            ("activation", activation, ACTIVATIONS),
        ):
            if value not in known:
                raise ValueError(f"{what}: {unknown(name, value, known)}")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"{what}: d_state: want an even number >= 2 (it counts conjugate pairs), got {d_state}")
        if blocks < 1 or d_state % (2 * blocks):
            raise ValueError(f"{what}: blocks: want 2 * blocks to divide d_state = {d_state}, got {blocks}")
        if not step_rescale > 0:
            raise ValueError(f"{what}: step_rescale: want a positive number, got {step_rescale}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{what}: dropout: want 0 <= dropout < 1, got {dropout}")
        self.d_model, self.d_state, self.blocks = d_model, d_state, blocks
        self.init, self.b_init, self.c_init = init, b_init, c_init
        self.discretization, self.clip_eigs = discretization, clip_eigs
        self.dt_min, self.dt_max, self.rate = dt_min, dt_max, step_rescale
        self.activation, self.dropout = activation, dropout
        modes = d_state // 2
        self.Lambda_re = nn.Parameter(torch.empty(modes))
        self.Lambda_im = nn.Parameter(torch.empty(modes))
        # Complex numbers are kept as pairs of reals: .double() and .to(dtype) then do what they should.
        self.B = nn.Parameter(torch.empty(modes, d_model, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.log_step = nn.Parameter(torch.empty(modes))
        if activation in ("half_glu1", "half_glu2", "full_glu"):
            self.out2 = Linear(d_model, d_model)
        if activation == "full_glu":
            self.out1 = Linear(d_model, d_model)
        for name in self.readouts:
            setattr(self, name, nn.Parameter(torch.empty(d_model, modes, 2)))
        self.reset_dynamics()

    def _outputs(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.readouts)

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw Lambda, B, C, D and the steps anew."""
        device, dtype = self.B.device, compute_dtype(self.B)
        Lambda, V, V_inv = block_init(self.init, self.d_state, self.blocks)
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        V, V_inv = V.to(device, kind), V_inv.to(device, kind)
        self.Lambda_re.copy_(Lambda.real)
        self.Lambda_im.copy_(Lambda.imag)
        H, P = self.d_model, self.d_state
        if self.b_init == "hippo":
            into = block_input(self.init, P, self.blocks).to(device, kind).view(self.blocks, -1, 1)
            mixture = torch.randn(self.blocks, 1, H, device=device, dtype=dtype) * H**-0.5
            B = (into * mixture).flatten(0, 1)
        else:
            B = V_inv @ truncated_normal((P, H), 1 / P, device=device, dtype=dtype).to(kind)
        self.B.copy_(torch.view_as_real(B))
        for C in self._outputs():
            if self.c_init == "complex_normal":
                C.copy_(complex_normal(C.shape[:-1], device=device, dtype=dtype))
                continue
            variance = 1 / P if self.c_init == "trunc_standard_normal" else 1 / (P * H)
            full = torch.view_as_complex(truncated_normal((H, P, 2), variance, device=device, dtype=dtype))
            C.copy_(torch.view_as_real(full @ V))
        self.D.normal_()
        self.log_step.copy_(log_uniform_log_dt(self.d_state // 2, self.dt_min, self.dt_max, device, dtype))

    def _steps(self, elapsed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log of the factor per step and gain of the input: (P/2,), or (B, L, P/2) with `elapsed` (B, L)."""
        real = widen(self.Lambda_re)
        Lambda = torch.complex(real.clamp(max=_CLIP) if self.clip_eigs else real, widen(self.Lambda_im))
        dt = self.rate * widen(self.log_step).exp()
        if self.discretization == "async":
            since = torch.ones_like(dt) if elapsed is None else elapsed.to(dt.dtype).unsqueeze(-1)
            return asynchronous(Lambda, dt, elapsed=since)
        if elapsed is not None:
            dt = dt * elapsed.to(dt.dtype).unsqueeze(-1)
        return discretize(self.discretization, Lambda, dt)

    def _checked(self, elapsed: Tensor, x: Tensor, seg: Segments | None) -> Tensor:
        if elapsed.shape != x.shape[:2]:
            what = type(self).__name__
            raise ValueError(f"{what}: elapsed: want (B, L) = {tuple(x.shape[:2])} like x, got {tuple(elapsed.shape)}")
        return elapsed if seg is None else seg.mask(elapsed)

    def discrete(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
        """log Lambda_bar (P/2,), B_bar (P/2, D), the C (D, P/2), all complex, and D (D,)."""
        log_a, gain = self._steps()
        B = gain.unsqueeze(-1) * torch.view_as_complex(widen(self.B))
        return log_a, B, tuple(torch.view_as_complex(widen(C)) for C in self._outputs()), widen(self.D)

    def _drive(self, x: Tensor, elapsed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Factors per step, and what enters the state at each step: (B, L, P/2), complex."""
        B = torch.view_as_complex(widen(self.B))
        if elapsed is None:
            a, gain = self._regular()
            return a, _into(x, gain.unsqueeze(-1) * B)
        log_a, gain = self._steps(elapsed)
        return torch.exp(log_a), gain * _into(x, B)

    @kept("Lambda_re", "Lambda_im", "log_step")
    def _regular(self) -> tuple[Tensor, Tensor]:
        """Factor per regular step and gain of the input, (P/2,)."""
        log_a, gain = self._steps()
        return torch.exp(log_a), gain

    def _read(self, h: Tensor, C: Tensor) -> Tensor:
        """2 Re(C h): h (B, L, P/2) complex -> (B, L, D)."""
        real, imag = widen(C).unbind(-1)
        return F.linear(torch.view_as_real(h).flatten(-2), 2 * torch.stack((real, -imag), -1).flatten(-2))

    def _activate(self, y: Tensor) -> Tensor:
        if self.activation == "none":
            return y
        g = self._drop(F.gelu(y, approximate="tanh"))
        if self.activation == "gelu":
            return g
        gate = torch.sigmoid(self.out2(g))
        value = {"half_glu1": lambda: g, "half_glu2": lambda: y, "full_glu": lambda: self.out1(g)}[self.activation]()
        return self._drop(value * gate)

    def _drop(self, y: Tensor) -> Tensor:
        return drop_channels(y, self.dropout if self.training else 0.0)

    def _kernels(self, length: int) -> list[Tensor]:
        """2 Re(C diag(Lambda_bar^l) B_bar) for each direction: (length, D, D) [l, out, in]."""
        log_a, B, outputs, _ = self.discrete()
        a = powers(log_a, torch.arange(length, device=log_a.device))
        return [2 * torch.einsum("on,ln,ni->loi", C, a, B).real for C in outputs]

    def _emit_masked(self, seg: Segments | None):
        def emit(y: Tensor) -> Tensor:
            y = self._activate(y)
            return y if seg is None else seg.mask(y)

        return emit


class S5(_S5System, CausalMixer, HasImpulse):
    """S5: a diagonal state space of P/2 complex modes that all D channels enter and leave through dense B and C.

    x' = diag(Lambda) x + B u and y = 2 Re(C x) + D u, with one step dt per mode. State (B, P/2), complex.

    Args:
        d_model: width D of input and output.
        d_state: P, counting both of each conjugate pair; even.
        blocks: J; Lambda is J copies of a spectrum of size P / J.
        init: that spectrum, and the basis that B and C are drawn in: "legs" (normal part of HiPPO-LegS) or "ptd" (LegS
            perturbed and diagonalised, see `S5PTD`).
        b_init: "lecun_normal" (variance 1/P, rotated into the modes), or "hippo": the B of HiPPO itself times a random
            mixture of the channels, one for each block, so that a block begins as the memory of that mixture.
        c_init: "trunc_standard_normal" (variance 1/P), "lecun_normal" (variance 1/(P D)), both rotated into the modes,
            or "complex_normal" (variance 1/2 of each part, drawn in the modes).
        discretization: "zoh" (input held over a step), "bilinear", "dirac" or "async" (see `maths.discretize`).
        dt_min, dt_max: initial steps are log-uniform in [dt_min, dt_max].
        clip_eigs: keep Re Lambda <= -1e-4, so that the system stays stable; wise where it runs on for long.
        step_rescale: multiplies the steps; 2 for input that is sampled half as often as in training. Kept as `rate`.
        activation: "half_glu1", "half_glu2", "full_glu", "gelu" or "none" (the bare state space, which is linear).
        dropout: inside and after the activation, one mask per row and channel for the whole sequence.

    For input at irregular times, `extend_irregular` takes the time since the last token beside x.

    Source: Smith et al. 2022, "Simplified State Space Layers for Sequence Modeling" (arXiv 2208.04933), section 3 and
    appendices B and G.
    """

    readouts: ClassVar[tuple[str, ...]] = ("C",)
    C: Tensor

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> Tensor:
        device = self._device() if device is None else device
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.zeros(batch, self.d_state // 2, device=device, dtype=kind)

    def _run(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        return self._extend(x, None, state, seg)

    def extend_irregular(
        self, x: Tensor, elapsed: Tensor, state: Tensor | None = None, seg: Segments | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `extend`, for tokens at irregular times.

        Args:
            elapsed: (B, L), time since the token before (>= 0) in units of the regular step, so that all ones gives
                what `extend` gives. It scales dt token by token; with discretization "async" or "dirac" it acts on
                the decay of the state only.
        """
        return self._extend(x, self._checked(elapsed, x, seg), state, seg)

    def _extend(
        self, x: Tensor, elapsed: Tensor | None, state: Tensor | None, seg: Segments | None
    ) -> tuple[Tensor, Tensor]:
        check_input(self, x, self.d_model)
        with no_autocast(x):
            v = widen(x) if seg is None else seg.mask(widen(x))
            a, into = self._drive(v, elapsed)
            h, state = linear_scan(a, into, state=state, seg=seg)
            y = (self._read(h, self.C) + widen(self.D) * v).to(x.dtype)
        return self._emit_masked(seg)(y), state

    def impulse(self, length: int) -> Tensor:
        """Response of the state space (before the activation) to unit impulses, D included: (D_out, D_in, length)."""
        (kernel,) = self._kernels(length)
        first = torch.diag(widen(self.D)).unsqueeze(0)
        return torch.cat([kernel[:1] + first, kernel[1:]]).permute(1, 2, 0) if length else kernel.permute(1, 2, 0)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        lag, seen = lags(x.shape[1], seg, x.device)
        dense = self.impulse(x.shape[1]).permute(2, 0, 1)[lag] * seen[..., None, None]
        v = x if seg is None else seg.mask(x)
        return Mixing(dense.to(x.dtype).expand(x.shape[0], -1, -1, -1, -1), v, self._emit_masked(seg), "block")


class BidirectionalS5(_S5System, HasMixing):
    """S5 that looks both ways: one Lambda, B and step, read out by C1 (forward) and C2 (backward).

    Both directions include the present token. Arguments as in `S5`. For input at irregular times, `forward_irregular`
    takes the time since the last token beside x.

    Source: Smith et al. 2022, "Simplified State Space Layers for Sequence Modeling" (arXiv 2208.04933), appendix G.
    """

    readouts: ClassVar[tuple[str, ...]] = ("C1", "C2")
    C1: Tensor
    C2: Tensor

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        return self._both(x, None, seg)

    def forward_irregular(self, x: Tensor, elapsed: Tensor, seg: Segments | None = None) -> Tensor:
        """As `forward`, for tokens at irregular times.

        Args:
            elapsed: (B, L), time since the token before (>= 0), as in `S5.extend_irregular`. On the way back the state
                decays over the same gaps; a token enters it as it does on the way forth.
        """
        return self._both(x, self._checked(elapsed, x, seg), seg)

    def _both(self, x: Tensor, elapsed: Tensor | None, seg: Segments | None) -> Tensor:
        check_input(self, x, self.d_model)
        with no_autocast(x):
            v = widen(x) if seg is None else seg.mask(widen(x))
            before, into = self._drive(v, elapsed)
            after = before if elapsed is None else torch.exp(self._steps(_of_next(elapsed, seg))[0])
            y = self._read(linear_scan(before, into, seg=seg)[0], self.C1)
            y = y + self._read(linear_scan(after, into, seg=seg, reverse=True)[0], self.C2)
            y = (y + widen(self.D) * v).to(x.dtype)
        return self._emit_masked(seg)(y)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        before, after = self._kernels(x.shape[1])
        lag, seen = lags(x.shape[1], seg, x.device)
        dense = before[lag] * seen[..., None, None] + (after[lag] * seen[..., None, None]).transpose(1, 2)
        own = torch.diag_embed(torch.diagonal(seen, dim1=1, dim2=2).to(dense.dtype))
        dense = dense + own[..., None, None] * torch.diag(widen(self.D))
        v = x if seg is None else seg.mask(x)
        return Mixing(dense.to(x.dtype).expand(x.shape[0], -1, -1, -1, -1), v, self._emit_masked(seg), "block")


def _into(x: Tensor, B: Tensor) -> Tensor:
    """x (..., D) by B (P/2, D), complex, as one product of real matrices."""
    weight = torch.view_as_real(B).transpose(1, 2).flatten(0, 1)
    return torch.view_as_complex(F.linear(x, weight).unflatten(-1, (-1, 2)))


def _of_next(t: Tensor, seg: Segments | None) -> Tensor:
    """t (B, L) of the next valid position. Where there is none in the document, any number: the scan begins there."""
    B, L = t.shape
    at = torch.arange(L, device=t.device).expand(B, L)
    if seg is not None and seg.valid is not None:
        at = torch.where(seg.valid, at, L - 1)
        at = at.flip(1).cummin(1).values.flip(1)
    following = torch.cat([at[:, 1:], at[:, L - 1 :]], 1)
    return t.gather(1, following)
