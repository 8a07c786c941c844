"""CIFAR-10 as sequences of 1,024 pixels, in colour (sCIFAR) and in grey (the image task of the Long Range Arena)."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .. import archives
from ..labelled import SPLITS, Labelled
from . import _packages
from ._files import folder
from ._images import cifar_folder
from ._splits import stratified
from .images import Pictures, fashion_mnist, pictures, with_validation

Progress = Callable[[int, int], None]

_WHAT = "the folder with cifar-10-batches-bin or cifar-10-batches-py"
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # of colours in [0, 1], as in the S4 code
_GREY_MEAN, _GREY_STD = 122.6, 61.0  # of grey in [0, 255], as in the S4 code
_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")
_TILES = 200  # at most, of one photograph
_SIDE = 32


def cifar(profile: str, *, seed: int, source: Path | None, workers: int, progress: Progress) -> Labelled:
    """CIFAR-10 in colour, 1,024 pixels of 3 channels (sCIFAR); small is 32x32 tiles of photographs: which one?

    Values are standardised per channel as in the S4 code. Small is a stand-in: no package has CIFAR-10.
    """
    if profile == "small" and source is None:
        package = _packages.SCIKIT_IMAGE
        parts = _tiles(package, seed)
        card = {"n_classes": len(_PHOTOGRAPHS), "classes": tuple(Path(name).stem for name in _PHOTOGRAPHS)}
        settings = {"source": asdict(package), "photographs": list(_PHOTOGRAPHS), "tiles": _TILES}
    else:
        root = folder("cifar", source, _WHAT)
        parts, settings = with_validation(cifar_folder(root), seed), {"source": str(root)}
        card = {"n_classes": 10, "classes": _CLASSES}
    scaled = {split: (_standardised(x), y) for split, (x, y) in parts.items()}
    settings = {"profile": profile, "seed": seed, **settings}
    return pictures("cifar", scaled, image=(_SIDE, _SIDE), settings=settings, **card)


def cifar_grey(profile: str, *, seed: int, source: Path | None, workers: int, progress: Progress) -> Labelled:
    """CIFAR-10 in grey, 1,024 pixels (the image task of LRA); small is Fashion-MNIST with a border, 32x32.

    Values enter a model as (grey - 122.6) / 61, as in the S4 code. Small is a stand-in: no package has CIFAR-10.
    """
    if profile == "small" and source is None:
        small = fashion_mnist("small", seed=seed, source=None, workers=workers, progress=progress)
        parts = {split: (_bordered(getattr(small, split).inputs), getattr(small, split).labels) for split in SPLITS}
        classes, settings = small.classes, small.settings
    else:
        root = folder("cifar_grey", source, _WHAT)
        parts = {part: (grey(x), y) for part, (x, y) in cifar_folder(root).items()}
        parts = with_validation(parts, seed)
        classes, settings = _CLASSES, {"profile": profile, "seed": seed, "source": str(root)}
    return pictures(
        "cifar_grey",
        parts,
        n_classes=10,
        mean=_GREY_MEAN,
        std=_GREY_STD,
        image=(_SIDE, _SIDE),
        classes=classes,
        settings=settings,
    )


def grey(colours: np.ndarray) -> np.ndarray:
    """The luma of ITU-R 601-2 as imaging libraries round it: (n, L, 3) uint8 -> (n, L, 1) uint8."""
    red, green, blue = (colours[..., i].astype(np.uint32) for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[..., None]


def _standardised(colours: np.ndarray) -> np.ndarray:
    """(n, L, 3) bytes -> float32. Done here because a set has one mean and one deviation for all its channels."""
    scale, shift = 1 / (255 * np.array(_STD)), np.array(_MEAN) / np.array(_STD)
    return colours * scale.astype(np.float32) - shift.astype(np.float32)


def _bordered(rows: np.ndarray) -> np.ndarray:
    """(n, 784, 1) -> (n, 1024, 1): a border of two black pixels."""
    squares = rows.reshape(len(rows), 28, 28)
    return np.pad(squares, ((0, 0), (2, 2), (2, 2))).reshape(len(rows), -1, 1)


def _tiles(package: archives.Package, seed: int) -> dict[str, Pictures]:
    """Up to `_TILES` tiles of each photograph that do not overlap, and which photograph it was."""
    from PIL import Image

    files = archives.read(archives.fetch(package), "skimage/data/*.[pj][np]g")
    rng = np.random.default_rng(seed)
    found, labels = [], []
    for label, name in enumerate(_PHOTOGRAPHS):
        photograph = np.asarray(Image.open(io.BytesIO(files[f"skimage/data/{name}"])).convert("RGB"))
        down, across = (size // _SIDE for size in photograph.shape[:2])
        grid = photograph[: down * _SIDE, : across * _SIDE].reshape(down, _SIDE, across, _SIDE, 3)
        tiles = grid.transpose(0, 2, 1, 3, 4).reshape(down * across, _SIDE * _SIDE, 3)
        chosen = np.sort(rng.permutation(len(tiles))[:_TILES])
        found.append(tiles[chosen])
        labels += [label] * len(chosen)
    x, y = np.concatenate(found), np.array(labels, np.int64)
    return {split: (x[rows], y[rows]) for split, rows in zip(SPLITS, stratified(y, (0.1, 0.2), seed))}
