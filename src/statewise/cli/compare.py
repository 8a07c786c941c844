"""`statewise compare RECIPE --models a,b,c [options]`, `... --out DIR` to go on, `... --report DIR` to report."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import recipes
from .console import terminal
from .errors import Interrupted, UserError, user_errors
from .options import Options
from .run import parsed, take

if TYPE_CHECKING:
    from ..recipes.compare import Comparison
    from ..recipes.compare.plan import Plan

_OWN = {
    "models": (str, "models with commas between; a hybrid in brackets, options of a mixer in braces, and a label in "
                    "front if wanted: s4d,[mamba2,attention],wide={name: mamba2, d_state: 128}"),
    "seeds": (str, "a number of seeds, 0, 1, 2, ..., or seeds with commas between; 3 if not given"),
    "lrs": (str, "learning rates with commas between, tried for each model on one more seed; validation chooses"),
    "tuning_seed": (int, "the seed on which learning rates are tried; 1000 if not given"),
    "minutes": (float, "give every model this much training time, instead of the same steps"),
    "match": (str, "parameters: choose widths so that all models have as many parameters as the first"),
    "jobs": (int, "runs at a time, which share the threads; 1 if not given"),
    "out": (str, "directory of the comparison; runs/compare-RECIPE-1, -2, ... if not given"),
}  # fmt: skip


def _options(recipe: str) -> Options:
    with user_errors():
        function = recipes.get(recipe)
    about = f"Compare models under the recipe {recipe}: same data, seeds, budget and tuning for all."
    options = Options(f"compare {recipe}", function, flat=["training"], about=about)
    for name, (kind, text) in _OWN.items():
        options.add(name, kind, text)
    return options


def _help(recipe: str) -> str:
    own = {f"--{name.replace('_', '-')}" for name in _OWN}
    lines = _options(recipe).help().replace(f"statewise compare {recipe} [options]", "", 1).split("\n")
    return "\n".join(
        [
            "usage: statewise compare RECIPE --models A,B,... [--seeds 3] [options]",
            "       statewise compare --out DIR [--jobs N]     go on with a comparison",
            "       statewise compare --report DIR             make its report again, without training",
            *lines[1:],
            "",
            f"{', '.join(sorted(own))} belong to the comparison, all others to the recipe {recipe}.",
        ]
    )


def main(argv: list[str]) -> int:
    argv = list(argv)
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if "--help" in argv or "-h" in argv:
        print(_help(recipe or recipes.DEFAULT))
        return 0
    report = take(argv, "--report")
    if report is not None:
        if argv or recipe:
            raise UserError(f"--report: takes no other option, got {' '.join([*([recipe] if recipe else []), *argv])}")
        return _report_only(Path(report))
    return _compare(recipe, argv)


def _report_only(out: Path) -> int:
    from ..recipes.compare import Comparison

    with user_errors():
        comparison = Comparison.open(out)
        _report(comparison)
    return 0


def _report(comparison: Comparison) -> None:
    from ..recipes.compare import tables, write_report

    console = terminal()
    report, written = write_report(comparison)
    console.print()
    console.print(tables.screen(report))
    for note in report.notes:
        console.print(f"- {note.replace('**', '')}", highlight=False, markup=False)
    console.print(f"\nwritten: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


# ---- the plan ------------------------------------------------------------------------------------------------------


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options as config.yaml has them: those of `training` at the top, other groups as mappings."""
    training = asdict(values["training"])
    rest = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in values.items()}
    flat = {**{k: v for k, v in rest.items() if k != "training"}, **training}
    return {k: v for k, v in flat.items() if k not in ("model", "seed", "max_minutes")}


def _planned(recipe: str, argv: list[str]) -> tuple[Plan, dict[str, Any]]:
    """(plan, options of how it is carried out)."""
    from ..recipes.compare.comparison import check_recipe
    from ..recipes.compare.plan import TUNING_SEED, Plan, equal_budget, parse_models, parse_rates, parse_seeds

    for flag, instead in (("--model", "--models"), ("--seed", "--seeds"), ("--max-minutes", "--minutes")):
        if any(word.partition("=")[0].replace("_", "-") == flag for word in argv):
            raise UserError(f"{flag}: a comparison has {instead}")
    values = _options(recipe).parse(argv)
    own = {name: values[name] for name in _OWN}
    if own["models"] is None:
        raise UserError("--models: want models with commas between, e.g. --models s4d,mamba2,attention")
    if own["match"] not in (None, "parameters"):
        raise UserError(f"--match: want parameters, got {own['match']!r}")
    given = list(argv)
    for name in _OWN:
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            while take(given, flag) is not None:
                pass
    with user_errors():
        check_recipe(recipe, inspect.signature(recipes.get(recipe)).parameters, own["match"])
        models = parse_models(own["models"])
        plan = Plan(
            recipe,
            models,
            parse_seeds("3" if own["seeds"] is None else own["seeds"]),
            tuple(given),
            equal_budget(_all_options(recipe, given, models), next(iter(models)), given),
            lrs=() if own["lrs"] is None else parse_rates(own["lrs"]),
            tuning_seed=TUNING_SEED if own["tuning_seed"] is None else own["tuning_seed"],
            minutes=own["minutes"],
            match=own["match"],
        )
    return plan, own


def _all_options(recipe: str, given: Sequence[str], models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """label -> options, as the recipe has them for that model."""
    found = {}
    for label, spec in models.items():
        word = spec if isinstance(spec, str) else json.dumps(spec)
        values = _options(recipe).parse([*given, f"--model={word}"])
        found[label] = _flat({k: v for k, v in values.items() if k not in _OWN})
    return found


def _new_directory(recipe: str) -> Path:
    return next(p for n in count(1) if not (p := Path("runs") / f"compare-{recipe}-{n}").exists())


def _continued(argv: list[str]) -> tuple[Path, Plan, dict[str, Any]]:
    """`--out DIR` without a recipe: the plan that is there, with more seeds or models if they are given."""
    from dataclasses import replace

    from ..recipes.compare.comparison import PLAN
    from ..recipes.compare.plan import Plan, equal_budget, parse_models, parse_seeds

    rest = list(argv)
    out, jobs, seeds, models = (take(rest, f"--{name}") for name in ("out", "jobs", "seeds", "models"))
    if out is None:
        raise UserError("RECIPE is missing: statewise compare RECIPE --models A,B,... or statewise compare --out DIR")
    if rest:
        raise UserError(f"{rest[0]}: want a recipe too, or with --out alone only --jobs, --seeds and --models")
    with user_errors():
        plan = Plan.read(Path(out) / PLAN)
        more = replace(plan, seeds=plan.seeds if seeds is None else parse_seeds(seeds))
        if models is not None:
            added = {label: spec for label, spec in parse_models(models).items() if plan.models.get(label) != spec}
            every = {**plan.options, **_all_options(plan.recipe, plan.given, added)}
            options = equal_budget(every, next(iter(plan.models)), plan.given)
            more = replace(more, models={**plan.models, **added}, options=options)
    if jobs is not None and not jobs.isdigit():
        raise UserError(f"--jobs: want INT, got {jobs!r}")
    return Path(out), more, {"jobs": None if jobs is None else int(jobs)}


# ---- the work ------------------------------------------------------------------------------------------------------


def _compare(recipe: str | None, argv: list[str]) -> int:
    from ..recipes.compare.comparison import FACTS, PLAN
    from ..recipes.compare.plan import Plan
    from ..recipes.compare.pool import LOCK, Lock

    if recipe is None:
        out, plan, own = _continued(argv)
    else:
        plan, own = _planned(recipe, argv)
        out = Path(own["out"]) if own["out"] is not None else _new_directory(recipe)
    jobs = 1 if own["jobs"] is None else own["jobs"]
    if jobs < 1:
        raise UserError(f"--jobs: want at least 1, got {jobs}")
    with user_errors():
        # One that was killed before its plan was written leaves these.
        ours = {LOCK, FACTS, *(p.name for name in (FACTS, PLAN) for p in out.glob(f".{name}.*.tmp"))}
        if out.exists() and not (out / PLAN).is_file() and any(p.name not in ours for p in out.iterdir()):
            raise UserError(f"--out: {out} exists and is not a comparison; want a new name")
        if (out / PLAN).is_file():
            plan = Plan.read(out / PLAN).extended(plan, out)
        out.mkdir(parents=True, exist_ok=True)
        lock = Lock(out)
    try:
        return _carry_out(out, plan, jobs, lock)
    finally:
        lock.close()
        if not (out / PLAN).is_file():  # nothing was begun, so nothing is left
            lock.remove()


def _build(config: Mapping[str, Any]) -> Any:
    """A recipe from the content of a config.yaml."""
    from ..training.fit import check
    from ..training.groups import parameter_groups

    options = dict(config)
    recipe = options.pop("recipe")
    values = parsed(recipe, options)
    made = recipes.get(recipe)(**values)
    check(made.training)
    parameter_groups(made.model, lr=made.training.lr, groups=made.training.groups)
    return made


def _carry_out(out: Path, plan: Plan, jobs: int, lock: Any) -> int:
    import torch

    from ..recipes.compare import Comparison
    from ..recipes.compare.comparison import FACTS, PLAN, learn_facts
    from ..recipes.compare.pool import Pool, Stopped
    from ..recipes.compare.report import show
    from ..recipes.compare.results import Facts
    from ..recipes.compare.tables import amount

    console = terminal()
    console.print(f"[bold]{plan.recipe}[/]: {', '.join(plan.models)}, in [bold]{out}[/]", highlight=False)
    with user_errors(), console.status("Building every model once"):
        facts = learn_facts(
            plan,
            _build,
            # Without a plan nothing says which models they are of.
            Facts.read(out / FACTS) if (out / FACTS).is_file() and (out / PLAN).is_file() else None,
            lambda label, fact: console.print(
                f"{label}: {fact.description}, {fact.parameters:,} parameters, {amount(fact.flops)} FLOPs a step",
                highlight=False,
            ),
        )
        # Only now: a comparison that cannot be carried out leaves no plan behind.
        facts.write(out / FACTS)
        plan.write(out / PLAN)
    comparison = Comparison(out, plan, facts)
    pool = Pool(
        [sys.executable, "-m", "statewise.cli.compare_worker"],
        jobs=jobs,
        threads=max(torch.get_num_threads() // jobs, 1),
        console=console,
        headline=facts.headline,
        show=lambda value: show(facts.headline, value),
        lock=lock,
    )
    try:
        with user_errors():
            failed = comparison.carry_out(pool)
    except Stopped as stopped:
        raise Interrupted(
            f"stopped; every run that had begun is saved; to go on: statewise compare --out {shlex.quote(str(out))}",
            stopped.signal,
        ) from None
    _report(comparison)
    if failed:
        console.print(
            f"\n[bold red]{len(failed)} failed[/]; to try again: statewise compare --out {shlex.quote(str(out))}"
        )
    return 1 if failed else 0
