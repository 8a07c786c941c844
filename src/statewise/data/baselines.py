"""What a language model over bytes must beat, in bits per byte of the held-out text.

The two kinds are not the same game. The n-gram models learn from the training text, as the network does. The
compressors see the held-out text alone: they start from nothing, but may use its whole length. Compressing the held-out
text *after* the training text (conditional compression) would be a third kind of baseline and give smaller numbers; it
is not computed here.
"""

from __future__ import annotations

import bz2
import gzip
import lzma

import numpy as np

COMPRESSORS = {
    "gzip -9": lambda b: gzip.compress(b, 9, mtime=0),
    "bzip2 -9": lambda b: bz2.compress(b, 9),
    "xz -9e": lambda b: lzma.compress(b, preset=9 | lzma.PRESET_EXTREME),
}


def _counts(text: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """(context ids, next byte) of every position that has `order` bytes before it."""
    context = np.zeros(max(len(text) - order, 0), np.int64)
    for k in range(order):
        context = context * 256 + text[k : k + len(context)]
    return context, text[order:].astype(np.int64)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] (sorted) is what is wanted, 0 where there is none."""
    if len(keys) == 0:
        return np.zeros(len(wanted), np.int64)
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def ngram_bits(train: bytes, held_out: bytes, order: int) -> float:
    """Bits per byte of an order-`order` byte model (order 0 is unigram, at most 2) with Witten-Bell smoothing.

    A context seen n times with t different successors gives weight t / (n + t) to the model one order lower; below
    order 0 stands the uniform distribution. Each held-out byte is predicted from the bytes before it.
    """
    if not 0 <= order <= 2:
        raise ValueError(f"order: want 0, 1 or 2, got {order}")
    seen = np.frombuffer(train, np.uint8)
    text = np.frombuffer(held_out, np.uint8)
    p = np.full(len(text), 1 / 256)
    for k in range(order + 1):
        context, following = _counts(seen, k)
        # Sorted keys instead of a table over all contexts: order 2 would need 256**3 entries, nearly all zero.
        pairs, count = np.unique(context * 256 + following, return_counts=True)
        contexts, first = np.unique(pairs // 256, return_index=True)
        totals = np.add.reduceat(count, first) if len(count) else count
        kinds = np.diff(np.append(first, len(pairs)))
        at, byte = _counts(text, k)
        n, t = _look_up(contexts, totals, at), _look_up(contexts, kinds, at)
        seen_with = _look_up(pairs, count, at * 256 + byte)
        # A context that was never seen has no opinion of its own and leaves the lower order as it is.
        known = n > 0
        lower = p[k:]
        p[k:] = np.where(known, (seen_with + t * lower) / np.maximum(n + t, 1), lower)
    return float(-np.log2(p).mean())


def compressed_bits(held_out: bytes) -> dict[str, float]:
    """Bits per byte of general compressors at their strongest setting, file headers included."""
    return {name: 8 * len(f(held_out)) / len(held_out) for name, f in COMPRESSORS.items()}


def baselines(train: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte of every baseline, worst kind first: uniform, n-gram models, compressors."""
    return {
        "uniform": 8.0,
        "unigram": ngram_bits(train, held_out, 0),
        "order-2 model": ngram_bits(train, held_out, 2),
        **compressed_bits(held_out),
    }
