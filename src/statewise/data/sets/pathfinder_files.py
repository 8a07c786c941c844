"""The published folders of Pathfinder: PNG files, and lists of them with labels.

pathfinder32/curv_contour_length_14/metadata/*.npy   text: folder, file, number, label, ... in each line
pathfinder32/curv_contour_length_14/imgs/0/sample_0.png
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..labelled import Split
from ._workers import blocks

HARD = "curv_contour_length_14"
_SPLIT_SEED = 42
_METADATA_LIMIT = 64 << 20  # bytes of one list


def read(
    folder: Path, size: int, workers: int, progress: Callable[[int, int], None]
) -> tuple[list[Split], dict[str, Any]]:
    """The splits of the S4 code (80 / 10 / 10 %, PyTorch's permutation of seed 42), and what was read.

    Args:
        folder: the one with `curv_contour_length_14` in it, or that folder itself.

    Raises:
        ValueError: a list or an image is missing, is not what it should be, or is of another size.
    """
    top = folder if folder.name == HARD else folder / HARD
    rows = _rows(top)
    values = np.empty((len(rows), size * size, 1), np.uint8)

    def some(start: int, stop: int) -> int:
        for i in range(start, stop):
            values[i, :, 0] = _image(top, rows[i][0], size).reshape(-1)
        return stop

    for done in blocks(some, 0, len(rows), 200, workers):
        progress(done, len(rows))
    labels = np.array([label for _, label in rows], np.int64)
    order = _permutation(len(rows))
    held = int(0.1 * len(rows))
    chosen = np.split(order, [len(rows) - 2 * held, len(rows) - held])
    return [Split(values[i], labels[i]) for i in chosen], {"files": HARD, "rows": [len(i) for i in chosen]}


def _rows(top: Path) -> list[tuple[Path, int]]:
    lists = list((top / "metadata").glob("*.npy"))
    if not lists:
        raise ValueError(f"source: no lists {top / 'metadata'}/*.npy; want the folder with {HARD} in it")
    strange = [path.name for path in lists if not path.stem.isdigit()]
    if strange:
        raise ValueError(f"{top / 'metadata'}: want lists named 0.npy, 1.npy ..., got {strange[0]}")
    rows: list[tuple[Path, int]] = []
    for path in sorted(lists, key=lambda path: int(path.stem)):
        if path.stat().st_size > _METADATA_LIMIT:
            raise ValueError(f"{path}: want a list of at most {_METADATA_LIMIT} bytes, got {path.stat().st_size}")
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: want text, as published; this is another format of .npy") from error
        for number, line in enumerate(lines, 1):
            words = line.split()
            if len(words) < 4 or words[3] not in ("0", "1"):
                raise ValueError(f"{path}, line {number}: want folder, file, number and a label of 0 or 1: {line[:80]}")
            image = Path(words[0]) / words[1]
            if image.is_absolute() or ".." in image.parts:
                raise ValueError(f"{path}, line {number}: {image} is not inside {top}")
            rows.append((image, int(words[3])))
    if len(rows) < 10:
        raise ValueError(f"{top}: {len(rows)} images cannot be split 80 / 10 / 10; want at least 10")
    return rows


def _image(top: Path, path: Path, size: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(top / path, formats=("PNG",)) as file:
            if file.size != (size, size):
                raise ValueError(f"{top / path}: want {size} x {size} pixels, got {file.size[0]} x {file.size[1]}")
            return np.asarray(file.convert("L"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{top / path}: cannot be read as a PNG file: {error}") from error


def _permutation(n: int) -> np.ndarray:
    # The published split is PyTorch's permutation, so this one reader needs PyTorch.
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(_SPLIT_SEED)).numpy()
