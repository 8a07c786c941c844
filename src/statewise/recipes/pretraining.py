"""A phase before the labels: the same encoder learns to restore what is hidden in the task's own training rows.

Source: "Never Train from Scratch" (arXiv 2310.02980).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..training.directory import RunDirectory
from ..training.options import Training
from .recipe import Phase, Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.classify import ClassifyData


def prepared(
    name: str,
    base: ClassifyData,
    objective: Literal["masked", "causal"],
    config: dict[str, Any],
    training: Training,
    *,
    rate: float,
    levels: int | None,
) -> Phase:
    """The phase before a classifier with this `config` is trained.

    Raises:
        ValueError: more than one device.
    """
    import torch

    from ..data.classify import DenoisingData
    from ..models.classification import SequenceClassifier
    from ..models.classification.sequence import adopt_encoder
    from ..tasks import Recall, Restoration
    from ..training.fit import processes

    local, machines = processes(training)
    if local * machines > 1:
        raise ValueError(f"devices: --pretrain trains on one device, got {local * machines}; want --devices 1")
    data = DenoisingData(base, objective, rate=rate, levels=levels)
    own = {**config, "n_outputs": data.n_outputs, "pool": "none", "head": "linear"}
    if data.added_channels:
        own["channels"] = config["channels"] + data.added_channels
    torch.manual_seed(training.seed)
    net = SequenceClassifier(**own)
    task = Restoration if base.data.channels and levels is None else Recall
    recipe = Recipe(
        f"{name}, {objective} pre-training", net, data, task(net, data.n_outputs), training,
        {"objective": objective, "rate": rate, "levels": levels}, finish_pretraining,
    )  # fmt: skip
    return Phase("pretrain", recipe, lambda model, trained: adopt_encoder(model, trained.encoder_state()))


def taken(phase: Phase, run: str) -> Phase:
    """The same phase, with what a run has learned in it.

    Raises:
        ValueError: the run has not ended that phase, or it was another one.
    """
    source = RunDirectory(Path(run) / phase.name)
    if not source.results.is_file():
        raise ValueError(f"--pretrain-from: {run} holds no pre-training that has ended")
    recipe = source.read_config().get("recipe")
    if recipe != phase.recipe.name:
        raise ValueError(f"--pretrain-from: {run} holds {recipe!r}, want {phase.recipe.name!r}")
    want, got = phase.recipe.model.file_config(), json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    other = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
    if other:
        raise ValueError(f"--pretrain-from: {run} has another model: its {', '.join(other)} differ")
    return replace(phase, source=source.path)


def finish_pretraining(recipe: Recipe, run: RunDirectory, console: Console) -> None:
    """The weights of the best validation, curve and figures."""
    from .best import keep_best
    from .curve import plot_curve
    from .report import _common

    step, value = keep_best(recipe, run)
    recipe.model.save_pretrained(run.path)
    headline = recipe.task.headline
    results = {**_common(recipe, run), "best_step": step, f"val_{headline}": round(value, 5)}
    run.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    label = {"accuracy": "share of hidden elements that are right", "loss": "mean absolute difference"}[headline]
    plot_curve(run, recipe.task, label, {}, final=value)
    console.print(f"Pre-trained: held out {label} {value:.3f} at step {step}", highlight=False)
