"""What a recipe is. Light: the command line imports this to print its help.

(jsonargparse executes the `if TYPE_CHECKING` blocks of a module whose signatures it reads, so recipe modules have none;
this one may, because no options are read from it.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.options import Training

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.steps import StepData
    from ..tasks import Task
    from ..training.directory import RunDirectory


@dataclass(frozen=True)
class Phase:
    """A training that comes before another one, in a run directory inside the other's.

    Args:
        name: of that directory.
        recipe: the training; its `finish` saves its model there.
        hand_over: `hand_over(model of what follows, trained model)`.
        source: the directory in which another run did the same; it is copied instead of training.
    """

    name: str
    recipe: Recipe
    hand_over: Callable[[Any, Any], None]
    source: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """All that a run needs.

    Args:
        name: as in `statewise run <name>`.
        options: the recipe function's own arguments (JSON values), for config.yaml.
        finish: makes the report of a finished run: `finish(recipe, run, console)`.
        before: what is trained first.
    """

    name: str
    model: Any  # a Causal nn.Module with `config` and `save_pretrained`
    data: StepData
    task: Task
    training: Training
    options: Mapping[str, Any]
    finish: Callable[[Recipe, RunDirectory, Console], None]
    before: Phase | None = None

    def config(self) -> dict[str, Any]:
        """Every option of the run, flat, as the command line and config.yaml have them."""
        return {**self.options, **asdict(self.training)}
