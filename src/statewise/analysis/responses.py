"""What a time-invariant mixer does to an impulse, and to a wave of each frequency."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..mixers.base import HasImpulse
from ..mixers.s4 import S4
from ..ops._precision import widen
from .lti import diagonal_form, low_rank_gain


@dataclass(frozen=True)
class ImpulseResponse:
    """taps: (channels, length), one response for each channel, or for each pair (output, input) if they mix.

    inputs: how many; response o * inputs + i is that of output o to input i. None: of channels, which do not mix.
    """

    taps: Tensor
    what: str
    inputs: int | None = None

    @property
    def things(self) -> str:
        """What there is a response of, for titles."""
        return "channels" if self.inputs is None else "pairs"

    @property
    def energy(self) -> Tensor:
        """(channels,): sum of squares."""
        return self.taps.square().sum(-1)

    def reach(self, share: float = 0.5) -> Tensor:
        """(channels,): the number of taps that hold this share of the energy within the length."""
        if not 0 < share <= 1:
            raise ValueError(f"reach: share: want 0 < share <= 1, got {share}")
        part = self.taps.square().cumsum(-1) / self.energy.clamp(min=torch.finfo(self.taps.dtype).tiny)[..., None]
        # Rounding may leave the last sum a hair below one.
        return (part < share * (1 - 1e-6)).sum(-1) + 1


@dataclass(frozen=True)
class TransferFunction:
    """omega: (F,) in radians per token, 0 to pi. gain: (channels, F) complex. `exact`: not cut off after `length`.

    inputs: as of an `ImpulseResponse`.
    """

    omega: Tensor
    gain: Tensor
    exact: bool
    what: str
    inputs: int | None = None

    @property
    def things(self) -> str:
        """What there is a gain of, for titles."""
        return "channels" if self.inputs is None else "pairs"


def _lti(function: str, mixer: object) -> HasImpulse:
    if not isinstance(mixer, HasImpulse):
        raise TypeError(
            f"{function}: mixer: {type(mixer).__name__} is not causal and time-invariant (HasImpulse): no one response "
            "says it all. `analysis.mixing_matrices` has its matrix on an input, `analysis.memory` its gradients"
        )
    return mixer


@torch.no_grad()
def impulse_response(mixer: HasImpulse, length: int) -> ImpulseResponse:
    """The response of the linear core of a mixer to an impulse, over `length` tokens.

    Raises:
        TypeError: the mixer is not time-invariant.
    """
    if length < 1:
        raise ValueError(f"impulse_response: length: want at least 1 token, got {length}")
    taps = _lti("impulse_response", mixer).impulse(length)
    return ImpulseResponse(taps.reshape(-1, length), type(mixer).__name__, _inputs(taps))


def _inputs(responses: Tensor) -> int | None:
    """Of (D, length), None; of (D_out, D_in, length), D_in."""
    return responses.shape[1] if responses.ndim == 3 else None


@torch.no_grad()
def transfer_function(mixer: HasImpulse, frequencies: int = 512, length: int = 4096) -> TransferFunction:
    """The gain of the linear core for waves exp(i omega t), with omega from 0 to pi.

    C (1 - A exp(-i omega))^-1 B + D with no cut-off, if the mixer has a diagonal form or is S4; otherwise the Fourier
    transform of the first `length` taps of the impulse response.

    Raises:
        TypeError: the mixer is not time-invariant.
    """
    if frequencies < 2:
        raise ValueError(f"transfer_function: frequencies: want at least 2, got {frequencies}")
    mixer = _lti("transfer_function", mixer)
    form = diagonal_form(mixer)
    if isinstance(mixer, S4):
        omega = torch.linspace(0, torch.pi, frequencies, dtype=widen(mixer.D).dtype, device=mixer.D.device)
        return TransferFunction(omega, low_rank_gain(mixer, omega), True, type(mixer).__name__)
    if form is None:
        whole = widen(mixer.impulse(length))
        taps = whole.reshape(-1, length)
        omega = torch.linspace(0, torch.pi, frequencies, dtype=taps.dtype, device=taps.device)
        wave = torch.exp(-1j * omega[:, None] * torch.arange(length, dtype=taps.dtype, device=taps.device))
        return TransferFunction(omega, taps.to(wave.dtype) @ wave.mT, False, type(mixer).__name__, _inputs(whole))
    omega = torch.linspace(0, torch.pi, frequencies, dtype=form.skip.dtype, device=form.skip.device)
    z = torch.exp(-1j * omega)
    decay, write, read = (t.to(z.dtype) for t in (form.decay, form.write, form.read))
    # The core gives the real part, so each mode acts beside its conjugate, each with half of the weight.
    one, two = (1 / (1 - mode[..., None] * z) for mode in (decay, decay.conj()))
    if decay.ndim == 1:
        gain = torch.einsum("on,nf,ni->oif", read, one, write)
        gain = gain + torch.einsum("on,nf,ni->oif", read.conj(), two, write.conj())
        gain = gain / 2 + torch.diag(form.skip).unsqueeze(-1)
    else:
        weight = (read * write).unsqueeze(-1)
        gain = (weight * one + weight.conj() * two).sum(1) / 2 + form.skip.unsqueeze(-1)
    return TransferFunction(omega, gain.reshape(-1, frequencies), True, type(mixer).__name__, _inputs(gain))
