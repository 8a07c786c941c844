"""Text as characters: the vocabulary of the training texts, and texts as rows of token numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..labelled import Labelled, Ragged, Split

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

    def labelled(
        self, name: str, splits: Sequence[Split], classes: tuple[str, ...], settings: dict[str, Any]
    ) -> Labelled:
        """The set of training, validation and test rows made with this vocabulary."""
        train, validation, test = splits
        return Labelled(
            name,
            train,
            validation,
            test,
            length=self.length,
            n_classes=len(classes),
            vocab_size=len(self),
            symbols=self.symbols,
            classes=classes,
            settings=settings,
        )

    def rows(self, texts: Iterable[str]) -> Ragged:
        """The first `length` - 1 characters of each text and the end, as token numbers."""
        dtype = np.uint8 if len(self) <= 256 else np.uint32
        table = np.full(_CODES, SPECIALS.index(UNKNOWN), dtype)
        table[[ord(c) for c in self.symbols[len(SPECIALS) :]]] = np.arange(len(SPECIALS), len(self))
        end = np.array([SPECIALS.index(END)], dtype)
        return Ragged.of([np.append(table[_codes(text, self.length - 1)], end) for text in texts], dtype)


def text_of(data: bytes, length: int) -> str:
    """UTF-8 as characters, of which `length` - 1 are used; what is beyond them need not be decoded."""
    # A character has at most 4 bytes.
    return data[: 4 * length].decode("utf-8", "replace")


def _codes(text: str, length: int) -> np.ndarray:
    # A half of a pair of surrogates is no character, but a text that was read from a file may hold one.
    return np.frombuffer(text[:length].encode("utf-32-le", "surrogatepass"), np.uint32)
