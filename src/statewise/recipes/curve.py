"""The picture of a run: training and validation over steps, baselines as lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..training.directory import RunDirectory, read_metrics

if TYPE_CHECKING:
    from ..tasks import Task

_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8)
BASELINE = "#8c6d31"
_TRAIN, _VALIDATION, _INK = "#9ecae1", "#08519c", "#333333"


def _smooth(y: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` values, over what there is at the ends."""
    kernel = np.ones(width)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def _spread(values: list[float], gap: float) -> list[float]:
    """Heights for labels, near the given ascending values and at least `gap` apart."""
    places = list(values)
    for _ in range(100):
        moved = False
        for i in range(len(places) - 1):
            short = gap - (places[i + 1] - places[i])
            if short > 1e-9:
                places[i] -= short / 2
                places[i + 1] += short / 2
                moved = True
        if not moved:
            break
    return places


def label_values(axes: Any, labels: Sequence[tuple[float, str, str, bool]], gap: float = 0.035) -> None:
    """Texts beside the right edge, at the heights of their values; they make room for each other.

    The limits of the axes must be set before.

    Args:
        labels: (value, text, colour, whether it is bold).
        gap: from the edge to the texts, as a share of the width of the axes.
    """
    labels = sorted(labels)
    to_axes = axes.transScale + axes.transLimits
    heights = [float(to_axes.transform((0, value))[1]) for value, *_ in labels]
    for height, place, (_, text, colour, bold) in zip(heights, _spread(heights, 0.045), labels):
        axes.annotate(
            text,
            (1, height),
            (1 + gap, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            fontweight="bold" if bold else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 0},
            annotation_clip=False,
        )


def _label_lines(axes: Any, baselines: Mapping[str, float], final: float, show: Callable[[float], str]) -> None:
    """A line for each baseline, and at the right edge its name and value."""
    for value in baselines.values():
        axes.axhline(value, color=BASELINE, lw=1, ls=(0, (4, 3)), zorder=1)
    labels = [(value, f"{name} {show(value)}", BASELINE, False) for name, value in baselines.items()]
    label_values(axes, [*labels, (final, f"this model {show(final)}", _VALIDATION, True)])


def plot_curve(run: RunDirectory, task: Task, label: str, baselines: Mapping[str, float], final: float) -> None:
    """Write curve.png from metrics.csv."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    rows = read_metrics(run.metrics)
    name = task.headline
    train = np.array([(r["step"], r[name]) for r in rows if name in r]).reshape(-1, 2)
    valid = np.array([(r["step"], r[f"val_{name}"]) for r in rows if f"val_{name}" in r]).reshape(-1, 2)
    # An own Figure, not pyplot: nothing global, no window, no change to the user's settings.
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smooth = _smooth(train[:, 1], max(len(train) // 50, 1))
    axes.plot(*train.T, color=_TRAIN, lw=0.6, alpha=0.5)
    axes.plot(train[:, 0], smooth, color=_TRAIN, lw=2, label="training")
    axes.plot(*valid.T, color=_VALIDATION, lw=2, marker="o", ms=4, label="held out", clip_on=False, zorder=3)
    axes.set_xlim(0, rows[-1]["step"])
    shown = np.concatenate([smooth, valid[:, 1], [final], list(baselines.values())])
    if task.lower_is_better:
        # Logarithmic: what happens near the best baseline is visible beside the untrained start.
        axes.set_yscale("log")
        axes.set_ylim(shown.min() / 1.08, shown.max() * 1.06)
        ticks = [t for t in _TICKS if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    else:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter("{x:.0%}")
    _label_lines(axes, baselines, final, (lambda v: f"{v:.2f}") if task.lower_is_better else (lambda v: f"{v:.1%}"))
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(label, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if task.lower_is_better:
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.94))
    else:
        axes.legend(frameon=False, loc="best")
    figure.savefig(run.curve, dpi=150, metadata={"Software": "statewise"})
