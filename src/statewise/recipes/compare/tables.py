"""The figures of a comparison as Markdown, CSV, JSON, and a table on the screen."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from .report import Report
from .results import Difference, Run, Summary


def amount(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 1.23 G."""
    if value is None:
        return ""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def _spread(report: Report, s: Summary) -> str:
    if s.mean is None:
        return "no finished run"
    if s.spread is None:
        return report.show(s.mean)
    return f"{report.show(s.mean)} ± {report.show(s.spread)}"


def _seeds(report: Report, s: Summary) -> str:
    told = [report.show(v) for v in s.values.values()]
    return ", ".join(told + ["diverged"] * s.diverged + ["missing"] * s.missing)


def model_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the main table, best model first, then the baselines."""
    facts, tuned = report.facts.models, bool(report.plan.lrs)
    columns: dict[str, Callable[[Summary], str]] = {
        "model": lambda s: s.model,
        f"{report.metric} (mean ± sd)": lambda s: _spread(report, s),
        "each seed": lambda s: _seeds(report, s),
        "parameters": lambda s: f"{facts[s.model].parameters:,}",
        "FLOPs a step": lambda s: amount(facts[s.model].flops),
        "time a step": lambda s: duration(s.step_seconds),
        "steps": lambda s: "" if s.steps is None else f"{s.steps:,}",
        "training": lambda s: duration(s.training_seconds),
        "memory": lambda s: amount(s.memory_bytes, "B"),
    }
    if tuned:
        columns["lr"] = lambda s: "" if s.lr is None else f"{s.lr:g}"
    rows = [[show(s) for show in columns.values()] for s in report.summaries]
    for name, value in report.baselines.items():
        rows.append([f"({name})", report.show(value), *[""] * (len(columns) - 2)])
    return list(columns), rows


def difference_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    head = ["model", f"minus {report.summaries[0].model}", "95 % interval", "better on", "told apart"]
    return head, [_difference(report, d) for d in report.differences]


def _difference(report: Report, d: Difference) -> list[str]:
    between = " to ".join(map(report.show_difference, d.interval)) if d.interval else "needs two seeds"
    told = ("yes" if d.told_apart else "no") if d.interval else ""
    return [d.model, report.show_difference(d.mean), between, f"{d.better} of {d.n} seeds", told]


def tuning_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """A row for each model: the validation that chose, for each learning rate; the chosen one is marked."""
    rows = []
    for tuning in report.tunings:
        cells = [
            ("failed" if value is None else report.show(value)) + (" *" if rate == tuning.chosen else "")
            for rate, value in tuning.tried
        ]
        rows.append([tuning.model, *cells, "at the edge" if tuning.at_edge else ""])
    return ["model", *(f"lr {rate:g}" for rate in report.plan.lrs), ""], rows


def _value(report: Report, value: float | None, step: int | None = None) -> str:
    return report.show(value) + (f" (step {step:,})" if value is not None and step is not None else "")


def run_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    head = ["model", "seed", "status", report.metric, "last validation", "best validation", "training"]
    rows = [
        [r.model, str(r.seed), r.status, report.show(r.final), report.show(r.last),
         _value(report, r.best, r.best_step), duration(r.training_seconds)]
        for r in report.runs
    ]  # fmt: skip
    return head, rows


# ---- formats -------------------------------------------------------------------------------------------------------


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    # A bar in a label or a description would begin a new cell.
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def markdown(report: Report, picture: str) -> str:
    better = "lower" if report.facts.lower_is_better else "higher"
    lines = [
        f"# {report.plan.recipe}: {', '.join(report.plan.models)}",
        "",
        f"{report.metric[0].upper()}{report.metric[1:]}; {better} is better.",
        "",
        *_markdown(*model_rows(report)),
        "",
        f"![Curves]({picture})",
        "",
        "## What was held equal, and what to keep in mind",
        "",
        *(f"- {note}" for note in report.notes),
    ]
    if report.differences:
        lines += ["", "## Differences, seed by seed", "", *_markdown(*difference_rows(report))]
    if report.tunings:
        lines += ["", "## Learning rates", "", *_markdown(*tuning_rows(report))]
    lines += ["", "## Runs", "", *_markdown(*run_rows(report))]
    lines += ["", "## Models", ""]
    lines += [f"- {label}: {report.facts.models[label].description}" for label in report.plan.models]
    return "\n".join(lines) + "\n"


_RUN_COLUMNS = (
    *("model", "seed", "lr", "status", "final", "best", "best_step", "last", "steps", "step_seconds"),
    *("training_seconds", "peak_memory_bytes", "memory_before_bytes", "threads", "device", "message"),
)


def to_csv(report: Report) -> str:
    """One line for each run, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_RUN_COLUMNS)
    for run in report.runs:
        writer.writerow(["" if (v := getattr(run, c)) is None else v for c in _RUN_COLUMNS])
    return text.getvalue()


def _plain(run: Run) -> dict[str, Any]:
    return {c: getattr(run, c) for c in ("kind", *_RUN_COLUMNS)}


def to_json(report: Report) -> str:
    """Everything, numbers in full."""
    content = {
        "recipe": report.plan.recipe,
        "metric": report.facts.headline,
        "lower_is_better": report.facts.lower_is_better,
        "models": [{**asdict(s), **asdict(report.facts.models[s.model])} for s in report.summaries],
        "baselines": report.baselines,
        "differences": [{**asdict(d), "told_apart": d.told_apart} for d in report.differences],
        "tuning": [{**asdict(t), "at_edge": t.at_edge} for t in report.tunings],
        "runs": [_plain(r) for r in report.runs],
        "notes": list(report.notes),
        "plan": {**asdict(report.plan)},
    }
    return json.dumps(content, indent=2) + "\n"


def screen(report: Report) -> Any:
    """A table for the terminal: the columns that fit beside each other."""
    from rich.markup import escape
    from rich.table import Table

    head, rows = model_rows(report)
    table = Table(title=report.plan.recipe, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(escape(name), justify="left" if i in (0, 2) else "right")
    for i, row in enumerate(rows):
        style = "bold green" if i == 0 and report.summaries[0].mean is not None else ""
        table.add_row(*map(escape, row), style=style if i < len(report.summaries) else "dim")
    return table
