"""compare.html: the report of a comparison on one page."""

from __future__ import annotations

from pathlib import Path

import yaml

from .. import html
from .plan import Plan
from .report import Report, what_chose
from .tables import difference_rows, model_rows, run_rows, tuning_rows


def option_rows(plan: Plan) -> list[list[str]]:
    """Every option, with a value for each model."""
    names = dict.fromkeys(name for options in plan.options.values() for name in options)
    chosen = {
        *(["lr"] if plan.lrs else []),
        *(["d_model"] if plan.match else []),
        *(["steps", "warmup", "eval_every", "checkpoint_every"] if plan.minutes else []),
    }
    return [
        [name, *("see above" if name in chosen else str(options.get(name)) for options in plan.options.values())]
        for name in names
    ]


def page(report: Report, out: Path, picture: str) -> str:
    better = "lower" if report.facts.lower_is_better else "higher"
    head, rows = model_rows(report)
    styles = dict.fromkeys(range(len(report.summaries), len(rows)), "faint")
    if report.summaries[0].mean is not None:
        styles[0] = "best"
    body = [
        html.text(f"{report.metric}; {better} is better", "soft"),
        html.table(head, rows, styles),
        html.heading("Curves"),
        html.picture(out / picture, "The metric over steps and over time, and the final figures"),
        html.text("Thin lines are seeds, thick ones their mean; a cross is where a run diverged.", "soft"),
        html.heading("What was held equal, and what to keep in mind"),
        html.items(report.notes),
    ]
    if report.differences:
        body += [html.heading("Differences, seed by seed"), html.table(*difference_rows(report))]
    if report.tunings:
        body += [html.heading("Learning rates"), html.table(*tuning_rows(report))]
        body.append(html.text(f"The {what_chose(report.tunings)}; the chosen rate is marked with *.", "soft"))
    body += [html.heading("Runs"), html.table(*run_rows(report))]
    pages = [run.path / "report.html" for run in report.runs]
    links = [html.link(p.relative_to(out).as_posix(), p.parent.name) for p in pages if p.is_file()]
    if links:
        body.append("<p>Reports of single runs: " + ", ".join(links) + "</p>")
    body += [
        html.heading("Models"),
        html.facts({label: report.facts.models[label].description for label in report.plan.models}),
        html.heading("Options"),
        html.table(["option", *report.plan.models], option_rows(report.plan)),
        html.heading("Models as they were given"),
        html.code(yaml.safe_dump(dict(report.plan.models), sort_keys=False).strip()),
        html.heading("How to go on"),
        html.code(
            f"statewise compare --out {out}              # unfinished runs\n"
            f"statewise compare --out {out} --seeds 5    # more seeds\n"
            f"statewise compare --report {out}           # this page again"
        ),
    ]
    title = f"{report.plan.recipe}: {', '.join(report.plan.models)}"
    return html.page(title, body)
