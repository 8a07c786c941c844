"""report.html of a run: what was run, how it went, what came out, and how to go on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..training.directory import RunDirectory, read_metrics
from . import html, names
from .report import describe

if TYPE_CHECKING:
    from .recipe import Recipe

# What has a place of its own on the page.
_APART = ("baselines", "chance", "samples")


def _number(value: float, share: bool) -> str:
    return f"{value:.1%}" if share else f"{value:.3f}"


def _figures(results: Mapping[str, Any], headline: str, final: float, lower: bool) -> list[str]:
    """The headline beside its baselines, worst first."""
    share = headline.endswith("accuracy")
    others = {str(k): float(v) for k, v in results.get("baselines", {}).items()}
    if "chance" in results:
        others["chance"] = float(results["chance"])
    values = {**others, "this model": final}
    order = dict(sorted(values.items(), key=lambda row: -row[1] if lower else row[1]))
    name = headline.replace("_", " ")
    return [
        html.text(_number(final, share), "figure"),
        html.text(f"{name}; {'lower' if lower else 'higher'} is better", "soft"),
        html.bars(order, {k: _number(v, share) for k, v in order.items()}, "this model") if others else "",
    ]


def _samples(results: Mapping[str, Any]) -> list[str]:
    samples = results.get("samples", [])
    if not samples:
        return []
    found = [html.heading("Samples"), html.text("The first line is the prompt.", "soft")]
    return found + [html.code(f"{prompt}\n{text}") for prompt, text in samples]


_WIDTH, _HEIGHT = 300, 90


def _small_curve(rows: Sequence[Mapping[str, float]], name: str) -> str:
    """One column of metrics.csv over steps, as a drawing without axes but with its range."""
    points = [(r["step"], r[name]) for r in rows if name in r and math.isfinite(r[name])]
    if len(points) < 2:
        return ""
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = min(values), max(values)
    # A few hundred points are all that can be seen.
    stride = max(len(points) // 300, 1)
    path = " ".join(
        f"{(s - steps[0]) / (steps[-1] - steps[0] or 1) * _WIDTH:.1f},"
        f"{_HEIGHT - (v - low) / (high - low or 1) * _HEIGHT:.1f}"
        for s, v in points[::stride]
    )
    drawing = (
        f'<svg width="{_WIDTH}" height="{_HEIGHT + 4}" viewBox="-2 -2 {_WIDTH + 4} {_HEIGHT + 4}">'
        f'<polyline points="{path}" fill="none" stroke="var(--mark)" stroke-width="1.2"/></svg>'
    )
    return html.figure(drawing, f"{name.replace('_', ' ')}: between {low:.3g} and {high:.3g}")


def write_page(recipe: Recipe, run: RunDirectory) -> None:
    """Write report.html from the other files of a finished run."""
    rows = read_metrics(run.metrics)
    results = json.loads(run.results.read_text(encoding="utf-8"))
    machine = json.loads(run.machine.read_text(encoding="utf-8"))
    headline, lower = recipe.task.headline, recipe.task.lower_is_better
    final = results.get(headline, results.get(f"val_{headline}"))
    if final is None:
        final = next(r[f"val_{headline}"] for r in reversed(rows) if f"val_{headline}" in r)
    more = {k: v for k, v in results.items() if k not in (*_APART, headline)}
    peak, before = (machine.pop(name, None) for name in ("peak_memory_bytes", "memory_before_bytes"))
    memory = f"{peak / 1e6:,.0f} MB" + (f", {before / 1e6:,.0f} MB of it before the first step" if before else "")
    phase = recipe.name not in names()  # of another run, which a command cannot start alone
    commands = [
        f"statewise run --config {run.config} --seed {recipe.training.seed + 1}    # again, with another seed",
        f"statewise run {recipe.name} --help    # all options",
    ]
    body = [
        html.text(f"{describe(recipe)}, in {run}", "soft"),
        *_figures(results, headline, float(final), lower),
        html.heading("Curve"),
        html.picture(run.curve, "Training and validation over steps"),
        "<div>" + "".join(_small_curve(rows, name) for name in ("loss", "gradient_norm", "lr")) + "</div>",
        *_samples(results),
        html.heading("Results"),
        html.facts(more),
        html.heading("Options"),
        html.facts({"recipe": recipe.name, **recipe.config()}),
        html.heading("Machine"),
        html.facts({"peak memory": memory, **machine}),
        html.heading("How to go on"),
        *([] if phase else [html.code("\n".join(commands))]),
        html.code(f'import statewise\n\nmodel = statewise.load("{run}")'),
    ]
    run.page.write_text(html.page(recipe.name, body), encoding="utf-8")
