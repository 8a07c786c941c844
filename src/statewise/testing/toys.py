"""Small labelled sets, made on the spot, to try models, tasks and recipes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..data.labelled import Labelled, Ragged, Split

VOCAB = 7


Sizes = tuple[int, int, int]  # rows for training, validation and testing
_SIZES: Sizes = (37, 11, 10)


def _splits(make: Callable[..., Any], sizes: Sizes, seed: int) -> list[Split]:
    rng = np.random.default_rng(seed)
    return [Split(*make(rng, n)) for n in sizes]


def _rows(rng: np.random.Generator, n: int) -> list[np.ndarray]:
    # Token 0 is kept for padding, as in all sets.
    return [rng.integers(1, VOCAB, rng.integers(3, 12)) for _ in range(n)]


def tokens(sizes: Sizes = _SIZES, seed: int = 0) -> Labelled:
    """The label is the last token's parity: any model that sees order learns it."""

    def make(rng: np.random.Generator, n: int) -> tuple[Any, np.ndarray]:
        rows = _rows(rng, n)
        return Ragged.of(rows), np.array([row[-1] % 2 for row in rows], np.int64)

    return Labelled("toy tokens", *_splits(make, sizes, seed), length=12, n_classes=2, vocab_size=VOCAB)


def pairs(sizes: Sizes = _SIZES, seed: int = 0) -> Labelled:
    """The label says whether two rows begin alike."""

    def make(rng: np.random.Generator, n: int) -> tuple[Any, np.ndarray]:
        a, b = _rows(rng, n), _rows(rng, n)
        same = [int(x[0] == y[0]) for x, y in zip(a, b)]
        return (Ragged.of(a), Ragged.of(b)), np.array(same, np.int64)

    return Labelled("toy pairs", *_splits(make, sizes, seed), length=12, n_classes=2, vocab_size=VOCAB)


def pixels(sizes: Sizes = _SIZES, seed: int = 0, channels: int = 1) -> Labelled:
    """Grey levels around a mean that tells the class."""

    def make(rng: np.random.Generator, n: int) -> tuple[Any, np.ndarray]:
        labels = rng.integers(0, 3, n)
        x = rng.integers(0, 100, (n, 16, channels)) + 75 * labels[:, None, None]
        return x.astype(np.uint8), labels

    return Labelled("toy pixels", *_splits(make, sizes, seed), length=16, n_classes=3, mean=100.0, std=50.0)


SETS: dict[str, Callable[..., Labelled]] = {"tokens": tokens, "pairs": pairs, "pixels": pixels}
