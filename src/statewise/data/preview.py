"""A picture of the first rows of a data set, for people to look at."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from .labelled import Labelled, Ragged
from .sets import own

_WIDTH = 56  # characters of a line of text
_LINES = 26  # lines of text of one row


def preview(data: Labelled, path: Path, rows: int = 12) -> None:
    """Write a PNG with rows of the training split, as many of each label as there are: pictures in a grid, tokens as
    text, other values as curves. Each has its label above it.

    Raises:
        ValueError: rows out of range, or a name that does not end in .png.
    """
    check(path, rows)
    chosen = _of_each_label(np.asarray(data.train.labels), rows)
    inputs = data.train.inputs
    if isinstance(inputs, np.ndarray):
        show = _show_image if data.image else _show_curve
        columns, size = (6, (1.7, 1.95)) if data.image else (3, (4.0, 1.6))
    else:
        show, columns, size = _show_text, 3, (3.9, 3.7)
    figure, axes = _grid(len(chosen), min(columns, len(chosen)), size)
    for axis, row in zip(axes, chosen):
        show(axis, data, int(row))
        label = int(data.train.labels[row])
        name = data.classes[label] if data.classes else str(label)
        axis.set_title(name, fontsize=9, fontweight="bold", loc="center" if data.image else "left", parse_math=False)
    figure.suptitle(_heading(data), fontsize=10, parse_math=False)
    figure.savefig(path, dpi=110)


def check(path: Path, rows: int) -> None:
    """Raise ValueError where `preview` would, before there is a set."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"out: want a name that ends in .png, got {path.name!r}")
    if not 1 <= rows <= 100:
        raise ValueError(f"rows: want 1 to 100, got {rows}")


def _of_each_label(labels: np.ndarray, n: int) -> np.ndarray:
    """The first n rows in an order that takes the labels in turn."""
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        at = labels == label
        turn[at] = np.arange(at.sum())
    return np.lexsort((labels, turn))[:n]


def _grid(n: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-n // columns)
    figure = Figure(figsize=(columns * size[0], lines * size[1] + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _heading(data: Labelled) -> str:
    sizes = [f"{len(split):,}" for split in (data.train, data.validation, data.test)]
    what = f"{data.channels} channels" if data.channels > 1 else "values" if data.channels else "tokens"
    return f"{data.name}: {' / '.join(sizes)} rows of up to {data.length:,} {what}, {data.n_classes} classes"


def _show_image(axis: Any, data: Labelled, row: int) -> None:
    assert data.image is not None
    values = np.asarray(data.train.inputs[row])
    picture = values.reshape(*data.image, values.shape[-1])
    low, high = _range(data)
    if picture.shape[-1] == 3:
        axis.imshow(np.clip((picture.astype(np.float64) - low) / (high - low), 0, 1))
    else:
        axis.imshow(picture[..., 0], cmap="gray", vmin=low, vmax=high, interpolation="nearest")


def _range(data: Labelled) -> tuple[float, float]:
    assert isinstance(data.train.inputs, np.ndarray)
    some = np.asarray(data.train.inputs[:256])
    return float(some.min()), max(float(some.max()), float(some.min()) + 1e-9)


def _show_curve(axis: Any, data: Labelled, row: int) -> None:
    axis.plot(np.asarray(data.train.inputs[row]), linewidth=0.6)
    axis.margins(x=0)
    axis.axhline(0, color="0.8", linewidth=0.5, zorder=0)


def _show_text(axis: Any, data: Labelled, row: int) -> None:
    inputs = data.train.inputs
    both = inputs if isinstance(inputs, tuple) else (inputs,)
    room = _LINES // len(both) - (len(both) > 1)
    parts = []
    for rows in both:
        assert isinstance(rows, Ragged)
        lines = _lines(data, np.asarray(rows[row]))
        rest = len(lines) - room
        parts.append("\n".join(lines if rest <= 0 else [*lines[: room - 1], f"... {rest + 1} more lines"]))
    text = ("\n" + "-" * _WIDTH + "\n").join(parts)
    axis.text(0, 1, text, family="monospace", fontsize=7.5, va="top", transform=axis.transAxes, parse_math=False)


def _lines(data: Labelled, tokens: np.ndarray) -> list[str]:
    outline = own(data.name, "outline")
    if outline:
        return outline(tokens, _WIDTH)
    words = [data.symbols[t] for t in tokens] if data.symbols else [chr(t) for t in tokens]
    # Symbols that are characters are put side by side; the names of special ones, such as <eos>, are longer.
    plain = [word for word in words if not (word.startswith("<") and word.endswith(">") and len(word) > 2)]
    text = ("" if all(len(word) == 1 for word in plain) else " ").join(plain)
    shown = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(shown, _WIDTH) or [""]
