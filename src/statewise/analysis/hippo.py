"""Pictures of HiPPO: the kernels of a memory beside its basis, and what diagonal approximations do to a wave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..maths.bases import Basis
from ..maths.transfer import Agreement, Comparison, Disturbed
from .plots import COLOURS, INK, _dress, _figure, _title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of HiPPO itself and of its two diagonal approximations.
_EXACT, _NORMAL, _PERTURBED = COLOURS[6], COLOURS[1], COLOURS[0]


def _titled(width: float, height: float, title: str) -> Figure:
    figure = _figure(width, height)
    _title(figure, title)
    return figure


def _legend(axes: Any, x: str, y: str) -> None:
    _dress(axes, x, y)
    axes.legend(frameon=False, fontsize=9)


def plot_kernels(A: Tensor, B: Tensor, basis: Basis, *, end: float = 3.0, shown: int = 5) -> Figure:
    """The first kernels exp(s A) B over the lag s, each with what it stands for, p(s) w(s), dashed."""
    figure = _titled(8, 4.2, "Kernels of a memory (lines) and its weighted basis (dashed)")
    axes = figure.add_subplot()
    lags = torch.linspace(0, end, 300, dtype=torch.float64)
    step = torch.linalg.matrix_exp(lags[1] * A)
    now, values = B, []
    for _ in lags:
        values.append(now)
        now = step @ now
    kernels, meant = torch.stack(values), basis.kernel(lags)
    for k in range(min(shown, len(B))):
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(lags, kernels[:, k], color=colour, lw=1.6, label=f"state {k}")
        axes.plot(lags, meant[:, k], color=colour, lw=1.0, ls="--")
    _legend(axes, "lag (units of time)", "weight of the input")
    return figure


# Name in `Comparison` and `Disturbed`, name in a picture, colour, width: what lies below is wider.
_THREE = (
    ("exact", "HiPPO-LegS", _EXACT, 3.0),
    ("normal", "S4D-LegS", _NORMAL, 1.3),
    ("perturbed", "perturbed, then diagonalised", _PERTURBED, 1.3),
)


def plot_comparison(found: Comparison) -> Figure:
    """|G| over the frequency, of HiPPO-LegS, S4D-LegS and PTD, and how far the last two are from the first."""
    figure = _titled(9.5, 4.2, "Transfer functions on the imaginary axis")
    _gains(figure.subplots(1, 2), found)
    return figure


def plot_robustness(found: Comparison, run: Disturbed) -> Figure:
    """`plot_comparison`, and below it what the three read of a slow signal, without and with a wave at the spike."""
    figure = _titled(9.5, 8.0, "A memory and its diagonal approximations, by frequency and in time")
    above, below = figure.subplots(2, 2)
    _gains(above, found)
    wave = (run.noisy - run.signal).abs().max()
    for axes, read, source, title in (
        (below[0], run.quiet, run.signal, "a slow signal (grey), and its mean over the past as each reads it"),
        (below[1], run.loud, run.noisy, f"the same with a wave of height {wave:.2g} at frequency {run.omega:.4g}"),
    ):
        axes.plot(run.time, source, color="#bbbbbb", lw=0.8)
        for key, _, colour, width in _THREE:
            axes.plot(run.time, read[key], color=colour, lw=width)
        axes.set_title(title, fontsize=9, color=INK)
        _dress(axes, "units of time", "value")  # the colours are those of the panels above
    return figure


def _gains(panels: Any, found: Comparison) -> None:
    left, right = panels
    omega = found.omega[1:]  # the axis is logarithmic
    for key, name, colour, width in _THREE:
        values = getattr(found, key)
        left.loglog(omega, values[1:].abs(), color=colour, lw=width, label=name)
        if key != "exact":
            right.loglog(omega, (values - found.exact)[1:].abs(), color=colour, lw=width, label=name)
    _legend(left, "frequency (radians per unit of time)", "|G|")
    _legend(right, "frequency (radians per unit of time)", "difference to HiPPO-LegS")


def plot_agreement(over_n: Sequence[Agreement], over_gamma: Sequence[Agreement]) -> Figure:
    """Weak and strong errors: of S4D-LegS over the size, and of PTD over gamma at one size."""
    from matplotlib.ticker import NullLocator

    figure = _titled(9.5, 4.2, "Weak (one smooth input) and strong (worst input) agreement with HiPPO-LegS")
    left, right = figure.subplots(1, 2)
    sizes, gammas = [row.n for row in over_n], [row.gamma for row in over_gamma]
    left.loglog(sizes, [row.strong_normal for row in over_n], color=_NORMAL, marker="o", label="S4D-LegS, strong")
    left.loglog(sizes, [row.weak_normal for row in over_n], color=_NORMAL, marker="o", ls="--", label="S4D-LegS, weak")
    left.set_xticks(sizes, [str(n) for n in sizes])
    left.xaxis.set_minor_locator(NullLocator())  # those of y bear labels where the errors lie close together
    _legend(left, "state size", "relative error")
    right.loglog(
        gammas, [row.strong_perturbed for row in over_gamma], color=_PERTURBED, marker="o", label="PTD, strong"
    )
    right.loglog(
        gammas, [row.weak_perturbed for row in over_gamma], color=_PERTURBED, marker="o", ls="--", label="PTD, weak"
    )
    right.axhline(over_gamma[0].strong_normal, color=_NORMAL, lw=1, label="S4D-LegS, strong")
    right.axhline(over_gamma[0].weak_normal, color=_NORMAL, lw=1, ls="--", label="S4D-LegS, weak")
    _legend(right, f"gamma (state size {over_gamma[0].n})", "relative error")
    return figure
