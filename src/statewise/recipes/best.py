"""The weights of the best validation of a run."""

from __future__ import annotations

from ..training.checkpoint_io import load_checkpoint
from ..training.directory import RunDirectory, read_metrics
from .recipe import Recipe


def keep_best(recipe: Recipe, run: RunDirectory) -> tuple[int, float]:
    """Put the weights of the best validated checkpoint into the model. Returns its step and the headline metric."""
    name = f"val_{recipe.task.headline}"
    saved = set(run.saved_steps())
    rows = [(row[name], int(row["step"])) for row in read_metrics(run.metrics) if name in row and row["step"] in saved]
    sign = 1 if recipe.task.lower_is_better else -1
    value, step = min(rows, key=lambda row: (sign * row[0], row[1]))
    weights = load_checkpoint(run.checkpoint(step))["state_dict"]
    recipe.model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    return step, value
