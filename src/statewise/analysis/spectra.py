"""Eigenvalues of the state's own motion: how fast each part of the state forgets, and how fast it turns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..mixers.base import CausalMixer, HasImpulse
from ..segments import Segments
from .dsf import QUOTIENTS, own_system
from .linearised import start, state_derivative
from .lti import modes


@dataclass(frozen=True)
class Spectrum:
    """Factors per token on the parts of a state.

    Args:
        eigenvalues: (groups, samples): for each channel or head its modes, and, where they depend on the input, their
            values over positions.
        source: "time-invariant"; "input-dependent" (the decays over a sample input); "normaliser quotients" (of
            attention, over a sample input: above one is nothing unstable, the sum merely got smaller); or "linearised"
            (eigenvalues of the derivative of the state by the state before, at some positions).
        what: the mixer, for titles.
    """

    eigenvalues: Tensor
    source: str
    what: str

    @property
    def log_decay(self) -> Tensor:
        """Natural log of the magnitude per token; 0 keeps for ever, above 0 grows."""
        return self.eigenvalues.abs().log()

    @property
    def time_scales(self) -> Tensor:
        """Tokens after which a part has fallen to 1/e; infinite for what does not fall."""
        rate = -self.log_decay
        return torch.where(rate > 0, 1 / rate, torch.inf)

    @property
    def continuous(self) -> Tensor:
        """Eigenvalues of the continuous system with one token as unit of time: real part the log decay, imaginary part
        the angle per token, in (-pi, pi]."""
        return torch.complex(self.log_decay, self.eigenvalues.angle().to(self.log_decay.dtype))

    @property
    def unstable_share(self) -> float:
        """The part of all eigenvalues that is larger than one."""
        slack = 16 * torch.finfo(self.log_decay.dtype).eps
        return (self.eigenvalues.abs() > 1 + slack).double().mean().item()

    def quantiles(self, shares: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> list[float]:
        """Time scales, in tokens, below which these shares of all parts lie; as usual, between two parts in a straight
        line."""
        # Not torch.quantile: it takes no more than 16 million values. Not its lerp: infinite values would give NaN.
        ordered = self.time_scales.double().flatten().sort().values
        found = []
        for share in shares:
            place = share * (len(ordered) - 1)
            low, high = (ordered[i].item() for i in (math.floor(place), math.ceil(place)))
            found.append(low + place % 1 * (high - low) if high > low else low)
        return found


@torch.no_grad()
def spectrum(mixer: nn.Module, x: Tensor | None = None, seg: Segments | None = None) -> Spectrum:
    """The spectrum of any mixer with dynamics.

    Args:
        mixer: a causal mixer, or a time-invariant one of two directions.
        x: (B, L, D), a sample of its inputs; not needed for a time-invariant mixer.
        seg: documents and padding of x, which are left out of the sample.

    Raises:
        TypeError: the mixer has no state that moves on its own: it looks ahead, or keeps its inputs as they are.
        ValueError: no x where one is needed; a state too large to linearise.
    """
    what = type(mixer).__name__
    if (eigenvalues := modes(mixer)) is not None:
        return Spectrum(eigenvalues, "time-invariant", what)
    if not isinstance(mixer, CausalMixer):
        raise TypeError(f"spectrum: mixer: want a causal mixer, which has a state, got {what}; its parts may have")
    if x is None:
        known = "have no closed form that is known here" if isinstance(mixer, HasImpulse) else "depend on the input"
        raise ValueError(f"spectrum: x: the dynamics of {what} {known}; want a sample (B, L, D)")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"spectrum: x: want (B, L, D) with at least one token, got {tuple(x.shape)}")
    if (system := own_system(mixer, x, seg)) is not None:
        kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if seg is not None and seg.valid is not None:
            kept = seg.valid
        # The first factor of a document acts on nothing.
        kept = kept & ~seg.resets if seg is not None else kept & (torch.arange(x.shape[1], device=x.device) > 0)
        if not kept.any():
            kept = torch.ones_like(kept)
        sample = system.decay.expand(*x.shape[:2], *system.decay.shape[2:])[kept]  # (positions, H, P, n)
        source = "normaliser quotients" if isinstance(mixer, QUOTIENTS) else "input-dependent"
        return Spectrum(sample.movedim(1, 0).flatten(1), source, what)
    return Spectrum(_linearised(mixer, x), "linearised", what)


def _linearised(mixer: CausalMixer, x: Tensor, samples: int = 8) -> Tensor:
    """(positions, numbers of state): eigenvalues of d state_t / d state_{t-1} along the path that x makes."""
    x = x[:1]
    state, found = start(mixer, x, "spectrum"), []
    places = set(torch.linspace(0, x.shape[1] - 1, min(samples, x.shape[1])).long().tolist())
    for t in range(x.shape[1]):
        if t in places:
            found.append(torch.linalg.eigvals(state_derivative(mixer, x[:, t], state)))
        state = mixer.extend(x[:, t : t + 1], state)[1]
    return torch.stack(found)
