"""The report of a classification run: test accuracy at the best validation, baselines, confusion, curves."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..data import sets
from ..data.label_baselines import label_baselines
from ..training.directory import RunDirectory
from .best import keep_best
from .curve import plot_curve
from .label_scores import device_of, score
from .report import _common, _facts, _yaml, describe

if TYPE_CHECKING:
    from .recipe import Recipe


def finish_classification(recipe: Recipe, run: RunDirectory, console: Console) -> None:
    """Test accuracy with the weights of the best validation, beside simple rules, and the files of the run."""
    data: Any = recipe.data
    labelled = data.data
    step, validation = keep_best(recipe, run)
    recipe.model.save_pretrained(run.path)
    with console.status("Testing"):
        scores = score(recipe.model, data.split("test"), labelled.n_classes, device_of(recipe.training))
        others = label_baselines(labelled)
    results = {
        **_common(recipe, run),
        "data": labelled.name,
        **({"what": _about(labelled.name)} if labelled.name in sets.names() else {}),
        **({"validation": "test"} if labelled.settings.get("validation") == "test" else {}),
        "training_rows": len(data.rows),
        "test_rows": scores.rows,
        "best_step": step,
        "val_accuracy": round(validation, 5),
        "accuracy": round(scores.accuracy, 5),
        "loss": round(scores.loss, 5),
        "baselines": {name: round(value, 5) for name, value in others.items()},
    }
    if recipe.before is not None:
        results["pretraining"] = json.loads(RunDirectory(run.path / recipe.before.name).results.read_text("utf-8"))
    run.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_curve(run, recipe.task, "share of labels that are right", others, final=scores.accuracy)
    np.savetxt(run.path / "confusion.csv", scores.counts, fmt="%d", delimiter=",")
    plot_confusion(run.path / "confusion.png", scores.counts, labelled.classes)
    run.card.write_text(_card(recipe, results, run), encoding="utf-8")
    _show(console, recipe, results, run)


def plot_confusion(path: Path, counts: np.ndarray, names: Sequence[str]) -> None:
    """Write a picture of a confusion matrix, each row as shares of its label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(2.5 + 0.42 * n, 2 + 0.42 * n) if n > 2 else (4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = list(names) if len(names) == n else [str(i) for i in range(n)]
    axes.set_xticks(range(n), ticks, rotation=90 if max(map(len, ticks)) > 2 else 0)
    axes.set_yticks(range(n), ticks)
    if n <= 12:
        for i in range(n):
            for j in range(n):
                colour = "white" if shares[i, j] > 0.5 else "#333333"
                axes.text(j, i, f"{shares[i, j]:.0%}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    figure.savefig(path, dpi=120, metadata={"Software": "statewise"})


def _about(name: str) -> str:
    """The first line of a set's maker, which says what its profiles are."""
    return (inspect.getdoc(sets.get(name)) or "").split("\n")[0]


def _rows(recipe: Recipe, results: dict[str, Any]) -> list[tuple[str, float]]:
    own = (describe(recipe), results["accuracy"])
    return sorted([*results["baselines"].items(), own], key=lambda row: row[1])


def _show(console: Console, recipe: Recipe, results: dict[str, Any], run: RunDirectory) -> None:
    title = f"{recipe.name}: {results['test_rows']:,} test rows, weights of step {results['best_step']}"
    table = Table(title=title, title_justify="left")
    table.add_column("model (higher is better)")
    table.add_column("labels that are right", justify="right")
    for name, value in _rows(recipe, results):
        table.add_row(name, f"{value:.2%}", style="bold green" if name == describe(recipe) else "")
    console.print()
    console.print(table)
    console.print(f"\nSaved in [bold]{escape(str(run))}[/] (start with README.md)", highlight=False)


def _card(recipe: Recipe, results: dict[str, Any], run: RunDirectory) -> str:
    lines = [
        f"# {recipe.name}",
        "",
        f"- Test accuracy **{results['accuracy']:.2%}**, with the weights of step {results['best_step']:,}, the "
        f"best on validation ({results['val_accuracy']:.2%})",
        f"- Data: {results['data']}; {results['training_rows']:,} training rows, {results['test_rows']:,} test rows",
        *([f"- What it is: {results['what']}"] if "what" in results else []),
        *(
            ["- **There is no validation split: the step was chosen on the test rows, which flatters.**"]
            if "validation" in results
            else []
        ),
        *_facts(recipe, results),
        "",
        "| model | test accuracy |",
        "|---|---|",
        *(f"| {name} | {value:.2%} |" for name, value in reversed(_rows(recipe, results))),
        "",
        "![Training curve](curve.png)",
        "",
        "![Confusion matrix](confusion.png)",
        "",
    ]
    if recipe.before is not None:
        told = results["pretraining"]
        headline = next(name for name in told if name.startswith("val_"))
        lines += [
            "## Before the labels",
            "",
            f"{recipe.before.recipe.name}: {told['steps']:,} steps, {told['training_seconds']:,.0f} s; held out "
            f"{headline.removeprefix('val_')} {told[headline]:.3f} at step {told['best_step']:,}.",
            "",
            f"![Curve of the pre-training]({recipe.before.name}/curve.png)",
            "",
        ]
    return "\n".join([*lines, "## Options", "", "```yaml", _yaml(recipe), "```", ""])
