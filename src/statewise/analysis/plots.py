"""Pictures of the views. Each function takes what a view gives and returns a matplotlib Figure; `save` writes a PNG.

Colours are those of Okabe and Ito, and cividis, which people of all kinds of colour vision tell apart.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .gradients import Memory, StateNorms
    from .matrices import MixingMatrices
    from .responses import ImpulseResponse, TransferFunction
    from .spectra import Spectrum

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
INK, PALE = "#333333", "#eeeeee"
SHOWN = 6  # matrices of one picture, where all are too many
LINES = 4  # lines of one picture
FLOOR = 1e-4  # of the largest entry: what is smaller has the lowest colour


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # An own Figure, not pyplot: nothing global, no window, no change to the user's settings.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Figure, title: str, note: str = "") -> None:
    figure.suptitle(title, color=INK, fontsize=12, fontweight="bold")
    if note:
        figure.supxlabel(note, color="#666666", fontsize=8.5)


def _dress(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=PALE)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _chosen(count: int, asked: Sequence[int] | None, what: str, most: int = LINES) -> list[int]:
    """Which of `count` things are shown: those asked for, else all if few, else some spread evenly."""
    if asked is None:
        return list(range(count)) if count <= most else np.linspace(0, count - 1, most).round().astype(int).tolist()
    for i in asked:
        if not 0 <= i < count:
            raise ValueError(f"{what}: want 0 to {count - 1}, got {i}")
    return list(asked)


def _responses(count: int, inputs: int | None, asked: Sequence[int] | None) -> list[tuple[int, str, bool]]:
    """(which, its name, whether it is a pair of an input with its own output) of the responses that are shown.

    Pairs that are not asked for: half of them of an input with its own output, half with another.
    """
    if inputs is None:
        return [(i, f"channel {i}", False) for i in _chosen(count, asked, "channel")]
    if asked is None and count > LINES:
        outputs = count // inputs
        ends = _chosen(outputs, range(outputs) if outputs <= LINES else None, "output")
        asked = [o * inputs + (o + k % 2 * max(inputs // 2, 1)) % inputs for k, o in enumerate(ends)]
    chosen = _chosen(count, asked, "pair")
    return [(i, f"input {i % inputs} to output {i // inputs}", i % inputs == i // inputs) for i in chosen]


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i // len(COLOURS) % len(STYLES)]}


def _array(t: torch.Tensor) -> np.ndarray:
    t = t.detach().cpu()
    return (t if t.is_complex() else t.double()).numpy()


def plot_matrices(view: MixingMatrices) -> Figure:
    """A heat map of |weight| for each head, on a logarithmic scale that the heads share. Dashed lines: documents."""
    from matplotlib.colors import LogNorm

    chosen = _chosen(len(view.dense), None, "head", SHOWN)
    columns = min(math.ceil(math.sqrt(len(chosen))), 3)
    rows = math.ceil(len(chosen) / columns)
    figure = _figure(3.1 * columns + 1.1, 3.1 * rows + 0.9)
    grid = figure.subplots(rows, columns, squeeze=False)
    size = _array(view.dense[chosen].abs())
    top = size.max() or 1.0
    for axes, i, values in zip(grid.flat, chosen, size):
        axes.set_facecolor("#f4f4f4")
        shown = np.where(values == 0, np.nan, values)
        image = axes.imshow(shown, norm=LogNorm(FLOOR * top, top), cmap="cividis", interpolation="nearest")
        for start in view.starts:
            axes.axhline(start - 0.5, color="#D55E00", lw=0.9, ls=(0, (4, 3)))
            axes.axvline(start - 0.5, color="#D55E00", lw=0.9, ls=(0, (4, 3)))
        if view.total > 1:
            axes.set_title(f"head {view.heads[i]}", fontsize=10, color=INK)
        axes.tick_params(labelsize=8)
        axes.label_outer()
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("output position", color=INK, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("input position", color=INK, fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.85, extend="min").set_label("|weight|", color=INK)
    some = f"{len(chosen)} of {view.total} heads. " if len(chosen) < view.total else ""
    note = f"{some}Grey: exactly zero." + (" Dashed: a document begins." if view.starts else "")
    _title(figure, f"Mixing matrix: {view.what}", note)
    return figure


def plot_impulse(view: ImpulseResponse, channels: Sequence[int] | None = None) -> Figure:
    """The responses of some channels, and for all of them where their energy lies."""
    chosen = _responses(len(view.taps), view.inputs, channels)
    figure = _figure(9.5, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    cut = False
    for i, (which, name, own) in enumerate(chosen):
        line = _array(view.taps[which])
        if own and len(line) > 1:  # the skip weight of this one tap is far larger than all the rest
            line, cut = np.concatenate([[np.nan], line[1:]]), True
        left.plot(line, lw=1.5, label=name, **_style(i))
    left.axhline(0, color=INK, lw=0.6)
    _dress(left, "tokens after the impulse", "response")
    left.legend(frameon=False, fontsize=8)
    taps = _array(view.taps.abs())
    size = np.where(taps > 0, taps, np.nan)
    low, middle, high = (np.nan_to_num(np.nanquantile(size, q, axis=0), nan=0.0) for q in (0.1, 0.5, 0.9))
    right.fill_between(
        np.arange(size.shape[1]), low, high, color=COLOURS[5], alpha=0.4, lw=0, label=f"80 % of {view.things}"
    )
    right.plot(middle, color=COLOURS[0], lw=1.8, label="median")
    right.set_yscale("log")
    _dress(right, "tokens after the impulse", "|response|")
    right.legend(frameon=False, fontsize=8)
    half, most = (np.median(_array(view.reach(share))) for share in (0.5, 0.99))
    middle_of = f"(median of {len(taps):,} {view.things})"
    note = f"Half of the energy lies within {half:.0f} tokens, 99 % within {most:.0f} {middle_of}."
    note += (
        "\nThe lines of an input to its own output leave out the first tap, where the skip weight is." if cut else ""
    )
    _title(figure, f"Impulse response: {view.what}", note)
    return figure


def plot_transfer(view: TransferFunction, channels: Sequence[int] | None = None) -> Figure:
    """Gain in decibels and phase over frequency, for some channels and, in pale, the spread of all."""
    chosen = _responses(len(view.gain), view.inputs, channels)
    figure = _figure(8.5, 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    omega = _array(view.omega) / np.pi
    gain = _array(view.gain)
    level = 20 * np.log10(np.maximum(np.abs(gain), 1e-12))
    low, high = np.quantile(level, (0.1, 0.9), axis=0)
    top.fill_between(omega, low, high, color=PALE, lw=0, label=f"80 % of {view.things}")
    for i, (which, name, _) in enumerate(chosen):
        top.plot(omega, level[which], lw=1.4, label=name, **_style(i))
        bottom.plot(omega, np.unwrap(np.angle(gain[which])) / np.pi, lw=1.4, **_style(i))
    _dress(top, "", "gain (dB)")
    figure.legend(*top.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    _dress(bottom, "frequency (1: one swing in two tokens)", "phase (units of π)")
    bottom.set_xlim(0, 1)
    note = "" if view.exact else "From an impulse response that is cut off."
    _title(figure, f"Transfer function: {view.what}", note)
    return figure


def plot_spectrum(view: Spectrum) -> Figure:
    """Eigenvalues in the unit disc and by frequency, or decays by head; and how much of the state has which time
    scale."""
    values = _array(view.eigenvalues)
    scales = _array(view.time_scales).flatten()
    turning = np.iscomplexobj(values) and np.abs(values.imag).max() > 0
    figure = _figure(13 if turning else 9.5, 4.2)
    panels = figure.subplots(1, 3 if turning else 2)
    if turning:
        _disc(panels[0], values.flatten())
        _frequencies(panels[1], values.flatten(), scales)
    else:
        _decays(panels[0], values.real)
    _histogram(panels[-1], scales)
    endless = 100 * (1 - np.isfinite(scales).mean())
    parts = [f"{view.source}, {values.size:,} values"]
    parts += [f"{endless:.1f} % do not decay"] if endless > 0.05 else []
    parts += [f"{100 * view.unstable_share:.1f} % are above one"] if view.unstable_share > 0 else []
    _title(figure, f"Spectrum: {view.what}", ", ".join(parts) + ".")
    return figure


def _disc(axes: Any, values: np.ndarray) -> None:
    from matplotlib.patches import Circle

    both = np.concatenate([values, values.conj()])
    axes.add_patch(Circle((0, 0), 1, fill=False, color=INK, lw=0.8))
    axes.scatter(both.real, both.imag, s=9, color=COLOURS[0], alpha=_opacity(len(both)), lw=0)
    reach = 1.08 * max(1.0, np.abs(both).max())
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    _dress(axes, "real part", "imaginary part")
    axes.set_title("eigenvalues per token, unit circle", fontsize=10, color=INK)


def _frequencies(axes: Any, values: np.ndarray, scales: np.ndarray) -> None:
    shown = np.isfinite(scales)
    turns = np.abs(np.angle(values)) / (2 * np.pi)
    axes.scatter(scales[shown], turns[shown], s=9, color=COLOURS[0], alpha=_opacity(len(values)), lw=0)
    axes.set_xscale("log")
    axes.set_ylim(-0.01, 0.51)
    _dress(axes, "time scale (tokens to 1/e)", "frequency (swings per token)")
    axes.set_title("which frequency is kept how long", fontsize=10, color=INK)


def _decays(axes: Any, values: np.ndarray) -> None:
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95), axis=1)
    if len(values) <= 16:
        spread = np.stack([middle - low, high - middle])
        axes.errorbar(
            np.arange(len(values)), middle, spread, color=COLOURS[0], fmt="o", capsize=4, label="90 %, median"
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        _dress(axes, "head or channel", "decay per token")
    else:
        order, at = np.argsort(middle), np.arange(len(values))
        axes.fill_between(at, low[order], high[order], color=COLOURS[5], alpha=0.45, lw=0, label="90 % of values")
        axes.plot(at, middle[order], color=COLOURS[0], lw=1.6, label="median")
        _dress(axes, "heads or channels, sorted", "decay per token")
    axes.axhline(1, color=INK, lw=0.8, ls=":")
    axes.legend(frameon=False, fontsize=8, loc="best")
    axes.set_title("decays of each head", fontsize=10, color=INK)


def _histogram(axes: Any, scales: np.ndarray) -> None:
    finite = scales[np.isfinite(scales) & (scales > 0)]
    if len(finite):
        edges = np.geomspace(max(finite.min(), 1e-2) * 0.9, max(finite.max(), 1.0) * 1.1, 41)
        shares = np.full(len(finite), 100 / len(scales))
        axes.hist(np.clip(finite, edges[0], edges[-1]), bins=edges, color=COLOURS[0], weights=shares)
        axes.set_xscale("log")
        middle = float(np.median(scales))
        if np.isfinite(middle):
            axes.axvline(middle, color=COLOURS[1], lw=1.5, ls="--", label=f"median {middle:,.3g} tokens")
            axes.set_ylim(top=1.12 * axes.get_ylim()[1])
            axes.legend(frameon=False, fontsize=8, loc="upper right")
    else:
        axes.text(0.5, 0.5, "nothing decays", ha="center", color=INK, transform=axes.transAxes)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    _dress(axes, "time scale (tokens to 1/e)", "share of the state")
    axes.set_title("time scales", fontsize=10, color=INK)


def _opacity(count: int) -> float:
    return min(1.0, 0.15 + 150 / count)


def plot_memory(views: Memory | Sequence[Memory]) -> Figure:
    """Influence of an input on the output k tokens later, for one or several models, relative to the largest."""
    from .gradients import Memory

    views = [views] if isinstance(views, Memory) else list(views)
    figure = _figure(8, 4.4)
    axes = figure.add_subplot()
    ahead, some = any(view.looks_ahead for view in views), False
    for i, view in enumerate(views):
        curve, lags = _array(view.curve), view.lags.numpy()
        # The longest lags stand for the last outputs alone, or the first; a quarter of the outputs at least is shown.
        deep = int(view.positions[len(view.positions) * 3 // 4])
        far = view.influence.shape[1] - 1 - int(view.positions[(len(view.positions) - 1) // 4])
        shown = (-far <= lags) & (lags <= deep)
        curve, lags = curve[shown], lags[shown]
        some |= curve.max() > 0
        curve = np.where(curve > 0, curve, np.nan) / (curve.max() or 1.0)
        name = f"{view.what}: half within {view.half_life}, 90 % within {view.reach(0.9)} tokens"
        axes.plot(lags if ahead else lags + 1, curve, lw=1.8, label=name, **_style(i))
    if some:
        axes.set_yscale("log")
        # Below the rounding of single precision nothing matters.
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-8), top=2)
    if ahead:
        axes.axvline(0, color=INK, lw=0.8, ls=":")
        _dress(axes, "tokens back (below zero: ahead)", "influence, largest = 1")
    else:
        axes.set_xscale("log")
        _dress(axes, "tokens back, the present one counted as 1", "influence, largest = 1")
    axes.legend(frameon=False, fontsize=9)
    _title(figure, "Memory: how much an input matters later", "Norm of d output / d input, averaged over positions.")
    return figure


def plot_influence(view: Memory) -> Figure:
    """The norms of all derivatives as a heat map: a mixing matrix for models that have none."""
    from matplotlib.colors import LogNorm

    values = _array(view.influence)
    top = values.max() or 1.0
    at = view.positions.numpy()
    shown = np.where(values > 0, values, np.nan)
    half = (at[-1] - at[0]) / max(len(at) - 1, 1) / 2 or 0.5  # of a row
    low, high = at[0] - half, at[-1] + half
    # A token is as high as it is wide, unless that left a line.
    tall = (high - low) / values.shape[1]
    figure = _figure(5.6, 1.2 + 3.4 * max(tall, 0.4))
    axes = figure.add_subplot()
    image = axes.imshow(
        shown, norm=LogNorm(FLOOR * top, top), cmap="cividis", extent=(-0.5, values.shape[1] - 0.5, high, low),
        aspect="equal" if tall > 0.25 else "auto", interpolation="nearest",
    )  # fmt: skip
    axes.set_facecolor("#f4f4f4")
    axes.set_xlabel("input position", color=INK)
    axes.set_ylabel("output position", color=INK)
    figure.colorbar(image, extend="min").set_label("norm of d output / d input", color=INK)
    _title(figure, f"Influence: {view.what}", "Grey: exactly zero.")
    return figure


def plot_states(view: StateNorms) -> Figure:
    """The norm of each part of the state after each token."""
    figure = _figure(8, 4.2)
    axes = figure.add_subplot()
    norms = _array(view.norms)
    chosen = _chosen(len(view.names), None, "part", SHOWN)
    for i, part in enumerate(chosen):
        name = f"{view.names[part]} ({int(view.sizes[part, -1]):,} numbers)"
        axes.plot(np.arange(1, norms.shape[1] + 1), norms[part], lw=1.6, label=name, **_style(i))
    shown = norms[chosen]
    if shown.min() > 0 and shown.max() > 100 * shown.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    _dress(axes, "tokens read", "norm of the state")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    note = f"{len(chosen)} of {len(view.names)} parts." if len(chosen) < len(view.names) else ""
    _title(figure, f"State while reading: {view.what}", note)
    return figure


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a PNG.

    Raises:
        ValueError: the name does not end in .png.
        OSError: it cannot be written.
    """
    if os.path.splitext(os.fspath(path))[1].lower() != ".png":
        raise ValueError(f"out: want a file name that ends in .png, got {os.fspath(path)}")
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    with Image.open(drawn) as image:
        # 256 colours are all that such a picture needs, in a third of the bytes.
        few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, format="PNG", optimize=True)
