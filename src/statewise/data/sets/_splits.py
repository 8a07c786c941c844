"""Splits that every reader makes the same way."""

from __future__ import annotations

import numpy as np
import torch

# The split seed of the S4 code. Seed 0 of a set is that split; seed s is another one.
_PUBLISHED_SEED = 42


def held_out(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows kept and rows held out, both ascending; with seed 0 the rows that the S4 code holds out.

    That code draws torch.randperm from a generator with seed 42 and keeps its first int(n * (1 - share)).

    Args:
        n: number of rows.
        share: of the rows that is held out, 0 to 1.
        seed: 0 is the published split.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(_PUBLISHED_SEED + seed)).numpy()
    keep = int(n * (1 - share))
    return np.sort(order[:keep]), np.sort(order[keep:])


def stratified(labels: np.ndarray, shares: tuple[float, float], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of three parts, ascending, each with the same share of every label (up to rounding).

    Args:
        labels: (n,) integers.
        shares: of validation and test; the rest is for training.
        seed: of the order in which rows are dealt.
    """
    rng = np.random.default_rng(seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(shares) * len(rows)).astype(int)
        for part, chosen in zip(parts, (rows[cuts[1] :], rows[: cuts[0]], rows[cuts[0] : cuts[1]])):
            part.append(chosen)
    train, validation, test = (np.sort(np.concatenate(part)) for part in parts)
    return train, validation, test
