"""The figures of a comparison, read again from its run directories."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..._files import write_atomically
from ...training.directory import RunDirectory, read_metrics, times
from .plan import Job
from .state import DIVERGED, FINISHED, read_json, state_of

TRIALS = 5  # steps at the start whose time says nothing: kernels are compiled, memory is taken

# 97.5 % points of Student's t distribution for 1, 2, ... 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Fact:
    """What is known of a model before it is trained.

    Args:
        options: options of the recipe that are this model's own, such as a matched width.
        flops: operations of one training step; `uncounted` names ops that are not among them.
        description: mixers, depth and width.
        before: a training that comes first, such as the one without labels; or None.
    """

    options: Mapping[str, Any]
    parameters: int
    flops: int
    uncounted: Sequence[str]
    description: str
    before: str | None = None


@dataclass(frozen=True)
class Facts:
    """The metric that the recipe is about, and a `Fact` for each model."""

    headline: str
    lower_is_better: bool
    models: Mapping[str, Fact]

    def write(self, path: Path) -> None:
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, path: Path) -> Facts:
        """
        Raises:
            ValueError: the file is missing or damaged.
        """
        content = read_json(path)
        try:
            models = {label: Fact(**fact) for label, fact in content["models"].items()}
            return cls(str(content["headline"]), bool(content["lower_is_better"]), models)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again") from error


@dataclass(frozen=True)
class Point:
    """A validation: the metric after `step` steps and `seconds` of training (validations not counted)."""

    step: int
    seconds: float
    value: float


@dataclass(frozen=True)
class Run:
    """One run. Figures that are not there yet are None.

    Args:
        final: the figure of the recipe's own report (of a test set, where there is one), or the last validation.
        best, last: validations; choosing the best step afterwards flatters, so tables are about `final`.
        chosen: the validation of the weights that `final` is about: that of the step that the recipe chose by it, such
            as the best one of a classifier, or the last.
        by_best: the recipe chose a step.
        step_seconds: median time of a training step.
        training_seconds: of all steps, validations not counted.
        peak_memory_bytes: of the process; `memory_before_bytes` of these it held before the first step.
    """

    kind: str
    model: str
    seed: int
    lr: float
    path: Path
    status: str
    message: str = ""
    final: float | None = None
    best: float | None = None
    best_step: int | None = None
    last: float | None = None
    chosen: float | None = None
    by_best: bool = False
    steps: int = 0
    step_seconds: float | None = None
    training_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    memory_before_bytes: int | None = None
    threads: int | None = None
    device: str | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[Point] = ()

    @property
    def memory_bytes(self) -> int | None:
        """What training took beyond libraries, data and weights."""
        if self.peak_memory_bytes is None or self.memory_before_bytes is None:
            return self.peak_memory_bytes
        return self.peak_memory_bytes - self.memory_before_bytes


def step_time(single: Sequence[float]) -> float | None:
    """The median, without the steps at the start."""
    return statistics.median(single[min(TRIALS, len(single) // 2) :]) if single else None


def read_run(job: Job, headline: str, lower_is_better: bool) -> Run:
    """What the directory of a run tells."""
    directory = RunDirectory(job.path)
    status, message = state_of(job.path)
    rows = read_metrics(directory.metrics)
    at, single = times(rows)
    name = f"val_{headline}"
    curve = [Point(int(r["step"]), s, r[name]) for r, s in zip(rows, at) if name in r]
    figures: dict[str, Any] = {}
    if status == FINISHED:
        results, machine = read_json(directory.results), read_json(directory.machine)
        figures = {
            "final": float(results[headline]) if headline in results else curve[-1].value,
            "chosen": float(results[name]) if name in results else curve[-1].value,
            "by_best": name in results,
            "peak_memory_bytes": machine.get("peak_memory_bytes"),
            "memory_before_bytes": machine.get("memory_before_bytes"),
            "threads": machine.get("threads"),
            "device": machine.get("device"),
            "baselines": baselines(results),
        }
    good = [p for p in curve if math.isfinite(p.value)]
    best = (min if lower_is_better else max)(good, key=lambda p: p.value, default=None)
    return Run(
        job.kind, job.model, job.seed, job.lr, job.path, status, message,
        best=best.value if best else None,
        best_step=best.step if best else None,
        last=curve[-1].value if curve else None,
        steps=int(rows[-1]["step"]) if rows else 0,
        step_seconds=step_time(single),
        training_seconds=at[-1] if at else 0.0,
        curve=curve,
        **figures,
    )  # fmt: skip


def baselines(results: Mapping[str, Any]) -> dict[str, float]:
    """What results.json holds to compare a model with."""
    found = {str(k): float(v) for k, v in results.get("baselines", {}).items()}
    return found | ({"chance": float(results["chance"])} if "chance" in results else {})


# ---- statistics ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The finished runs of a model.

    Args:
        values: seed -> final figure.
        spread: standard deviation over seeds (n - 1), None for one seed.
        interval: 95 % interval of the mean by Student's t, or None. Few seeds make it wide, as they should.
        diverged, missing: numbers of runs that are not among the values.
    """

    model: str
    values: Mapping[int, float]
    mean: float | None
    spread: float | None
    interval: tuple[float, float] | None
    diverged: int
    missing: int
    lr: float | None
    steps: int | None
    step_seconds: float | None
    training_seconds: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Difference:
    """Model minus reference, seed by seed, over the seeds that both finished.

    Args:
        better: on how many seeds the model was better than the reference.
    """

    model: str
    reference: str
    n: int
    mean: float
    interval: tuple[float, float] | None
    better: int

    @property
    def told_apart(self) -> bool:
        """The interval leaves out zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of a sample, by Student's t; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    half = (_T[n - 2] if n - 2 < len(_T) else 1.96) * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _middle(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return statistics.median(there) if there else None


def summarise(model: str, runs: Sequence[Run]) -> Summary:
    done = [r for r in runs if r.status == FINISHED and r.final is not None]
    values = {r.seed: r.final for r in done if r.final is not None}
    figures = list(values.values())
    memory = [r.memory_bytes for r in done if r.memory_bytes is not None]
    diverged = sum(r.status == DIVERGED for r in runs)
    return Summary(
        model,
        values,
        mean=statistics.fmean(figures) if figures else None,
        spread=statistics.stdev(figures) if len(figures) > 1 else None,
        interval=interval(figures),
        diverged=diverged,
        missing=len(runs) - len(done) - diverged,
        lr=runs[0].lr if runs else None,
        steps=max((r.steps for r in done), default=None),
        step_seconds=_middle([r.step_seconds for r in done]),
        training_seconds=_middle([r.training_seconds for r in done]),
        memory_bytes=max(memory, default=None),
    )


def difference(model: Summary, reference: Summary, lower_is_better: bool) -> Difference | None:
    """None where no seed was finished by both."""
    seeds = [s for s in model.values if s in reference.values]
    if not seeds:
        return None
    deltas = [model.values[s] - reference.values[s] for s in seeds]
    sign = -1 if lower_is_better else 1
    better = sum(sign * d > 0 for d in deltas)
    return Difference(model.model, reference.model, len(seeds), statistics.fmean(deltas), interval(deltas), better)


# ---- tuning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """The learning rates that were tried for a model.

    Args:
        tried: (rate, the validation of the weights that a run would report, or None if it did not finish).
        by_best: that is the best validation of a run; else the last.
    """

    model: str
    tried: Sequence[tuple[float, float | None]]
    chosen: float | None
    by_best: bool = False

    @property
    def at_edge(self) -> bool:
        """The best rate is the lowest or the highest of the grid, so a better one may lie outside."""
        rates = [rate for rate, _ in self.tried]
        return self.chosen is not None and self.chosen in (min(rates), max(rates))


def tune(model: str, runs: Sequence[Run], lower_is_better: bool) -> Tuning:
    """Validation chooses: that of the weights that are reported. No rate is chosen before all runs have ended."""
    tried = [(r.lr, r.chosen) for r in runs]
    by_best = any(r.by_best for r in runs)
    good = [(value, rate) for rate, value in tried if value is not None and math.isfinite(value)]
    if any(r.status not in (FINISHED, DIVERGED) for r in runs) or not good:
        return Tuning(model, tried, None, by_best)
    _, rate = min(good) if lower_is_better else max(good, key=lambda g: (g[0], -g[1]))
    return Tuning(model, tried, rate, by_best)
