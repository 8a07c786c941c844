"""Text as characters: the vocabulary of the training texts, and texts as rows of token numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..labelled import Ragged

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"
SPECIALS = (PAD, UNKNOWN, END)
_CODES = 0x110000  # Unicode code points


@dataclass(frozen=True)
class Characters:
    """A vocabulary: `SPECIALS`, then characters, the most frequent first and equals by code point.

    Args:
        symbols: what each token number stands for.
        length: tokens in a row at most; the last token of a row is always the end.
    """

    symbols: tuple[str, ...]
    length: int

    @classmethod
    def of(cls, texts: Iterable[str], length: int, min_freq: int = 1) -> Characters:
        """The characters that are at least `min_freq` times in the first `length` - 1 characters of the texts.

        Source: the S4 code, src/dataloaders/lra.py (classes IMDB and AAN), with the order of torchtext.
        """
        counts = np.zeros(_CODES, np.int64)
        for text in texts:
            codes, times = np.unique(_codes(text, length - 1), return_counts=True)
            counts[codes] += times
        kept = np.flatnonzero(counts >= max(min_freq, 1))
        kept = kept[np.argsort(-counts[kept], kind="stable")]
        return cls((*SPECIALS, *map(chr, kept)), length)

    def __len__(self) -> int:
        return len(self.symbols)

    def rows(self, texts: Iterable[str]) -> Ragged:
        """The first `length` - 1 characters of each text and the end, as token numbers."""
        dtype = np.uint8 if len(self) <= 256 else np.uint32
        table = np.full(_CODES, SPECIALS.index(UNKNOWN), dtype)
        table[[ord(c) for c in self.symbols[len(SPECIALS) :]]] = np.arange(len(SPECIALS), len(self))
        end = np.array([SPECIALS.index(END)], dtype)
        return Ragged.of([np.append(table[_codes(text, self.length - 1)], end) for text in texts], dtype)


def _codes(text: str, length: int) -> np.ndarray:
    # A half of a pair of surrogates is no character, but a text that was read from a file may hold one.
    return np.frombuffer(text[:length].encode("utf-32-le", "surrogatepass"), np.uint32)
