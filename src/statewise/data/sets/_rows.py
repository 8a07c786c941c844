"""Arrays that are filled block by block: in memory, or on the disk so that work goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..._files import write_atomically
from ._workers import blocks

Shapes = dict[str, tuple[tuple[int, ...], Any]]


class Rows:
    """`n` rows of several arrays, and which blocks of them are filled.

    Args:
        shapes: name -> (shape of a row, dtype).
        folder: where to keep them; None for memory. What is there already is gone on with if it is of equal
            `settings` and shapes, else removed.
        settings: what the rows depend on, as it can be written in JSON.
        block: rows that are filled at a time.
    """

    def __init__(self, n: int, shapes: Shapes, *, folder: Path | None, settings: dict[str, Any], block: int) -> None:
        self.n, self.block = n, block
        self._folder = folder
        whole = {name: ((n, *shape), np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}
        if folder is None:
            self.arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in whole.items()}
            self._filled = np.zeros(-(-n // block), bool)
            return
        plan = {"settings": settings, "block": block, "arrays": {k: [list(s), d.str] for k, (s, d) in whole.items()}}
        text = json.dumps(plan, sort_keys=True)
        if not _same(folder / "plan.json", text):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, (shape, dtype) in whole.items():
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
            np.lib.format.open_memmap(folder / "_filled.npy", "w+", np.dtype(bool), (-(-n // block),))
            # Last, so that a plan stands for whole arrays.
            write_atomically(folder / "plan.json", lambda path: Path(path).write_text(text, encoding="utf-8"))
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in whole}
        self._filled = np.load(folder / "_filled.npy", mmap_mode="r+")

    def fill(
        self, work: Callable[[int, int], dict[str, np.ndarray]], workers: int, progress: Callable[[int, int], None]
    ) -> dict[str, np.ndarray]:
        """`work(start, stop)` for the blocks that are not filled yet; then all arrays."""
        missing = np.flatnonzero(~np.asarray(self._filled))
        rows = int(self._filled.sum()) * self.block

        def some(first: int, last: int) -> tuple[int, int, dict[str, np.ndarray]]:
            start = int(missing[first]) * self.block
            stop = min(start + self.block, self.n)
            return start, stop, work(start, stop)

        progress(min(rows, self.n), self.n)
        for start, stop, found in blocks(some, 0, len(missing), 1, workers):
            for name, array in found.items():
                self.arrays[name][start:stop] = array
            self._note(start // self.block)
            rows += stop - start
            progress(min(rows, self.n), self.n)
        return self.arrays

    def _note(self, block: int) -> None:
        # First the rows, then the note: a block that is noted is on the disk.
        if self._folder is not None:
            for array in self.arrays.values():
                array.flush()  # type: ignore[attr-defined]
        self._filled[block] = True


def _same(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False
