"""Runs a recipe from the first step (or the last checkpoint) to the report."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from .._version import __version__
from ..benchmarks import machine
from ..inference import load_run
from ..training.checkpoint_io import is_no_space
from ..training.directory import RunDirectory
from ..training.fit import Outcome, TrainingError, fit, is_first_process
from . import names
from .recipe import Phase, Recipe
from .run_page import write_page


def write_model_config(model: Any, run: RunDirectory) -> None:
    """config.json before there are weights, so that checkpoints of an unfinished run can be loaded."""
    content = model.file_config()
    (run.path / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _on_gpu(recipe: Recipe) -> bool:
    return recipe.training.accelerator in ("auto", "gpu") and torch.cuda.is_available()


def _memory(recipe: Recipe) -> int | None:
    return torch.cuda.memory_allocated() if _on_gpu(recipe) else machine.memory()


def write_machine(recipe: Recipe, run: RunDirectory, before: int | None) -> None:
    """machine.json: where the run was trained, with what, and the memory that it took there.

    Args:
        before: bytes that were held before the first step.
    """
    on_gpu = _on_gpu(recipe)
    content = {
        "device": machine.device_name("cuda" if on_gpu else "cpu"),
        "threads": torch.get_num_threads(),
        "memory_before_bytes": before,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else machine.peak_memory(),
        "versions": dict(machine.versions()),
    }
    run.machine.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def execute(
    recipe: Recipe,
    run: RunDirectory,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Train, then write model, results, curve, card and page into `run`; each is written when training is finished.

    Raises:
        ValueError, TrainingError: see `statewise.training.fit.fit`.
    """
    console = console or Console(quiet=True)
    first = is_first_process()
    if first and not resume:
        header = f"Made by statewise {__version__}."
        if recipe.name in names():  # else it is a phase of another run
            header += f" To start such a run again: statewise run --config {run.config}"
        try:
            run.write_config(recipe.name, recipe.config(), header)
            write_model_config(recipe.model, run)
        except OSError as error:
            raise TrainingError(f"cannot write into {run}: {error.strerror or error}") from error
    training = recipe.training
    if recipe.before is not None:
        began = time.monotonic()
        outcome = _before(recipe.before, recipe.model, run, console)
        if not outcome.finished or outcome.signal is not None:
            return replace(outcome, finished=False)
        if training.max_minutes is not None:
            left = training.max_minutes - (time.monotonic() - began) / 60
            if left <= 0:
                return replace(outcome, finished=False)
            training = replace(training, max_minutes=left)
    before = _memory(recipe)
    outcome = fit(recipe.task, recipe.data, training, run, resume=resume, console=console)
    if outcome.finished and outcome.first_process:
        if recipe.training.strategy == "fsdp2":
            # The weights in memory are shards; the last checkpoint is whole.
            recipe = replace(recipe, model=load_run(run.checkpoint(outcome.step)))
        recipe.model.eval()
        try:
            write_machine(recipe, run, before)  # first: what the report needs is not memory that training took
            recipe.finish(recipe, run, console)
            write_page(recipe, run)
        except (OSError, SafetensorError) as error:
            if not is_no_space(error):
                raise
            raise TrainingError(
                f"cannot write the report into {run}: no space left; all steps are done and saved: "
                f"free some space, then statewise run --resume {run}"
            ) from error
    return outcome


def _copy(source: RunDirectory, target: RunDirectory) -> None:
    """All but checkpoints; the figures last, which say that the phase is done."""
    target.path.mkdir(exist_ok=True)
    for path in sorted(source.path.iterdir(), key=lambda path: path == source.results):
        if path.is_file():
            shutil.copyfile(path, target.path / path.name)


def _before(phase: Phase, model: Any, run: RunDirectory, console: Console) -> Outcome:
    """Run a phase, or go on with it, unless it has left its model already; then hand over."""
    inner = RunDirectory(run.path / phase.name)
    outcome = Outcome(phase.recipe.training.steps, True)
    if phase.source is not None and not inner.results.is_file():
        _copy(RunDirectory(phase.source), inner)
        console.print(f"{phase.recipe.name}: taken from {phase.source}", highlight=False, soft_wrap=True)
    if not inner.results.is_file():
        started = bool(inner.saved_steps())
        inner.path.mkdir(exist_ok=True)
        console.print(f"[bold]{phase.recipe.name}[/]: {phase.recipe.training.steps} steps", highlight=False)
        outcome = execute(phase.recipe, inner, resume=started, console=console)
    if outcome.finished:
        phase.hand_over(model, load_run(inner.path))
    return outcome
