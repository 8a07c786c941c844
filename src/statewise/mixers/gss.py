"""GSS: gated state spaces, a diagonal state space of reduced width that modulates a wide gated branch."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..maths.discretize import phi1
from ..maths.initialisers import complex_normal
from ..ops._precision import widen
from ..segments import Segments
from .base import CausalMixer, HasMixing, Mixing, check_input
from .dss import StepFree
from .layers import Linear


class GSSCore(StepFree):
    """The state space of GSS: DSS-exp at step one, with Lambda and W drawn at random and no other initialisation.

    Lambda_n = -exp(Lambda_re) + i exp(Lambda_im), shared by all channels, and
    K_l = Re sum_n W_n (exp(Lambda_n) - 1) / Lambda_n exp(l Lambda_n). State (B, D, N), complex.

    Args:
        d_model: width of input and output.
        d_state: N, the number of complex modes (no conjugates are left out).

    Source: Mehta et al. 2022, "Long Range Language Modeling via Gated State Spaces" (arXiv 2206.13947), section 3.
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"Lambda_re", "Lambda_im"})

    def __init__(self, d_model: int, *, d_state: int = 512):
        super().__init__()
        if d_state < 1:
            raise ValueError(f"GSS: d_state: want at least one mode, got {d_state}")
        self.d_model, self.d_state = d_model, d_state
        self.Lambda_re = nn.Parameter(torch.empty(d_state))
        self.Lambda_im = nn.Parameter(torch.empty(d_state))
        # Complex numbers are kept as pairs of reals: .double() and .to(dtype) then do what they should.
        self.W = nn.Parameter(torch.empty(d_model, d_state, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.tail = nn.Identity()
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw Lambda, W and D anew."""
        self.Lambda_re.normal_()
        self.Lambda_im.normal_()
        self.W.copy_(complex_normal(self.W.shape[:-1], 2.0, device=self.W.device))
        self.D.normal_()

    def _modes(self) -> tuple[Tensor, Tensor]:
        Lambda = torch.complex(-widen(self.Lambda_re).exp(), widen(self.Lambda_im).exp())
        return Lambda, torch.view_as_complex(widen(self.W)) * phi1(Lambda)


class GSS(CausalMixer, HasMixing):
    """Gated state space: out = W_o(W_g SSM(norm(gelu(W_u x))) * gelu(W_v x)), the state space on few channels.

    The state space runs on H = d_ssm channels only, a quarter of D in the paper, and is brought up to the width
    F = expand * D of the gate behind it. Its state (B, H, N) is complex. `mixer.ssm` is the bare state space, a mixer
    of its own: `mixer.ssm.impulse(length)` gives its kernels. Put a norm and a residual path around the mixer, as
    the paper does (`ResidualBlock`).

    Args:
        d_model: width D of input and output.
        d_state: N, the number of complex modes (no conjugates are left out).
        d_ssm: H, channels of the state space; None: D / 4.
        expand: F = expand * D, the width of the gated branch.

    The paper's language model has D = 1024, F = 4096, H = 256 and N = 512, which are the defaults in proportion.

    Source: Mehta et al. 2022, "Long Range Language Modeling via Gated State Spaces" (arXiv 2206.13947), section 3.
    """

    def __init__(self, d_model: int, *, d_state: int = 512, d_ssm: int | None = None, expand: int = 4):
        super().__init__()
        d_ssm = max(1, d_model // 4) if d_ssm is None else d_ssm
        for name, value in (("d_ssm", d_ssm), ("expand", expand)):
            if value < 1:
                raise ValueError(f"GSS: {name}: want a positive number, got {value}")
        self.d_model, self.d_ssm, self.d_inner = d_model, d_ssm, expand * d_model
        self.u_proj = Linear(d_model, d_ssm, bias=False)
        self.v_proj = Linear(d_model, self.d_inner, bias=False)
        self.norm = nn.LayerNorm(d_ssm)
        self.ssm = GSSCore(d_ssm, d_state=d_state)
        self.up_proj = Linear(d_ssm, self.d_inner, bias=False)
        self.out_proj = Linear(self.d_inner, d_model, bias=False)

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> Tensor:
        return self.ssm.init_state(batch, device=device, dtype=dtype)

    def _reduce(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.u_proj(x)))

    def _emit(self, y: Tensor, x: Tensor, seg: Segments | None) -> Tensor:
        y = self.out_proj(self.up_proj(y) * F.gelu(self.v_proj(x)))
        return y if seg is None else seg.mask(y)

    def _run(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        check_input(self, x, self.d_model)
        if seg is not None:
            x = seg.mask(x)
        y, state = self.ssm.extend(self._reduce(x), state, seg)
        return self._emit(y, x, seg), state

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        if seg is not None:
            x = seg.mask(x)
        dense, v, emit, kind = self.ssm.mixing(self._reduce(x), seg)
        return Mixing(dense, v, lambda y: self._emit(emit(y), x, seg), kind)
