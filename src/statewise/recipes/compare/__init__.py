"""Fair comparisons: several models under one recipe, on the same data, seeds, budget and tuning.

A comparison is a directory. `compare.yaml` is its plan, `models.json` what was counted of its models, and below
`speed/`, `tuning/` and `runs/` is an ordinary run directory for each run. Everything else is derived from these.
"""

from __future__ import annotations

from pathlib import Path

from .comparison import Comparison
from .report import Report, collect

FILES = ("compare.md", "compare.csv", "compare.json", "compare.png", "compare.html")


def write_report(comparison: Comparison) -> tuple[Report, list[Path]]:
    """Table, figures, picture and page into the directory; returns the report and what was written."""
    from . import page, plot, tables

    report, out = collect(comparison), comparison.out
    text, numbers, everything, picture, whole = (out / name for name in FILES)
    plot.plot(report, picture)
    text.write_text(tables.markdown(report, picture.name), encoding="utf-8")
    numbers.write_text(tables.to_csv(report), encoding="utf-8")
    everything.write_text(tables.to_json(report), encoding="utf-8")
    whole.write_text(page.page(report, out, picture.name), encoding="utf-8")
    return report, [text, numbers, everything, picture, whole]


__all__ = ["Comparison", "Report", "collect", "write_report"]
