"""Pictures of HiPPO: the kernels of a memory beside its basis, and transfer functions of diagonal approximations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..maths.bases import Basis
from ..maths.transfer import Agreement, Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito: told apart by people of all kinds of colour vision.
_EXACT, _NORMAL, _PERTURBED = "#000000", "#D55E00", "#0072B2"
_COLOURS = (_PERTURBED, _NORMAL, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _PALE = "#333333", "#eeeeee"


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # An own Figure, not pyplot: nothing global, no window, no change to the user's settings.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=_INK, fontsize=12, fontweight="bold")
    return figure


def _dress(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.grid(color=_PALE)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plot_kernels(A: Tensor, B: Tensor, basis: Basis, *, end: float = 3.0, shown: int = 5) -> Figure:
    """The first kernels exp(s A) B over the lag s, each with what it stands for, p(s) w(s), dashed."""
    figure = _figure(8, 4.2, "Kernels of a memory (lines) and its weighted basis (dashed)")
    axes = figure.add_subplot()
    lags = torch.linspace(0, end, 300, dtype=torch.float64)
    step = torch.linalg.matrix_exp(lags[1] * A)
    now, values = B, []
    for _ in lags:
        values.append(now)
        now = step @ now
    kernels, meant = torch.stack(values), basis.kernel(lags)
    for k in range(min(shown, len(B))):
        colour = _COLOURS[k % len(_COLOURS)]
        axes.plot(lags, kernels[:, k], color=colour, lw=1.6, label=f"state {k}")
        axes.plot(lags, meant[:, k], color=colour, lw=1.0, ls="--")
    _dress(axes, "lag (units of time)", "weight of the input")
    return figure


def plot_comparison(found: Comparison) -> Figure:
    """|G| over the frequency, of HiPPO-LegS, S4D-LegS and PTD, and how far the last two are from the first."""
    figure = _figure(9.5, 4.2, "Transfer functions on the imaginary axis")
    left, right = figure.subplots(1, 2)
    omega = found.omega[1:]  # the axis is logarithmic
    for name, values, colour in (
        ("HiPPO-LegS", found.exact, _EXACT),
        ("S4D-LegS", found.normal, _NORMAL),
        ("perturbed, then diagonalised", found.perturbed, _PERTURBED),
    ):
        left.loglog(omega, values[1:].abs(), color=colour, lw=1.3, label=name)
        if colour != _EXACT:
            right.loglog(omega, (values - found.exact)[1:].abs(), color=colour, lw=1.3, label=name)
    _dress(left, "frequency (radians per unit of time)", "|G|")
    _dress(right, "frequency (radians per unit of time)", "difference to HiPPO-LegS")
    return figure


def plot_agreement(over_n: Sequence[Agreement], over_gamma: Sequence[Agreement]) -> Figure:
    """Weak and strong errors: of S4D-LegS over the size, and of PTD over gamma at one size."""
    figure = _figure(9.5, 4.2, "Weak (one smooth input) and strong (worst input) agreement with HiPPO-LegS")
    left, right = figure.subplots(1, 2)
    sizes, gammas = [row.n for row in over_n], [row.gamma for row in over_gamma]
    left.loglog(sizes, [row.strong_normal for row in over_n], color=_NORMAL, marker="o", label="S4D-LegS, strong")
    left.loglog(sizes, [row.weak_normal for row in over_n], color=_NORMAL, marker="o", ls="--", label="S4D-LegS, weak")
    left.set_xticks(sizes, [str(n) for n in sizes])
    left.minorticks_off()
    _dress(left, "state size", "relative error")
    right.loglog(
        gammas, [row.strong_perturbed for row in over_gamma], color=_PERTURBED, marker="o", label="PTD, strong"
    )
    right.loglog(
        gammas, [row.weak_perturbed for row in over_gamma], color=_PERTURBED, marker="o", ls="--", label="PTD, weak"
    )
    right.axhline(over_gamma[0].strong_normal, color=_NORMAL, lw=1, label="S4D-LegS, strong")
    right.axhline(over_gamma[0].weak_normal, color=_NORMAL, lw=1, ls="--", label="S4D-LegS, weak")
    _dress(right, f"gamma (state size {over_gamma[0].n})", "relative error")
    return figure
