"""S4: one diagonal-plus-low-rank state space per channel, as a convolution and as a recurrence."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..maths.dplr import DPLR, diagonal_plus_low_rank
from ..ops._precision import widen
from ..ops.dplr import dplr_kernel, dplr_ssm, loop
from ..segments import Segments
from .base import check_input
from .kept import kept
from .layers import Linear
from .siso import SISO, CausalSISO, TwoSidedSISO


class _DPLR(SISO):
    """Initialisation and discretisation of A = diag(Lambda) - sum_r P_r P_r^*."""

    dynamics: ClassVar[frozenset[str]] = SISO.dynamics | {"P"}

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: str = "legs",
        rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        n_ssm: int | None = None,
        dt_transform: str = "exp",
        real_transform: str = "exp",
        rate: float = 1.0,
        activation: str = "gelu",
        glu: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__(
            d_model, d_state, dt_min=dt_min, dt_max=dt_max, n_ssm=n_ssm, dt_tie=True, dt_transform=dt_transform,
            real_transform=real_transform, train_b=True, rate=rate, activation=activation, dropout=dropout,
        )  # fmt: skip
        self.init = init
        self.rank = len(self._families(rank)[0].P)
        self.P = nn.Parameter(torch.empty(self.rank, self.n_ssm, d_state // 2, 2))
        self.reset_dynamics()
        self.out_linear = Linear(d_model, 2 * d_model) if glu else None

    def _families(self, rank: int | None) -> list[DPLR]:
        """What the systems are initialised from, each for as many of them."""
        if self.init != "hippo":
            return [diagonal_plus_low_rank(self.init, self.d_state, rank)]
        if self.n_ssm % 2:
            raise ValueError(
                f"{type(self).__name__}: n_ssm: init='hippo' is half 'legs', half 'fout', so it wants an even number, "
                f"got {self.n_ssm}"
            )
        return [diagonal_plus_low_rank(family, self.d_state, rank) for family in ("legs", "fout")]

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        super().reset_dynamics()
        # As for A and B, the half of each conjugate pair above the real axis is kept.
        self.P.copy_(torch.view_as_real(self._copies([part.P.conj() for part in self._families(self.rank)])))

    def _initial(self) -> tuple[Tensor, Tensor]:
        parts = self._families(self.rank)
        return self._copies([part.Lambda.conj() for part in parts]), self._copies([part.B.conj() for part in parts])

    def _copies(self, parts: list[Tensor]) -> Tensor:
        """From (..., N/2) for each family to (..., n_ssm, N/2)."""
        each = self.n_ssm // len(parts)
        return torch.cat([t.resolve_conj().unsqueeze(-2).expand(*t.shape[:-1], each, -1) for t in parts], -2)

    def discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """w, p, b, C and D as `ops.dplr_ssm` takes them; C (2, D, N/2) for two directions."""
        A, B, C, dt = self.continuous()
        P = self._shared(torch.view_as_complex(widen(self.P)))
        return dt * A, dt.sqrt() * P, dt * B, C, widen(self.D)

    def kernels(self, length: int) -> Tensor:
        w, p, b, c, _ = self.discrete()
        return dplr_kernel(w, p, b, c, length)


class S4(_DPLR, CausalSISO):
    """S4: a state space that is diagonal plus low rank in each channel, then GELU and a gated linear map.

    x' = (diag(Lambda) - sum_r P_r P_r^*) x + B u and y = 2 Re(C x) + D u in each channel, discretised by the bilinear
    rule with the channel's own step dt. The state (B, D, N/2) is complex.

    C itself is the parameter, not C (I - A_bar^L) as in the authors' code: so a module knows nothing of a training
    length, the first call changes no weights, any length works at once, and `step` reads the state out by the same C.

    Args:
        d_model: width D of input and output.
        d_state: N, counting both of each conjugate pair; even.
        init: A, B and P of a HiPPO family: "legs" (a memory that fades), "legt" or "fout" (Legendre polynomials or a
            Fourier series on the last 2 / dt tokens), or "hippo" (half of the systems "legs", half "fout").
        rank: rows of P; those that the family does not need begin at zero. None: as many as it needs, 2 for "legt",
            else 1.
        dt_min, dt_max: initial steps are log-uniform in [dt_min, dt_max]. A mode sees lags in units of dt: for
            sequences of length L, dt_min of about 1 / L is a good choice.
        n_ssm: number of different (A, B, P), shared by the channels h, h + n_ssm, ...; a divisor of D. None: D.
        dt_transform: dt is "exp" or "softplus" of its parameter (with the same initial values).
        real_transform: Re Lambda is -"exp", -"relu" - 1e-4 or -"softplus" of its parameter, or the parameter ("none",
            which lets training make the system unstable).
        rate: multiplies dt; 2 for input that is sampled half as often as in training.
        activation: "gelu" or "none", after the state space.
        glu: a linear map to 2 D and a gate at the end. With activation="none" and glu=False the mixer is the bare
            state space, which is linear.
        dropout: before and after the activation, each one mask per row and channel for the whole sequence.

    Source: Gu et al. 2021, "Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv 2111.00396);
    P P^* in place of P Q^*: Goel et al. 2022 (arXiv 2202.09729), section 4.1.
    """

    @kept()
    def _loop(self) -> loop.Loop:
        return loop.prepare(*self.discrete())

    def _system(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        if loop.serves(x, state, *self._parameters.values(), *self._buffers.values()):
            return loop.run(self._loop(), x, state, seg)
        return dplr_ssm(x, *self.discrete(), state=state, seg=seg)

    def _whole(self, x: Tensor, seg: Segments | None) -> Tensor:
        check_input(self, x, self.d_model)
        return self._emit(dplr_ssm(x, *self.discrete(), seg=seg, final_state=False)[0], seg)


class BidirectionalS4(_DPLR, TwoSidedSISO):
    """S4 that looks both ways: one A, B, P and dt, read out by C[0] over the past and by C[1] over the future.

    The backward kernel begins at the next token. It has no state: a later token changes every earlier output.
    Arguments as in `S4`.

    Source: Goel et al. 2022, "It's Raw! Audio Generation with State-Space Models" (arXiv 2202.09729), section 4.2.
    """
