"""A comparison as people read it: rows in order, differences, and what must be said beside them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..._words import counted
from .comparison import Comparison
from .plan import CLOSE, Plan
from .results import Difference, Facts, Run, Summary, Tuning, difference, summarise

LABELS = {"bits_per_byte": "bits per byte", "accuracy": "accuracy", "loss": "loss"}


@dataclass(frozen=True)
class Report:
    """
    Args:
        summaries: best mean first; models without a finished run last.
        differences: of every other model to the first.
        runs: final runs in the order of the plan.
        baselines: name -> mean over runs of what the recipe compares with.
        notes: what a reader must know to judge the figures, one sentence or two each.
    """

    plan: Plan
    facts: Facts
    summaries: Sequence[Summary]
    differences: Sequence[Difference]
    runs: Sequence[Run]
    tunings: Sequence[Tuning]
    baselines: dict[str, float]
    notes: Sequence[str]

    @property
    def metric(self) -> str:
        return LABELS.get(self.facts.headline, self.facts.headline.replace("_", " "))

    def show(self, value: float | None) -> str:
        """A value of the metric."""
        return show(self.facts.headline, value)

    def show_difference(self, value: float) -> str:
        return f"{100 * value:+.1f} points" if _is_share(self.facts.headline) else f"{value:+.3f}"


def _is_share(headline: str) -> bool:
    return headline.endswith("accuracy")


def show(headline: str, value: float | None) -> str:
    """A share as a percentage, anything else with three decimals."""
    if value is None:
        return ""
    return f"{value:.1%}" if _is_share(headline) else f"{value:.3f}"


def what_chose(tunings: Sequence[Tuning]) -> str:
    """Which validation of a run the learning rates were chosen by."""
    return "best validation of each run" if any(t.by_best for t in tunings) else "last validation of each run"


def collect(comparison: Comparison) -> Report:
    """Everything again from the run directories."""
    plan, facts = comparison.plan, comparison.facts
    lower = facts.lower_is_better
    runs: list[Run] = []
    summaries = []
    for label in plan.models:
        own = [comparison.read(job) for job in comparison.final_jobs(label)]
        runs += own
        summaries.append(summarise(label, own))
    summaries.sort(key=lambda s: (s.mean is None, 0.0 if s.mean is None else s.mean if lower else -s.mean))
    found = (difference(s, summaries[0], lower) for s in summaries[1:])
    tunings = [t for t in map(comparison.tuning, plan.models) if t is not None]
    baselines: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.baselines.items():
            baselines.setdefault(name, []).append(value)
    return Report(
        plan, facts, summaries, [d for d in found if d is not None], runs, tunings,
        {name: statistics.fmean(values) for name, values in baselines.items()},
        [*_budget_notes(plan, facts), *_tuning_notes(plan, tunings), *_run_notes(plan, summaries, runs)],
    )  # fmt: skip


def _budget_notes(plan: Plan, facts: Facts) -> list[str]:
    notes = []
    if plan.minutes is None:
        steps, rows = plan.shared("steps"), plan.shared("batch_size")
        notes.append(f"Same budget: {steps:,} steps of {rows} rows for every model.")
    else:
        notes.append(
            f"Same budget: {plan.minutes:g} minutes of training for every model. The number of steps follows from the "
            f"time of a step, measured before on an idle machine; with other work beside it a run takes longer."
        )
    notes.append("Same data: a seed means the same batches in the same order for every model.")
    differing = [name for name in plan.differing() if name not in ("lr", "warmup")]
    if differing:
        notes.append(f"Other options that the recipe takes for each model by itself: {', '.join(differing)}.")
    first = {label: fact.before for label, fact in facts.models.items() if fact.before and label in plan.models}
    if first:
        notes.append(
            f"**Before this training came another ({', '.join(sorted(set(filter(None, first.values()))))}); its steps "
            f"are not in the times and FLOPs here, and the memory is that of both.**"
        )
    counts = {label: facts.models[label].parameters for label in plan.models}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[most] > (1 + CLOSE) * counts[least]:
        why = "The widths at hand do not come closer" if plan.match else "Sizes were not matched"
        notes.append(
            f"{why}: {most} has {counts[most] / counts[least]:.2f} times the parameters of {least}."
            + ("" if plan.match else " `--match parameters` chooses widths.")
        )
    elif plan.match:
        notes.append(f"Same size: widths were chosen so that parameters agree within {CLOSE:.0%}.")
    uncounted = sorted({op for label in plan.models for op in facts.models[label].uncounted})
    notes.append(
        "FLOPs are of one training step: matrix products, convolutions, attention, Fourier transforms and the "
        "recurrences of this library by formula (backward as twice forward); elementwise work is left out."
        + (f" No formula, not counted: {', '.join(uncounted)}." if uncounted else "")
    )
    notes.append(
        "Time of a step is the median; memory is the most that training took beyond what the process held before the "
        "first step (libraries, data, weights)."
    )
    return notes


def _tuning_notes(plan: Plan, tunings: Sequence[Tuning]) -> list[str]:
    rates = {label: options["lr"] for label, options in plan.options.items()}
    if not plan.lrs and len(set(rates.values())) > 1:
        told = ", ".join(f"{label} {rate:g}" for label, rate in rates.items())
        return [f"No tuning here: every model has the learning rate that the recipe takes for it ({told})."]
    if not plan.lrs:
        return [
            f"No tuning: every model was trained with the learning rate {plan.shared('lr'):g}, which may suit one "
            f"better than another. `--lrs` tries a grid for each."
        ]
    grid = ", ".join(f"{rate:g}" for rate in plan.lrs)
    notes = [
        f"Same tuning: the learning rates {grid}, each tried once for each model on seed {plan.tuning_seed}, which is "
        f"none of the seeds reported; the {what_chose(tunings)} chose."
    ]
    for tuning in tunings:
        if tuning.at_edge:
            notes.append(
                f"**{tuning.model}: the best learning rate, {tuning.chosen:g}, is at the edge of the grid; a better "
                f"one may lie outside, so the model may do better than shown.**"
            )
        elif tuning.chosen is None and all(value is None for _, value in tuning.tried):
            notes.append(f"**{tuning.model}: no learning rate of the grid gave a finished run.**")
    return notes


def _run_notes(plan: Plan, summaries: Sequence[Summary], runs: Sequence[Run]) -> list[str]:
    notes = []
    for summary in summaries:
        if summary.diverged:
            told = "its mean is over the others, which flatters it" if summary.values else "it has no figure"
            notes.append(f"**{summary.model}: {summary.diverged} of {len(plan.seeds)} runs diverged; {told}.**")
        if summary.missing or not (summary.values or summary.diverged):
            left = summary.missing or len(plan.seeds)
            notes.append(f"**{summary.model}: {left} of {len(plan.seeds)} runs are not finished.**")
    n = len(plan.seeds)
    if n == 1:
        notes.append("One seed: nothing here says how much another seed would change.")
    else:
        notes.append(
            f"{n} seeds: intervals are Student's t at 95 %, wide because the seeds are few, and not corrected for the "
            f"number of models. If all {n} seeds agree about two equal models, that is chance in one of {2 ** (n - 1)} "
            f"cases."
        )
    places = {(run.device, run.threads) for run in runs if run.device}
    if len(places) > 1:
        told = "; ".join(
            f"{device}, {counted(threads, 'thread') if threads else 'threads not known'}"
            for device, threads in sorted(places, key=str)
        )
        notes.append(f"**Times are not comparable: runs were made on different machines or threads ({told}).**")
    return notes
