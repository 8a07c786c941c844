"""The picture of a comparison: the metric over steps and over time, all seeds and their mean, and the final figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..curve import BASELINE, label_values
from .report import Report
from .results import FINISHED, Run

# Okabe and Ito's colours, which people with any colour vision tell apart; more models take them again, dashed.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1)))


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "ls": _DASHES[i // len(_COLOURS) % len(_DASHES)]}


def mean_curve(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over runs, as (steps, seconds, values): at the steps that all of them have reached, in straight lines
    between validations."""
    lines = [np.array([(p.step, p.seconds, p.value) for p in r.curve if np.isfinite(p.value)]) for r in runs]
    lines = [line for line in lines if len(line)]
    if not lines:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    first, last = max(line[0, 0] for line in lines), min(line[-1, 0] for line in lines)
    steps = np.unique(np.concatenate([line[:, 0] for line in lines]))
    steps = steps[(first <= steps) & (steps <= last)]
    seconds, values = (np.mean([np.interp(steps, x[:, 0], x[:, i]) for x in lines], axis=0) for i in (1, 2))
    return steps, seconds, values


def _curves(axes: Any, report: Report, axis: str) -> None:
    for i, label in enumerate(report.plan.models):
        runs, style = [r for r in report.runs if r.model == label and r.curve], _style(i)
        for run in runs:
            axes.plot([getattr(p, axis) for p in run.curve], [p.value for p in run.curve], lw=0.8, alpha=0.4, **style)
            if run.status == "diverged":
                axes.plot(getattr(run.curve[-1], axis), run.curve[-1].value, "x", color=style["color"], ms=7)
        steps, seconds, values = mean_curve([r for r in runs if r.status == FINISHED])
        axes.plot(steps if axis == "step" else seconds, values, lw=2.2, label=label, **style)
    axes.set_xlabel({"step": "step", "seconds": "seconds of training, validations not counted"}[axis])
    if axis == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=0)


def _finals(axes: Any, report: Report) -> None:
    """Each seed as a dot, the mean as a bar; models in the order of the plan, as in the legend."""
    by_name = {s.model: s for s in report.summaries}
    for i, label in enumerate(report.plan.models):
        summary, colour = by_name[label], _COLOURS[i % len(_COLOURS)]
        values = list(summary.values.values())
        # Equal figures would hide each other.
        places = i + np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [i] * len(values)
        axes.plot(places, values, "o", color=colour, ms=5, alpha=0.8, mew=0)
        if summary.mean is not None:
            axes.plot([i - 0.3, i + 0.3], [summary.mean] * 2, color=colour, lw=2.2)
    axes.set_xticks(range(len(report.plan.models)), list(report.plan.models), rotation=35, ha="right")
    axes.set_xlim(-0.6, len(report.plan.models) - 0.4)
    axes.set_xlabel("final figures")


def plot(report: Report, path: Path) -> None:
    """Write the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    # An own Figure, not pyplot: nothing global, no window, no change to the user's settings.
    width = 10 + max(len(report.plan.models) * 0.55, 2.5)
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[5, 5, width - 10])
    _curves(left, report, "step")
    _curves(middle, report, "seconds")
    _finals(right, report)
    for axes in (left, middle, right):
        for value in report.baselines.values():
            axes.axhline(value, color=BASELINE, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if report.facts.lower_is_better:
        left.set_yscale("log")
    else:
        left.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_ylabel(f"{report.metric}, validation")
    left.legend(frameon=False, fontsize=9)
    left.set_ylim(left.get_ylim())  # of all panels, now that all is drawn
    label_values(right, [(value, name, BASELINE, False) for name, value in report.baselines.items()], gap=0.08)
    figure.savefig(path, dpi=150, metadata={"Software": "statewise"})
