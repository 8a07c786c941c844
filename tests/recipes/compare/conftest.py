"""Comparisons on the disk whose figures were typed, so that reports of them are known in advance."""

import json
from pathlib import Path

from statewise.recipes.compare.comparison import FACTS, PLAN, Comparison
from statewise.recipes.compare.plan import Job, Plan
from statewise.recipes.compare.results import Fact, Facts
from statewise.recipes.compare.state import write_failure

OPTIONS = {
    "steps": 40,
    "batch_size": 8,
    "lr": 1e-2,
    "warmup": 4,
    "eval_every": 20,
    "checkpoint_every": 20,
    "log_every": 1,
    "precision": "32",
}


def plan(seeds=(0, 1, 2), models=("a", "b"), **changes) -> Plan:
    specs = dict.fromkeys(models, "s4d")
    return Plan("probes.mqar", specs, tuple(seeds), (), {label: dict(OPTIONS) for label in models}, **changes)


def comparison(out: Path, made: Plan, parameters=(1000, 1010), lower=False) -> Comparison:
    headline = "loss" if lower else "accuracy"
    models = {m: Fact({}, n, 5_000_000, [], f"model {m}") for m, n in zip(made.models, parameters)}
    out.mkdir(parents=True, exist_ok=True)
    made.write(out / PLAN)
    Facts(headline, lower, models).write(out / FACTS)
    return Comparison.open(out)


def metrics(values, step_seconds=0.5, validation_seconds=3.0, every=20, name="accuracy") -> str:
    """metrics.csv of a run with a validation every `every` steps, whose values are given."""
    lines, clock = [f"step,seconds,loss,val_{name},lr"], 0.0
    for step in range(1, every * len(values) + 1):
        clock += step_seconds
        lines.append(f"{step},{clock},1.0,,0.01")
        if step % every == 0:
            clock += validation_seconds
            lines.append(f"{step},{clock},,{values[step // every - 1]},")
    return "\n".join(lines) + "\n"


def finish(job: Job, values, *, final=None, kept=None, memory=(100, 350), name="accuracy", **more) -> None:
    """What a finished run leaves that a comparison reads; `kept` is the validation of a step that the recipe chose."""
    job.path.mkdir(parents=True)
    (job.path / "metrics.csv").write_text(metrics(values, name=name, **more))
    results = {"baselines": {"majority": 0.25}, "chance": 0.1} | ({} if final is None else {name: final})
    results |= {} if kept is None else {f"val_{name}": kept}
    (job.path / "results.json").write_text(json.dumps(results))
    machine = {"device": "a machine", "threads": 1, "memory_before_bytes": memory[0], "peak_memory_bytes": memory[1]}
    (job.path / "machine.json").write_text(json.dumps(machine))
    (job.path / "README.md").write_text("done")


def diverge(job: Job, values=(0.3,)) -> None:
    job.path.mkdir(parents=True)
    (job.path / "metrics.csv").write_text(metrics(values))
    write_failure(job.path, "step 21: the loss is nan")
