"""`statewise evaluate` of a classifier: accuracy, loss and every class of a split, also at a lower sampling rate."""

from __future__ import annotations

from copy import copy
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from .. import recipes
from .errors import user_errors
from .evaluate import Split, home
from .run import parsed

_CLOSE = 0.02  # a rate may be typed with two digits: 0.33 is a third
_LEAST = 1e-9  # no row is so long


def _every(rate: float) -> int:
    """Which values of a row are left at a rate of 1 / k: every k-th."""
    every = round(1 / rate) if rate > _LEAST else 0
    if every < 1 or abs(every * rate - 1) > _CLOSE:
        raise ValueError(f"rate: want 1 / k for a whole number k, such as 0.5 for every second value, got {rate}")
    return every


def _recipe(run_dir: str) -> Any:
    """The recipe of a run, as its config.yaml says; its data is a `ClassifyData`."""
    from ..data.classify import ClassifyData
    from ..training.directory import RunDirectory

    config = RunDirectory.open(str(home(run_dir))).read_config()
    name = config.pop("recipe", None)
    if name not in recipes.names():
        raise ValueError(f"{run_dir}: {name!r} is no recipe of `statewise list`, so it has no labelled rows")
    made = recipes.get(name)(**parsed(name, config))
    if not isinstance(made.data, ClassifyData):
        raise ValueError(f"{run_dir}: the recipe {name} has no labelled rows to ask about")
    return made


def evaluate_labels(run_dir: str, split: Split, rate: float) -> dict[str, Any]:
    """Ask the model about every row of a split; prints the table and returns the figures."""
    with user_errors():
        every = _every(rate)
        from ..data.labelled import decimated
        from ..inference import load_run
        from ..recipes.label_scores import device_of, score

        model, recipe = load_run(run_dir), _recipe(run_dir)
        data = copy(recipe.data)
        if every > 1:
            model, data.data = model.at_sampling_rate(1 / every), decimated(data.data, every)
    console, labelled = Console(), data.data
    batches = track(data.split(split), f"Asking about {split}", transient=True, console=Console(stderr=True))
    found = score(model, batches, labelled.n_classes, device_of(recipe.training))
    classes = found.classes(labelled.classes)
    told = f", every {_ordinal(every)} value" if every > 1 else ""
    table = Table(title=f"{recipe.name}: {found.rows:,} rows of {split}{told}", title_justify="left")
    table.add_column("class")
    for column in ("rows", "recall", "precision"):
        table.add_column(column, justify="right")
    for one in classes:
        table.add_row(escape(one.name), f"{one.rows:,}", _share(one.recall), _share(one.precision))
    console.print(table)
    console.print(f"accuracy {found.accuracy:.2%}, loss {found.loss:.4f} nats", highlight=False)
    if split == "validation" and labelled.settings.get("validation") == "test":
        console.print("These are the test rows: the set has no validation split.", highlight=False)
    return {
        "run": run_dir,
        "recipe": recipe.name,
        "data": labelled.name,
        "split": split,
        "rate": 1 / every,
        "rows": found.rows,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "classes": [asdict(one) for one in classes],
        "confusion": found.counts.tolist(),
    }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")
