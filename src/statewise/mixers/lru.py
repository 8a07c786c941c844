"""LRU: the linear recurrent unit, a diagonal complex recurrence over all channels, run as a scan."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._precision import no_autocast, widen
from ..ops.linear_scan import linear_scan
from ..ops.lti.reference import lags, powers
from ..segments import Segments
from .base import CausalMixer, HasImpulse, Mixing, check_input
from .layers import GatedTail


class LRU(CausalMixer, HasImpulse):
    """LRU: h_t = lambda h_{t-1} + gamma B u_t and y_t = Re(C h_t) + D u_t, one diagonal system for all D channels.

    lambda = exp(-exp(nu_log) + i exp(theta_log)) lies inside the unit circle whatever the parameters are. gamma starts
    at sqrt(1 - |lambda|^2), which keeps the size of the state of white noise at one, and is trained on its own. There
    is no step size and no continuous time. State (B, N), complex.

    Args:
        d_model: width D of input and output.
        d_state: N, the number of complex modes (no conjugates are left out).
        r_min, r_max: initial |lambda| between them, uniform on the ring's area. For long memory raise both:
            the paper's Path-X has 0.999 and 0.9999.
        max_phase: initial arg(lambda) is uniform in [0, max_phase), in radians. For long sequences the paper makes it
            small (pi / 50 on Path-X), so that modes turn slowly.
        activation: "gelu" or "none", after the recurrence.
        glu: a linear map to 2 D and a gate at the end. With activation="none" and glu=False the mixer is linear.
        dropout: before the gated map, one mask per row and channel for the whole sequence.

    Source: Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv 2303.06349),
    section 3 and appendix A.
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"nu_log", "theta_log", "gamma_log", "B"})

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 256,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        activation: str = "gelu",
        glu: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if d_state < 1:
            raise ValueError(f"LRU: d_state: want at least one mode, got {d_state}")
        if not 0 <= r_min <= r_max <= 1 or r_max == 0 or r_min == 1:
            raise ValueError(
                f"LRU: r_min, r_max: want 0 <= r_min <= r_max <= 1, not both 0 and not both 1, got {r_min} and {r_max}"
            )
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"LRU: max_phase: want an angle above 0 and up to 2 pi, got {max_phase}")
        self.d_model, self.d_state = d_model, d_state
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.nu_log = nn.Parameter(torch.empty(d_state))
        self.theta_log = nn.Parameter(torch.empty(d_state))
        self.gamma_log = nn.Parameter(torch.empty(d_state))
        # Complex numbers are kept as pairs of reals: .double() and .to(dtype) then do what they should.
        self.B = nn.Parameter(torch.empty(d_state, d_model, 2))
        self.C = nn.Parameter(torch.empty(d_model, d_state, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.reset_dynamics()
        self.tail = GatedTail(d_model, activation, glu, dropout)

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw lambda, gamma, B, C and D anew."""
        u, v = torch.rand(2, self.d_state, dtype=torch.float64, device="cpu")
        # The logarithms below want numbers off the ends.
        square = (self.r_min**2 + u * (self.r_max**2 - self.r_min**2)).clamp(1e-12, 1 - 1e-12)
        self.nu_log.copy_((-0.5 * square.log()).log())
        self.theta_log.copy_((self.max_phase * v.clamp(min=1e-12)).log())
        self.gamma_log.copy_(0.5 * torch.log1p(-square))
        self.B.normal_(std=(2 * self.d_model) ** -0.5)
        self.C.normal_(std=self.d_state**-0.5)
        self.D.normal_()

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> Tensor:
        device = self._device() if device is None else device
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.zeros(batch, self.d_state, device=device, dtype=kind)

    def discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log lambda (N,), gamma B (N, D), C (D, N), all complex, and D (D,)."""
        log_a = torch.complex(-widen(self.nu_log).exp(), widen(self.theta_log).exp())
        B = widen(self.gamma_log).exp().unsqueeze(-1) * torch.view_as_complex(widen(self.B))
        return log_a, B, torch.view_as_complex(widen(self.C)), widen(self.D)

    def _emit(self, y: Tensor, seg: Segments | None) -> Tensor:
        y = self.tail(y)
        return y if seg is None else seg.mask(y)

    def _run(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        check_input(self, x, self.d_model)
        with no_autocast(x):
            log_a, B, C, skip = self.discrete()
            v = widen(x) if seg is None else seg.mask(widen(x))
            # Complex maps of a real input, and real parts of complex maps, as real matrix products.
            into = F.linear(v, torch.view_as_real(B).transpose(1, 2).flatten(0, 1)).unflatten(-1, (-1, 2))
            h, state = linear_scan(torch.exp(log_a), torch.view_as_complex(into), state=state, seg=seg)
            y = F.linear(torch.view_as_real(h).flatten(-2), torch.view_as_real(C.conj().resolve_conj()).flatten(-2))
            y = (y + skip * v).to(x.dtype)
        return self._emit(y, seg), state

    def impulse(self, length: int) -> Tensor:
        """Response (before the activation) to unit impulses, D included: (D_out, D_in, length)."""
        log_a, B, C, skip = self.discrete()
        a = powers(log_a, torch.arange(length, device=log_a.device))
        kernel = torch.einsum("on,ln,ni->oil", C, a, B).real
        return torch.cat([kernel[..., :1] + torch.diag(skip).unsqueeze(-1), kernel[..., 1:]], -1) if length else kernel

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        lag, seen = lags(x.shape[1], seg, x.device)
        dense = (self.impulse(x.shape[1]).permute(2, 0, 1)[lag] * seen[..., None, None]).to(x.dtype)
        v = x if seg is None else seg.mask(x)
        return Mixing(dense.expand(x.shape[0], -1, -1, -1, -1), v, lambda y: self._emit(y, seg), "block")
