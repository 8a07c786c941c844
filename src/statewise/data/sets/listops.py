"""ListOps: nested lists of digits under MIN, MAX, MED and SM (sum modulo 10); the label is the value.

Grammar and limits are those of Long Range Arena (Tay et al. 2020, arXiv:2011.04006). The published sample cannot be
drawn again: its order came from the hash seed of one Python process. Any seed here is another draw of the same
distribution.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..labelled import SPLITS, Labelled, Ragged, Split
from ._workers import blocks, full_only

# The vocabulary of the S4 paper: no parentheses, three special tokens first. The ids are those of listops_numba.py.
SYMBOLS = ("<pad>", "<unk>", "<eos>", "]", *"0123456789", "[MIN", "[MAX", "[MED", "[SM")
EOS = SYMBOLS.index("<eos>")
_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
_FIRST_OPERATOR = _IDS["[MIN"]
_BLOCK = 256
_FILES = dict(zip(SPLITS, ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")))


class Grammar(NamedTuple):
    """Which expressions are drawn: min_length < tokens < max_length; an operator has 2 to max_args arguments."""

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10


class Size(NamedTuple):
    grammar: Grammar
    rows: tuple[int, int, int]
    length: int


PROFILES = {
    # Short enough that a model leaves the root-operator baseline behind in minutes on a CPU.
    "small": Size(Grammar(50, 200), (40_000, 2_000, 2_000), 200),
    "full": Size(Grammar(), (96_000, 2_000, 2_000), 2048),
}


def make(
    profile: str, *, seed: int, source: Path | None, workers: int, progress: Callable[[int, int], None]
) -> Labelled:
    """Values of nested lists of digits: hierarchy, at 50 to 200 (small) or 500 to 2000 tokens (full).

    Args:
        source: folder with the published basic_train.tsv, basic_val.tsv and basic_test.tsv.

    Raises:
        ValueError: a file is missing, a line is no expression, or its label is not its value.
    """
    if source is not None:
        full_only(profile)
        return _read(source, progress)
    size = PROFILES[profile]
    total = sum(size.rows)
    tokens, labels = generate(total, seed=seed, grammar=size.grammar, workers=workers, progress=progress)
    ends = np.cumsum(size.rows)
    splits = [_part(tokens, labels, int(end) - rows, int(end)) for rows, end in zip(size.rows, ends)]
    settings = {"profile": profile, "seed": seed, "rows": list(size.rows), **size.grammar._asdict()}
    return _labelled(splits, size.length, settings)


def generate(
    n: int,
    *,
    seed: int = 0,
    grammar: Grammar = PROFILES["full"].grammar,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Ragged, np.ndarray]:
    """n different expressions, each with eos at its end, and their values (n,) int64, 0 to 9.

    Raises:
        ValueError: the grammar has hardly so many expressions.
    """
    from . import listops_numba as kernel

    _check(grammar)

    def draw(start: int, stop: int) -> tuple[list[np.ndarray], np.ndarray]:
        tokens = np.empty((stop - start, grammar.max_length - 1), np.uint8)
        lengths, values = np.empty((2, stop - start), np.int64)
        kernel.draw(seed, start, *grammar, tokens, lengths, values)
        return [np.append(row[:length], np.uint8(EOS)) for row, length in zip(tokens, lengths)], values

    rows: list[np.ndarray] = []
    labels: list[int] = []
    seen: set[bytes] = set()
    drawn = 0
    # Candidate i is a function of (seed, i), and the first of equal ones is kept: so workers cannot change the result.
    while len(rows) < n:
        if drawn >= 20 * n + 10 * _BLOCK:
            raise ValueError(
                f"listops: {drawn} draws gave {len(rows)} different expressions; want {n}: widen {grammar}"
            )
        count = max(n - len(rows), _BLOCK)
        for some, values in blocks(draw, drawn, count, _BLOCK, workers):
            for row, value in zip(some, values):
                digest = blake2b(row.tobytes(), digest_size=16).digest()
                if digest not in seen and len(rows) < n:
                    seen.add(digest)
                    rows.append(row)
                    labels.append(int(value))
            if progress:
                progress(len(rows), n)
        drawn += count
    return Ragged.of(rows), np.array(labels, np.int64)


def encode(text: str) -> np.ndarray:
    """Tokens (L,) uint8 of an expression such as "[MED 1 2 [SM 9 9 ] ]", with or without parentheses, without eos.

    Raises:
        ValueError: a word that is no symbol.
    """
    try:
        return np.array([_IDS[word] for word in text.translate({40: None, 41: None}).split()], np.uint8)
    except KeyError as error:
        raise ValueError(f"no symbol of ListOps: {error.args[0]!r}; want {' '.join(SYMBOLS[3:])}") from None


def value(expression: str | np.ndarray) -> int:
    """The value of an expression: text, or tokens with or without eos.

    Raises:
        ValueError: not an expression.
    """
    tokens = encode(expression) if isinstance(expression, str) else expression
    tokens = tokens[:-1] if len(tokens) and tokens[-1] == EOS else tokens
    found = int(_values(Ragged.of([tokens]))[0])
    if found < 0:
        raise ValueError(f"not a whole expression: {' '.join(SYMBOLS[t] for t in tokens[:40])}")
    return found


def baselines(data: Labelled) -> dict[str, float]:
    """Test accuracy of the most frequent label given the root operator alone: what a weak model reaches."""
    train, test = (_roots(split) for split in (data.train, data.test))
    count = np.zeros((len(SYMBOLS), data.n_classes), np.int64)
    np.add.at(count, (train, np.asarray(data.train.labels)), 1)
    return {"root operator": float((count.argmax(1)[test] == data.test.labels).mean())}


def outline(tokens: np.ndarray, width: int = 60) -> list[str]:
    """An expression as indented lines. What fits into `width` stands on one line, and so do digits side by side."""
    words = [SYMBOLS[t] for t in tokens if t != EOS]
    ends, still_open = list(range(len(words))), []
    for i, word in enumerate(words):
        if word.startswith("["):
            still_open.append(i)
        elif word == "]" and still_open:
            ends[still_open.pop()] = i
    lines: list[str] = []
    digits = False  # the last line may take one more digit
    i = depth = 0
    while i < len(words):
        whole = " ".join(words[i : ends[i] + 1])
        depth -= words[i] == "]"
        fits = 2 * depth + len(whole) <= width
        if digits and whole.isdigit() and len(lines[-1]) + 2 <= width:
            lines[-1] += f" {whole}"
        else:
            lines.append("  " * depth + (whole if fits else words[i]))
        digits = whole.isdigit()
        depth += ends[i] > i and not fits
        i = ends[i] + 1 if fits else i + 1
    return lines


# ---- inside ----------------------------------------------------------------------------------------------------------


def _check(grammar: Grammar) -> None:
    low, high, depth, args = grammar
    if not 0 <= low < high - 1 or depth < 1 or args < 2:
        raise ValueError(
            f"grammar: want 0 <= min_length < max_length - 1, max_depth >= 1, max_args >= 2, got {grammar}"
        )
    longest = 1
    for _ in range(depth - 1):
        longest = min(2 + args * longest, high)
    if longest <= low:
        raise ValueError(f"grammar: none of its expressions has more than min_length = {low} tokens, got {grammar}")


def _roots(split: Split) -> Any:
    assert isinstance(split.inputs, Ragged)
    return np.asarray(split.inputs.flat)[split.inputs.offsets[:-1]]


def _values(rows: Ragged) -> np.ndarray:
    from . import listops_numba as kernel

    out = np.empty(len(rows), np.int64)
    kernel.values(rows.flat, rows.offsets, out)
    return out


def _part(tokens: Ragged, labels: np.ndarray, start: int, stop: int) -> Split:
    offsets = tokens.offsets[start : stop + 1]
    return Split(Ragged(tokens.flat[offsets[0] : offsets[-1]], offsets - offsets[0]), labels[start:stop])


def _labelled(splits: Iterable[Split], length: int, settings: dict[str, Any]) -> Labelled:
    train, validation, test = splits
    return Labelled(
        "listops",
        train,
        validation,
        test,
        length=length,
        n_classes=10,
        vocab_size=len(SYMBOLS),
        symbols=SYMBOLS,
        classes=tuple("0123456789"),
        settings=settings,
    )


def _read(folder: Path, progress: Callable[[int, int], None]) -> Labelled:
    paths = [folder / name for name in _FILES.values()]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"source: {path} is missing; want a folder with {', '.join(_FILES.values())}")
    splits = []
    for i, path in enumerate(paths):
        progress(i, len(paths))
        splits.append(_read_file(path))
    progress(len(paths), len(paths))
    return _labelled(splits, PROFILES["full"].length, {"files": [path.name for path in paths]})


def _lines(path: Path) -> Iterator[list[str]]:
    """Cells of each line, so far as the file is text in lines of bounded length."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t")
        try:
            yield from lines
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {lines.line_num}: cannot be read: {error}") from error


def _read_file(path: Path) -> Split:
    rows, labels = [], []
    lines = _lines(path)
    if next(lines, None) != ["Source", "Target"]:
        raise ValueError(f"{path}: want a first line with Source and Target")
    for number, line in enumerate(lines, 2):
        if len(line) != 2 or line[1] not in _IDS or not line[1].isdigit():
            raise ValueError(f"{path}, line {number}: want an expression, a tab and a digit")
        try:
            rows.append(encode(line[0]))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        labels.append(int(line[1]))
    found, told = _values(Ragged.of(rows)), np.array(labels, np.int64)
    wrong = np.flatnonzero(found != told)
    if len(wrong):
        number, worth = wrong[0] + 2, found[wrong[0]]
        what = f"the value is {worth}, the label {told[wrong[0]]}" if worth >= 0 else "not a whole expression"
        raise ValueError(f"{path}, line {number}: {what}")
    longest = PROFILES["full"].length - 1
    return Split(Ragged.of([np.append(row[:longest], np.uint8(EOS)) for row in rows]), told)
