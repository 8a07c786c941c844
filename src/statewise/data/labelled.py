"""Labelled sequences: what a classification data set is, whoever made it. NumPy only.

A data set is three splits of (inputs, labels). Inputs are tokens of different lengths (`Ragged`), pairs of these, or an
array of values (n, L, C). On the disk it is a folder of .npy files beside card.json, which has the settings it was made
with and a checksum for each file; arrays are mapped, and of values nothing is read, so a large set of pictures opens
at once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .._files import write_atomically

SPLITS = ("train", "validation", "test")
CARD = "card.json"


@dataclass(frozen=True)
class Ragged:
    """Token sequences of different lengths, end to end: row i is flat[offsets[i] : offsets[i + 1]].

    Args:
        flat: all tokens, an integer array of any width.
        offsets: (n + 1,) int64, ascending from 0 to len(flat).
    """

    flat: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: list[np.ndarray], dtype: Any = np.uint8) -> Ragged:
        """The given rows, put end to end."""
        lengths = np.array([0, *map(len, rows)], np.int64)
        flat = np.concatenate(rows).astype(dtype) if rows else np.zeros(0, dtype)
        return cls(flat, lengths.cumsum())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Args:
        inputs: `Ragged` tokens; two of them, row by row, for a task on pairs; or values (n, L, C).
        labels: (n,) int64, 0 to n_classes - 1.
    """

    inputs: Ragged | tuple[Ragged, Ragged] | np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Labelled:
    """A classification data set.

    Args:
        name: as in `statewise data make NAME`.
        length: no row is longer.
        n_classes: number of labels.
        vocab_size: number of tokens; None where inputs are values.
        mean, std: a value enters the model as (raw - mean) / std; of no meaning for tokens.
        image: (height, width) where a row is a picture, row by row; for previews.
        symbols: what each token stands for, for previews; may be empty (bytes).
        classes: what each label stands for; may be empty.
        settings: all that the set was made with (profile, seed, sizes, sources); equal settings make equal sets.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    length: int
    n_classes: int
    vocab_size: int | None = None
    mean: float = 0.0
    std: float = 1.0
    image: tuple[int, int] | None = None
    symbols: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Values per position; 0 where inputs are tokens."""
        inputs = self.train.inputs
        return inputs.shape[-1] if isinstance(inputs, np.ndarray) else 0

    @property
    def paired(self) -> bool:
        return isinstance(self.train.inputs, tuple)

    def save(self, folder: Path) -> None:
        """Write all of it into `folder`; card.json last, so a folder with a card is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        sums = {}
        for key, array in _arrays(self).items():
            path = folder / f"{key}.npy"
            write_atomically(path, partial(_write, array))
            sums[key] = checksum(path)
        told = {k: v for k, v in _fields(self).items() if k not in SPLITS}
        text = json.dumps({**told, "checksums": sums}, indent=2) + "\n"
        write_atomically(folder / CARD, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path, *, verify: bool = False) -> Labelled:
        """Open what `save` wrote.

        Args:
            verify: read every file and compare its checksum.

        Raises:
            ValueError: not such a folder, a file is missing, changed or of the wrong shape.
        """
        card = _read_card(folder)
        sums = card.pop("checksums")
        arrays = {}
        for key, expected in sums.items():
            if not isinstance(key, str) or key not in _KEYS:
                raise ValueError(f"{folder / CARD}: checksums: {key!r} is no part of a data set")
            path = folder / f"{key}.npy"
            if not path.is_file():
                raise ValueError(f"{folder}: {path.name} is missing; remove {folder} and make the data again")
            if verify and checksum(path) != expected:
                raise ValueError(
                    f"{path}: not the file that was written (its checksum differs); "
                    f"remove {folder} and make the data again"
                )
            try:
                arrays[key] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(f"{path}: cannot be read as an array: {error}") from error
        try:
            splits = {split: _split(arrays, split) for split in SPLITS}
            data = cls(**{**card, **splits})
            check(data)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}: not a whole data set: {error}; remove {folder} and make the data again"
            ) from error
        return data


def decimated(data: Labelled, every: int) -> Labelled:
    """Every second, third, ... value of each row, from the first on: what a slower clock would have recorded.

    Args:
        data: a set of values (n, L, C), which are not copied.
        every: 1 to L.

    Raises:
        ValueError: its rows are tokens, or shorter than `every`.
    """
    if not data.channels:
        raise ValueError(f"rate: {data.name} has tokens; another rate is for values, such as those of speech_commands")
    if not 1 <= every <= data.length:
        raise ValueError(f"rate: want every 1st to {data.length}th value of a row of {data.name}, got every {every}th")
    if every == 1:
        return data
    splits: dict[str, Any] = {}
    for name in SPLITS:
        rows: Split = getattr(data, name)
        assert isinstance(rows.inputs, np.ndarray)
        splits[name] = Split(rows.inputs[:, ::every], rows.labels)
    every_in_all = every * data.settings.get("every", 1)
    return replace(
        data, length=-(-data.length // every), image=None, settings={**data.settings, "every": every_in_all}, **splits
    )


_PARTS = ("labels", "values", "flat", "offsets", "first_flat", "first_offsets", "second_flat", "second_offsets")
_KEYS = {f"{split}_{part}" for split in SPLITS for part in _PARTS}


def _fields(data: Labelled) -> dict[str, Any]:
    return {name: getattr(data, name) for name in data.__dataclass_fields__}


def check(data: Labelled) -> None:
    """Raise ValueError unless shapes, lengths, labels and token ids are what the set says."""
    for name in SPLITS:
        split: Split = getattr(data, name)
        if split.labels.ndim != 1 or split.labels.dtype.kind not in "iu":
            raise ValueError(f"{name}: labels: want (n,) integers, got {split.labels.dtype} {split.labels.shape}")
        if len(split) and not 0 <= int(split.labels.min()) <= int(split.labels.max()) < data.n_classes:
            raise ValueError(f"{name}: labels: want 0 to {data.n_classes - 1}")
        inputs = split.inputs if isinstance(split.inputs, tuple) else (split.inputs,)
        for rows in inputs:
            if len(rows) != len(split):
                raise ValueError(f"{name}: {len(rows)} rows of inputs for {len(split)} labels")
            if isinstance(rows, Ragged):
                _check_tokens(name, rows, data)
            elif rows.ndim != 3 or rows.shape[1] > data.length:
                raise ValueError(f"{name}: values: want (n, L, C) with L up to {data.length}, got {rows.shape}")


def _check_tokens(name: str, rows: Ragged, data: Labelled) -> None:
    if rows.flat.dtype.kind not in "iu" or data.vocab_size is None:
        raise ValueError(f"{name}: tokens: want integers and a vocab_size, got {rows.flat.dtype}, {data.vocab_size}")
    lengths = rows.lengths
    if rows.offsets[0] != 0 or rows.offsets[-1] != len(rows.flat) or (lengths < 1).any():
        raise ValueError(f"{name}: tokens: offsets do not cut them into rows of at least one token")
    if len(lengths) and int(lengths.max()) > data.length:
        raise ValueError(f"{name}: tokens: a row of {lengths.max()} is longer than length = {data.length}")
    if len(rows.flat) and not 0 <= int(rows.flat.min()) <= int(rows.flat.max()) < data.vocab_size:
        raise ValueError(f"{name}: tokens: want 0 to {data.vocab_size - 1}")


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


def _write(array: np.ndarray, path: str) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _arrays(data: Labelled) -> dict[str, np.ndarray]:
    found = {}
    for name in SPLITS:
        split: Split = getattr(data, name)
        found[f"{name}_labels"] = split.labels
        if isinstance(split.inputs, np.ndarray):
            found[f"{name}_values"] = split.inputs
        elif isinstance(split.inputs, Ragged):
            found[f"{name}_flat"], found[f"{name}_offsets"] = split.inputs.flat, split.inputs.offsets
        else:
            for which, rows in zip(("first", "second"), split.inputs):
                found[f"{name}_{which}_flat"], found[f"{name}_{which}_offsets"] = rows.flat, rows.offsets
    return found


def _split(arrays: dict[str, np.ndarray], name: str) -> Split:
    def ragged(prefix: str) -> Ragged:
        return Ragged(arrays[f"{prefix}_flat"], arrays[f"{prefix}_offsets"])

    inputs: Any
    if f"{name}_values" in arrays:
        inputs = arrays[f"{name}_values"]
    elif f"{name}_flat" in arrays:
        inputs = ragged(name)
    else:
        inputs = (ragged(f"{name}_first"), ragged(f"{name}_second"))
    return Split(inputs, arrays[f"{name}_labels"])


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: no data set here (no {CARD})") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CARD}: cannot be read: {error}") from error
    wanted = {name for name in Labelled.__dataclass_fields__ if name not in SPLITS} | {"checksums"}
    if not isinstance(card, dict) or set(card) != wanted or not isinstance(card["checksums"], dict):
        raise ValueError(f"{folder / CARD}: want exactly {', '.join(sorted(wanted))}")
    card["image"] = None if card["image"] is None else tuple(card["image"])
    card["symbols"], card["classes"] = tuple(card["symbols"]), tuple(card["classes"])
    return card
