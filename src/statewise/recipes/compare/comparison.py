"""A comparison on the disk: its plan, what is known of its models, its runs, and what is left to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...training.directory import RunDirectory, read_metrics
from ...training.options import shares
from .plan import SPEED_MINUTES, Job, Plan
from .pool import Pool
from .results import Fact, Facts, Run, Tuning, read_run, step_time, times, tune
from .state import DIVERGED, FINISHED, state_of

PLAN, FACTS = "compare.yaml", "models.json"


class Comparison:
    """Opened from a directory; nothing is kept in memory that the directory does not tell.

    Args:
        out: the directory.
    """

    def __init__(self, out: Path, plan: Plan, facts: Facts) -> None:
        self.out, self.plan, self.facts = out, plan, facts

    @classmethod
    def open(cls, out: Path) -> Comparison:
        """
        Raises:
            ValueError: it is not a comparison, or a file in it is damaged.
        """
        plan, facts = Plan.read(out / PLAN), Facts.read(out / FACTS)
        missing = [label for label in plan.models if label not in facts.models]
        if missing:
            raise ValueError(f"{out}: no run of {missing[0]} was begun; go on with: statewise compare --out {out}")
        return cls(out, plan, facts)

    def read(self, job: Job) -> Run:
        return read_run(job, self.facts.headline, self.facts.lower_is_better)

    # ---- what depends on earlier runs ------------------------------------------------------------------------------

    def budget(self, label: str) -> dict[str, Any] | None:
        """Options that give a model its steps; None while its speed is not known.

        Under a time limit, warm-up and the distance of validations keep their share of the steps.
        """
        own = dict(self.facts.models[label].options)
        if self.plan.minutes is None:
            return own
        options, speed = self.plan.options[label], self.plan.speed(self.out, label).path
        if state_of(speed)[0] == DIVERGED:  # before any learning: its runs will too, and be counted
            return own
        took = self._step_seconds(speed)
        return None if took is None else own | shares(options, max(round(60 * self.plan.minutes / took), 1))

    def _step_seconds(self, speed: Path) -> float | None:
        """The time of a step in a short run; None if it is not done, or was stopped before its time."""
        rows = read_metrics(RunDirectory(speed).metrics)
        done = rows and rows[-1]["seconds"] >= 0.9 * 60 * SPEED_MINUTES
        return step_time(times(rows)[1]) if done else None

    def speed_jobs(self) -> list[Job]:
        """Short runs that tell how long a step takes; none where the budget is a number of steps."""
        if self.plan.minutes is None:
            return []
        left = [label for label in self.plan.models if self.budget(label) is None]
        return [self.plan.speed(self.out, label, **self.facts.models[label].options) for label in left]

    def tuning_jobs(self, label: str) -> list[Job]:
        budget = self.budget(label)
        return [] if budget is None else self.plan.tuning(self.out, label, **budget)

    def tuning(self, label: str) -> Tuning | None:
        """None where there is no grid."""
        if not self.plan.lrs:
            return None
        return tune(label, [self.read(job) for job in self.tuning_jobs(label)], self.facts.lower_is_better)

    def final_jobs(self, label: str) -> list[Job]:
        """One for each seed; none while the learning rate or the number of steps is not known."""
        tuning, budget = self.tuning(label), self.budget(label)
        lr = self.plan.options[label]["lr"] if tuning is None else tuning.chosen
        if lr is None or budget is None:
            return []
        return [self.plan.final(self.out, label, seed, lr, **budget) for seed in self.plan.seeds]

    def _measured(self, job: Job) -> bool:
        return self.budget(job.model) is not None

    def _begun(self, job: Job) -> bool:
        """A short run has made a step, which its next visit goes on from."""
        return self._measured(job) or bool(read_metrics(RunDirectory(job.path).metrics))

    def _told(self, job: Job) -> str:
        return "measured" if self._measured(job) else "begun, to be measured in a second visit"

    # ---- the work --------------------------------------------------------------------------------------------------

    def carry_out(self, pool: Pool) -> dict[str, str]:
        """All runs that are not done yet; returns {name: why} of those that failed otherwise than by diverging.

        Raises:
            Stopped: by a signal.
        """
        labels = list(self.plan.models)
        failed = pool.run("speed", self.speed_jobs(), self._begun, alone=True, told=self._told)
        # Where the first step took all the time, or the run was stopped before, there is no second step to measure yet.
        begun = [job for job in self.speed_jobs() if self._begun(job)]
        failed |= pool.run("speed", begun, self._measured, alone=True)
        for job in begun:
            if self._measured(job):
                failed.pop(job.name, None)  # of its first visit
        failed |= pool.run("learning rates", [j for label in labels for j in self.tuning_jobs(label)], _ended)
        return failed | pool.run("runs", [j for label in labels for j in self.final_jobs(label)], _ended)


def _ended(job: Job) -> bool:
    return state_of(job.path)[0] in (FINISHED, DIVERGED)


# ---- facts ---------------------------------------------------------------------------------------------------------


def learn_facts(
    plan: Plan,
    build: Callable[[Mapping[str, Any]], Any],
    known: Facts | None = None,
    told: Callable[[str, Fact], None] = lambda label, fact: None,
) -> Facts:
    """Build every model once, count, and choose widths; so what cannot be built is known before anything is trained.

    Args:
        build: a `Recipe` from the content of a config.yaml.
        known: facts of an earlier call; models that it has are not built again.
        told: called for each model as soon as it is known.

    Raises:
        ValueError, TypeError: what a model does not take, with its label.
    """
    from ..report import describe
    from .cost import match_width, parameters, step_flops

    models = dict(known.models) if known else {}
    recipe: Any = None
    for label in plan.models:
        if label in models:
            continue

        def made(label: str = label, **own: Any) -> Any:
            try:
                return build(plan.config(label, plan.seeds[0], **own))
            except (ValueError, TypeError) as error:
                raise type(error)(f"model {label}: {error}") from error

        own: dict[str, Any] = {}
        recipe = made()
        if plan.match and models:
            target = next(iter(models.values())).parameters
            width, _ = match_width(lambda w: parameters(made(d_model=w).model), recipe.model.config["d_model"], target)
            if width != recipe.model.config["d_model"]:
                own["d_model"] = width
                recipe = made(**own)
        flops, uncounted = step_flops(recipe)
        before = recipe.before.recipe.name if recipe.before else None
        models[label] = Fact(own, parameters(recipe.model), flops, uncounted, describe(recipe), before)
        told(label, models[label])
    if recipe is None:
        if known is None:
            raise ValueError("a comparison needs at least one model")
        return known
    return Facts(recipe.task.headline, recipe.task.lower_is_better, models)


def check_recipe(name: str, parameters: Mapping[str, Any], match: str | None) -> None:
    """Raise ValueError unless models of the recipe can be chosen, and their width if that is to be matched."""
    for needed in ("model", *(("d_model",) if match else ())):
        if needed not in parameters:
            raise ValueError(f"{name} has no option {needed!r}, so its models cannot be compared this way")
