"""Pathfinder: two long dashed snakes, short ones to distract, and two discs: do they lie on the same snake?

The pictures are those of Long Range Arena (Tay et al. 2020, arXiv:2011.04006), drawn here with the parameters that it
gave to the generator of Linsley et al. 2018 (arXiv:1805.08315). Image i is a function of (seed, i) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..._names import unknown
from ..labelled import Labelled, Split
from ._rows import Rows
from ._workers import blocks, full_only
from .pathfinder_stamps import Style, tables

# Path-X is the one of 128 x 128.
STYLES = {
    32: Style(32, dash=2, thickness=0.5, margins=(1,), contour=14, distractor_dashes=20, seed_distance=7,
              continuity=1.0, marker=1.5, snake_contrast=2.0, dash_contrast=0.75),
    64: Style(64, dash=5, thickness=1.0, margins=(1,), contour=14, distractor_dashes=22, seed_distance=12,
              continuity=1.8, marker=2.5, snake_contrast=0.8),
    128: Style(128, dash=5, thickness=1.5, margins=(2, 3), contour=14, distractor_dashes=35, seed_distance=20,
               continuity=1.8, marker=3.0, snake_contrast=0.9),
    256: Style(256, dash=5, thickness=2.0, margins=(3,), contour=14, distractor_dashes=30, seed_distance=27,
               continuity=1.8, marker=5.0, snake_contrast=1.0, padding=22),
}  # fmt: skip
# Dashes of a long snake in the three families of the published data; Long Range Arena is "hard". "bare" is ours: "easy"
# without distractors.
CONTOURS = {"bare": 6, "easy": 6, "intermediate": 9, "hard": 14}
_TRIES = 1_000_000  # pairs of snakes begun for one image; at 64 pixels about 1200 are


class Size(NamedTuple):
    difficulty: str
    rows: tuple[int, int, int]


# Four layers of S4D, width 48, on 32 pixels: above chance on "bare" after 20,000 images; not on "easy" after 37,000.
PROFILES = {"small": Size("bare", (20_000, 2_000, 2_000)), "full": Size("hard", (160_000, 20_000, 20_000))}


class Pictures(NamedTuple):
    """Images with what they were drawn from.

    images: (n, size, size) uint8. labels: (n,) int64; 1: both markers on one snake.
    snakes: (n, size, size) uint8: the snake of each pixel: 1 and 2 the long ones, from 3 on distractors, 0 none.
    dashes: (n, 2, contour, 2, 2) int64: each dash of the long snakes, (y, x) of its beginning and end.
    markers: (n, 2, 2) int64: (y, x) of both discs. distractors: (n,) int64, how many there was room for.
    """

    images: np.ndarray
    labels: np.ndarray
    snakes: np.ndarray
    dashes: np.ndarray
    markers: np.ndarray
    distractors: np.ndarray


def style(size: int, difficulty: str = "hard") -> Style:
    """The published parameters for a size (32, 64, 128 or 256) and a difficulty (easy, intermediate or hard; or
    bare, without distractors).

    Raises:
        ValueError: no such size or difficulty.
    """
    if size not in STYLES:
        raise ValueError(f"size: want {', '.join(map(str, STYLES))}, got {size}")
    if difficulty not in CONTOURS:
        raise ValueError(unknown("difficulty", difficulty, CONTOURS))
    found = STYLES[size]._replace(contour=CONTOURS[difficulty])
    return found._replace(distractor_dashes=0) if difficulty == "bare" else found


def draw(n: int, style: Style, *, seed: int = 0, workers: int = 1) -> Pictures:
    """The first n images of a seed.

    Raises:
        ValueError: the snakes of this style do not fit into its size.
    """
    render = renderer(style, seed)
    parts = list(blocks(render, 0, n, 64, workers))
    return Pictures(*(np.concatenate(part) for part in zip(*parts)))


def renderer(style: Style, seed: int) -> Callable[[int, int], Pictures]:
    """A function that draws the images start to stop - 1; it may be called from several threads."""
    from . import pathfinder_numba as kernel

    choices = tuple(tables(style, margin) for margin in style.margins)

    def render(start: int, stop: int) -> Pictures:
        n, size = stop - start, style.size
        found = Pictures(
            images=np.zeros((n, size, size), np.uint8),
            labels=np.zeros(n, np.int64),
            snakes=np.zeros((n, size, size), np.uint8),
            dashes=np.zeros((n, 2, style.contour, 2, 2), np.int64),
            markers=np.zeros((n, 2, 2), np.int64),
            distractors=np.zeros(n, np.int64),
        )
        drawn = kernel.draw(seed, start, style, style.distractor, style.distractors, choices, _TRIES, *found)
        if drawn < n:
            raise ValueError(f"pathfinder: {_TRIES} tries gave no image {start + drawn}; want a style with more room")
        return found

    return render


def make32(profile: str, **how: Any) -> Labelled:
    """Pathfinder, 32 x 32: are two discs joined by a dashed line?"""
    return _make(32, profile, **how)


def make64(profile: str, **how: Any) -> Labelled:
    """Pathfinder, 64 x 64."""
    return _make(64, profile, **how)


def make128(profile: str, **how: Any) -> Labelled:
    """Path-X: Pathfinder, 128 x 128, 16,384 positions."""
    return _make(128, profile, **how)


def make256(profile: str, **how: Any) -> Labelled:
    """Pathfinder, 256 x 256, 65,536 positions."""
    return _make(256, profile, **how)


def _make(
    size: int, profile: str, *, seed: int, source: Path | None, workers: int, progress: Callable[[int, int], None]
) -> Labelled:
    from . import parts

    if source is not None:
        from .pathfinder_files import read

        full_only(profile)
        splits, settings = read(source, size, workers, progress)
        return _labelled(size, splits, settings)
    difficulty, rows = PROFILES[profile]
    how = style(size, difficulty)
    settings = {"profile": profile, "seed": seed, "rows": list(rows), "difficulty": difficulty, **how._asdict()}
    # What takes long goes on where it was stopped; what is small stays in memory.
    folder = parts(f"pathfinder{size}", profile, seed) if profile == "full" else None
    shapes = {"values": ((size * size, 1), np.uint8), "labels": ((), np.int64)}
    render = renderer(how, seed)

    def work(start: int, stop: int) -> dict[str, np.ndarray]:
        found = render(start, stop)
        return {"values": found.images.reshape(stop - start, -1, 1), "labels": found.labels}

    whole = Rows(sum(rows), shapes, folder=folder, settings=settings, block=64)
    arrays = whole.fill(work, workers, progress)
    ends = np.cumsum(rows)
    splits = [Split(*(arrays[k][end - n : end] for k in ("values", "labels"))) for n, end in zip(rows, ends)]
    return _labelled(size, splits, settings)


def _labelled(size: int, splits: list[Split], settings: dict[str, Any]) -> Labelled:
    train, validation, test = splits
    return Labelled(
        f"pathfinder{size}",
        train,
        validation,
        test,
        length=size * size,
        n_classes=2,
        # Grey / 255, not centred: as the published results were trained.
        std=255.0,
        image=(size, size),
        classes=("two snakes", "one snake"),
        settings=settings,
    )
