"""`statewise run [RECIPE] [options]` and `statewise run --resume RUN_DIR`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import recipes
from .errors import Interrupted, UserError, user_errors
from .options import Options

if TYPE_CHECKING:
    from ..training.directory import RunDirectory

# How the copies of this program that Lightning starts for further devices learn where the first one writes.
_SHARED = "STATEWISE_RUN_DIRECTORY"


def _options(recipe: str) -> Options:
    with user_errors():
        function = recipes.get(recipe)
    options = Options(f"run {recipe}", function, flat=["training"])
    options.add("out", str, f"directory of the run, must be new; runs/{recipe}-1, -2, ... if not given")
    return options


def _help(recipe: str) -> str:
    options = _options(recipe)
    others = [f"  {name:<26}{_about(name)}" for name in recipes.names()]
    extra = [
        "",
        "also:",
        "  --config FILE             options from a YAML file, such as the config.yaml of a run",
        "  --resume RUN_DIR          go on with a run that was stopped or killed (takes no other option)",
        "",
        "recipes (statewise run RECIPE --help):",
        *others,
    ]
    text = options.help().replace(f"statewise run {recipe} [options]", "statewise run [RECIPE] [options]", 1)
    return "\n".join([text, *extra])


def _about(recipe: str) -> str:
    return (recipes.get(recipe).__doc__ or "").split("\n")[0].rstrip(".")


def take(argv: list[str], flag: str) -> str | None:
    """Remove `--flag VALUE` or `--flag=VALUE` from argv and return the value."""
    for i, word in enumerate(argv):
        if word == flag:
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise UserError(f"{flag}: want a value")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if word.startswith(f"{flag}="):
            del argv[i]
            return word.partition("=")[2]
    return None


def _number(minutes: str) -> float:
    try:
        return float(minutes)
    except ValueError:
        raise ValueError(f"--max-minutes: want a number, got {minutes!r}") from None


def main(argv: list[str]) -> int:
    argv = list(argv)
    named = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if "--help" in argv or "-h" in argv:
        print(_help(named or recipes.DEFAULT))
        return 0
    resume = take(argv, "--resume")
    if resume is not None:
        minutes = take(argv, "--max-minutes")
        if argv or named:
            left = " ".join([*([named] if named else []), *argv])
            hint = "the run goes on with the options it has"
            raise UserError(f"--resume: takes no other option than --max-minutes, got {left}; {hint}")
        return _resume(resume, minutes)
    return _start(named, argv)


def parsed(recipe: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a recipe from the content of a config.yaml without its `recipe`."""
    values = _options(recipe).parse([], config)
    values.pop("out")
    return values


def _build(recipe: str, values: Mapping[str, Any]) -> Any:
    from ..training.fit import check
    from ..training.groups import parameter_groups

    with user_errors():
        check(values["training"])
        built = recipes.get(recipe)(**values)
        # Names in `groups` can only be checked against a model; better now than after a directory is made.
        parameter_groups(built.model, lr=built.training.lr, groups=built.training.groups)
        return built


def _start(named: str | None, argv: list[str]) -> int:
    from ..training.directory import RunDirectory, read_config
    from ..training.fit import is_first_process

    file = take(argv, "--config")
    config: dict[str, Any] = {}
    if file is not None:
        with user_errors():
            config = read_config(file)
    in_file = config.pop("recipe", None)
    if named and in_file and named != in_file:
        raise UserError(f"--config: {file} is for the recipe {in_file}, but {named} was asked for")
    recipe = named or in_file or recipes.DEFAULT
    values = _options(recipe).parse(argv, config)
    out = values.pop("out")
    if out is not None and os.path.exists(out) and is_first_process():
        # Before anything slow, and before anything is made.
        with user_errors():
            RunDirectory.new(recipe, out)
    built = _build(recipe, values)
    if is_first_process():
        with user_errors():
            run = RunDirectory.new(recipe, out)
        os.environ[_SHARED] = str(run)
    else:
        # Only the first process writes; under torchrun on several machines the others need not see its disk.
        run = RunDirectory(os.environ.get(_SHARED) or out or "runs")
    return _execute(built, run, resume=False)


def _resume(path: str, minutes: str | None) -> int:
    from ..training.directory import RunDirectory

    with user_errors():
        run = RunDirectory.open(path)
        if run.card.is_file():
            raise ValueError(f"--resume: {run} is finished; see {run.card}, or start a new run")
    return go_on(run, resume=True, minutes=minutes)


def go_on(run: RunDirectory, *, resume: bool, minutes: str | None = None) -> int:
    """Run what config.yaml of a run directory says, from its newest checkpoint or from the start.

    Args:
        minutes: --max-minutes of this call, if not that of config.yaml.
    """
    from ..training.fit import is_first_process

    with user_errors():
        config = run.read_config()
        recipe = config.pop("recipe", None)
        if not isinstance(recipe, str):
            raise ValueError(f"{run.config} names no recipe")
        if minutes is not None:
            config["max_minutes"] = _number(minutes)
    built = _build(recipe, parsed(recipe, config))
    if is_first_process():
        os.environ[_SHARED] = str(run)
    return _execute(built, run, resume=resume)


def _execute(built: Any, run: RunDirectory, *, resume: bool) -> int:
    import torch
    from rich.console import Console

    from ..benchmarks import machine
    from ..recipes.report import describe
    from ..training.fit import TrainingError, is_first_process

    first = is_first_process()
    console = Console(quiet=not first)
    how = f"statewise run --resume {shlex.quote(str(run))}"
    count = sum(p.numel() for p in built.model.parameters())
    size = f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"
    console.print(
        f"[bold]{built.name}[/]: {describe(built)}, {size} parameters, in [bold]{run}[/]",
        highlight=False,
        soft_wrap=True,
    )
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if built.training.accelerator == "cpu" or (built.training.accelerator == "auto" and not gpu):
        now = torch.get_num_threads()
        better = machine.better_threads(now)
        if better is not None:
            text = f"This machine is busy: OMP_NUM_THREADS={better} would be faster than {now} threads."
            console.print(text, style="yellow", highlight=False, soft_wrap=True)
    try:
        outcome = recipes.execute(built, run, resume=resume, console=console)
    except TrainingError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        hint = f"stopped at once, without saving; to go on from the last checkpoint: {how}"
        raise Interrupted(hint if run.saved_steps() else "stopped before the first checkpoint", 2) from None
    if outcome.finished:
        return 0
    if outcome.signal is None:
        console.print(f"\nTime is up at step {outcome.step}; saved. To go on: {how}", highlight=False, soft_wrap=True)
        return 0
    if not first:
        return 128 + outcome.signal
    raise Interrupted(f"stopped and saved at step {outcome.step}; to go on: {how}", outcome.signal)
