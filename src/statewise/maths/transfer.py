"""Transfer functions on the imaginary axis: what a system does to a sinusoid, and how far two systems are apart.

G(i omega) = C (i omega - A)^-1 B. Two systems whose G agree at all omega agree on every input, in energy: the supremum
of the difference is the norm of one as a map between signals of finite energy ("strong" agreement). Agreement on each
smooth input alone ("weak") says nothing about a frequency that no such input has: S4D-LegS has its spike there.

Source: Yu et al. 2023 (arXiv 2310.01698), section 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import hippo
from .discretize_dense import zoh
from .ptd import perturb

# Frequencies solved at once: bounds the memory.
_CHUNK = 256


def states(A: Tensor, B: Tensor, omega: Tensor) -> Tensor:
    """(i omega - A)^-1 B for a full matrix: A (N, N), B (N,), omega (W,) in radians per unit of time -> (W, N)."""
    kind = torch.complex128
    eye = torch.eye(len(A), dtype=kind, device="cpu")
    column = B.to(kind).unsqueeze(-1)
    lower = bool((A.triu(1) == 0).all())
    found = []
    for part in omega.to(torch.float64).split(_CHUNK):
        matrix = 1j * part[:, None, None] * eye - A
        solve = torch.linalg.solve_triangular if lower else torch.linalg.solve
        options = {"upper": False} if lower else {}
        found.append(solve(matrix, column.expand(len(part), -1, -1), **options).squeeze(-1))
    return torch.cat(found)


def transfer(A: Tensor, B: Tensor, C: Tensor, omega: Tensor) -> Tensor:
    """C (i omega - A)^-1 B for a full matrix; C (N,). Returns (W,), complex128."""
    return states(A, B, omega) @ C.to(torch.complex128)


def diagonal_transfer(Lambda: Tensor, B: Tensor, C: Tensor, omega: Tensor) -> Tensor:
    """The same for conjugate pairs of which one of each is given: Lambda, B, C (K,), so that y = 2 Re(C x).

    Returns (W,), complex128.
    """
    at = 1j * omega.to(torch.float64).unsqueeze(-1)
    weight = (B * C).to(torch.complex128)
    return (weight / (at - Lambda) + weight.conj() / (at - Lambda.conj())).sum(-1)


class Comparison(NamedTuple):
    """Transfer functions of HiPPO-LegS and of its two diagonal approximations, with one read-out."""

    omega: Tensor  # (W,), ascending from 0
    exact: Tensor  # (W,) LegS
    normal: Tensor  # (W,) its normal part with half the input: S4D-LegS
    perturbed: Tensor  # (W,) perturbed, then diagonalised

    def deviation(self, which: str) -> float:
        """Largest |G - exact| over all frequencies, of "normal" or "perturbed": the error on the worst input."""
        return float((getattr(self, which) - self.exact).abs().max())

    def pulse_error(self, which: str, width: float = 10.0) -> float:
        """Relative error of the output for one smooth input, a Gaussian pulse exp(-(width t)^2 / 2), in energy."""
        energy = torch.exp(-((self.omega / width) ** 2))
        wrong = torch.trapezoid(energy * (getattr(self, which) - self.exact).abs().square(), self.omega)
        return float((wrong / torch.trapezoid(energy * self.exact.abs().square(), self.omega)).sqrt())


def compare(
    n: int, gamma: float = 1000.0, seed: int = 0, *, points: int = 4000, readout: Tensor | None = None
) -> Comparison:
    """Compare S4D-LegS and PTD with HiPPO-LegS of size n, input scaled to length one.

    Args:
        points: frequencies from 0 to 2 n^2 / pi, twice the largest of LegS; closer to each other where they are low.
            Those of the modes are added, since that is where spikes are.
        readout: C (n,); a random one of length one if None (the same in every call).
    """
    A, B = hippo.legs(n)
    B = B / B.norm()
    if readout is None:
        readout = torch.randn(n, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
        readout = readout / readout.norm()
    found = perturb(n, gamma, seed)
    Lambda, V = hippo.legs_diagonal(n)
    spread = 2 * n * n / math.pi * torch.linspace(0, 1, points, dtype=torch.float64, device="cpu") ** 2
    omega = torch.cat([spread, -Lambda.imag, -found.Lambda.imag]).sort().values
    C = readout.to(torch.complex128)
    return Comparison(
        omega,
        transfer(A, B, readout, omega),
        diagonal_transfer(Lambda, V.mH @ (B / 2).to(C.dtype), C @ V, omega),
        diagonal_transfer(found.Lambda, found.V_inv @ B.to(C.dtype), C @ found.V, omega),
    )


class Agreement(NamedTuple):
    """Relative errors for the read-out of one state, the weighted mean of the past."""

    n: int
    gamma: float
    weak_normal: float  # S4D-LegS, on one smooth input
    strong_normal: float  # S4D-LegS, on the worst input
    weak_perturbed: float
    strong_perturbed: float


def agreement(n: int, gamma: float = 1000.0, seed: int = 0) -> Agreement:
    """Weak and strong agreement of both approximations with HiPPO-LegS (see the head of this file).

    As n grows, the weak error of S4D-LegS falls as 1 / n, and its strong error stays where it is. Both errors of PTD
    follow the size of E, so they fall as gamma grows.
    """
    first = torch.zeros(n, dtype=torch.float64, device="cpu")
    first[0] = 1
    found = compare(n, gamma, seed, readout=first)
    top = float(found.exact.abs().max())
    errors = [
        error for which in ("normal", "perturbed") for error in (found.pulse_error(which), found.deviation(which) / top)
    ]
    return Agreement(n, gamma, *errors)


class Disturbed(NamedTuple):
    """A slow signal without and with a fast wave on top, as three memories read it. All are (T,)."""

    time: Tensor
    omega: float  # of the wave, radians per unit of time
    signal: Tensor
    noisy: Tensor
    quiet: dict[str, Tensor]  # what is read of the signal by "exact", "normal" and "perturbed" (see `Comparison`)
    loud: dict[str, Tensor]  # what is read of the noisy signal

    def error(self, which: str, noisy: bool = False) -> float:
        """Root mean square of the difference to LegS on the same input, relative to what LegS reads of the signal."""
        found, exact = (self.loud if noisy else self.quiet)[which], (self.loud if noisy else self.quiet)["exact"]
        return float((found - exact).norm() / self.quiet["exact"].norm())


def disturb(n: int, gamma: float = 1000.0, seed: int = 0, *, amplitude: float = 0.1, end: float = 4.0) -> Disturbed:
    """Let LegS, S4D-LegS and PTD read sin(2 t) + cos(5 t) / 2, without and with a wave at the frequency of the spike.

    The read-out is that of one state, the weighted mean of the past, which a fast wave hardly moves. The systems are
    run as full matrices, with 32 samples in a period of the wave.

    Args:
        amplitude: of the wave. end: units of time to read.
    """
    A, B = hippo.legs(n)
    omega = float(-hippo.legs_diagonal(n)[0].imag[0])
    dt = 2 * math.pi / omega / 32
    time = dt * torch.arange(1, math.ceil(end / dt) + 1, dtype=torch.float64, device="cpu")
    signal = torch.sin(2 * time) + torch.cos(5 * time) / 2
    noisy = signal + amplitude * torch.sin(omega * time)
    systems = {"exact": (A, B), "normal": hippo.legsd(n), "perturbed": (A + perturb(n, gamma, seed).E, B)}
    read = {name: _first_state(*system, torch.stack([signal, noisy]), dt) for name, system in systems.items()}
    quiet, loud = ({name: both[i] for name, both in read.items()} for i in (0, 1))
    return Disturbed(time, omega, signal, noisy, quiet, loud)


def _first_state(A: Tensor, B: Tensor, u: Tensor, dt: float) -> Tensor:
    """State 0 of x' = A x + B u at the end of each step, as a convolution: u (..., L), held over a step -> (..., L).

    The kernel c A^k b is taken as (c A^(q R)) (A^r b) with k = q R + r: about sqrt(L) rows of n numbers each, not L.
    """
    power, into = zoh(A, dt, B)
    length, rows = u.shape[-1], torch.eye(len(B), dtype=B.dtype, device="cpu")[:1]
    columns = into.unsqueeze(-1)
    while columns.shape[1] ** 2 < length:
        columns, power = torch.cat([columns, power @ columns], 1), power @ power
    while len(rows) * columns.shape[1] < length:
        rows, power = torch.cat([rows, rows @ power]), power @ power
    kernel = (rows @ columns).flatten()[:length]
    return torch.fft.irfft(torch.fft.rfft(kernel, 2 * length) * torch.fft.rfft(u, 2 * length))[..., :length]
