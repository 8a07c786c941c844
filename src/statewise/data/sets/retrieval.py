"""Pairs of long texts, one character a step: do they belong together (the retrieval task of the Long Range Arena)?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import archives
from ..labelled import SPLITS, Labelled, Split
from . import _packages
from ._characters import Characters, text_of
from ._files import folder

Progress = Callable[[int, int], None]

_AAN = "the folder with new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv"
_AAN_FILES = {"train": "train", "validation": "eval", "test": "test"}
_AAN_LENGTH = 4000
_PASSAGE = 1000  # characters
_YEARS = 100  # between two addresses that do not belong together
_PAIRS = {"train": 6000, "validation": 500, "test": 1000}
_SHARES = (0.7, 0.8)  # of the addresses: training up to the first, validation up to the second


class Pair(NamedTuple):
    first: str
    second: str
    label: int  # 1: together


def retrieval(profile: str, *, seed: int, source: Path | None, workers: int, progress: Progress) -> Labelled:
    """Two papers, up to 4,000 characters each: related or not (AAN, LRA); small is passages of presidents' addresses.

    Small: two passages of 1,000 characters, from one address to the Congress or from two that are a hundred years apart
    or more. No address is in two splits.
    """
    if profile == "full":
        return _papers(folder("retrieval", source, _AAN), seed, progress)
    if source is not None:
        raise ValueError("retrieval: source: the small profile comes from a package; leave source out, or choose full")
    return _addresses(seed)


def _labelled(pairs: Mapping[str, Callable[[], Iterable[Pair]]], length: int, settings: dict[str, Any]) -> Labelled:
    """Encode pairs with the characters of the training pairs. They are read twice or more, so that they need not be
    kept: the published texts are some gigabytes.
    """
    characters = Characters.of(chain.from_iterable((pair.first, pair.second) for pair in pairs["train"]()), length)
    splits = []
    for split in SPLITS:
        first = characters.rows(pair.first for pair in pairs[split]())
        second = characters.rows(pair.second for pair in pairs[split]())
        splits.append(Split((first, second), np.array([pair.label for pair in pairs[split]()], np.int64)))
    return characters.labelled("retrieval", splits, ("apart", "together"), settings)


# ---- full: AAN -----------------------------------------------------------------------------------------------------


def _papers(root: Path, seed: int, progress: Progress) -> Labelled:
    paths = {split: root / f"new_aan_pairs.{name}.tsv" for split, name in _AAN_FILES.items()}
    for path in paths.values():
        if not path.is_file():
            raise ValueError(f"{root}: has no {path.name}; want {_AAN}")
    pairs = {split: partial(_pairs_of_papers, path, progress) for split, path in paths.items()}
    return _labelled(pairs, _AAN_LENGTH, {"profile": "full", "seed": seed, "source": str(root)})


def _pairs_of_papers(path: Path, progress: Progress) -> Iterator[Pair]:
    """Lines of label, two names, two texts, separated by tabs; quotation marks are characters like others."""
    size, done = path.stat().st_size, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip(b"\r\n").split(b"\t")
            if len(cells) != 5 or cells[0] not in (b"0", b"1", b"0.0", b"1.0"):
                raise ValueError(
                    f"{path}: line {number}: {len(cells)} cells, the first {cells[0][:20]!r}; want 5 cells "
                    "separated by tabs (label 0 or 1, two names, two texts)"
                )
            first, second = (text_of(cell, _AAN_LENGTH) for cell in cells[3:])
            yield Pair(first, second, int(float(cells[0])))
            done += len(line)
            if number % 1000 == 0:
                progress(done, size)
    if not done:
        raise ValueError(f"{path}: is empty; want {_AAN}")


# ---- small: addresses of the presidents to the Congress ------------------------------------------------------------


def _addresses(seed: int) -> Labelled:
    package = _packages.ADDRESSES
    files = sorted(archives.read(archives.fetch(package), "package/data/*.json").items())
    addresses = [json.loads(data) for _, data in files]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(addresses))
    cuts = [0, *(round(share * len(order)) for share in _SHARES), len(order)]
    made = {}
    for split, start, stop in zip(SPLITS, cuts, cuts[1:]):
        made[split] = _draw([addresses[i] for i in order[start:stop]], _PAIRS[split], rng)
    settings = {"profile": "small", "seed": seed, "source": asdict(package), "pairs": _PAIRS, "years": _YEARS}
    return _labelled({split: partial(iter, pairs) for split, pairs in made.items()}, _PASSAGE + 1, settings)


def _passages(text: str) -> list[str]:
    """Whole passages that do not overlap, without the salutation, which is the same in many addresses."""
    return [text[i : i + _PASSAGE] for i in range(_PASSAGE // 2, len(text) - _PASSAGE + 1, _PASSAGE)]


def _draw(addresses: list[dict[str, Any]], n: int, rng: np.random.Generator) -> list[Pair]:
    """`n` different pairs, every second of them of one address.

    A pair that belongs together starts from a passage of one that does not, so that passages of all years are as
    frequent in both: neither passage alone tells anything about the label.
    """
    passages, address, year = [], [], []
    for i, whole in enumerate(addresses):
        cut = _passages(whole["text"])
        passages += cut
        address += [i] * len(cut)
        year += [whole["year"]] * len(cut)
    of, years = np.array(address), np.array(year)
    seen: set[tuple[int, int]] = set()
    pairs: list[Pair] = []
    for _ in range(100 * n):
        if len(pairs) == n:
            return pairs
        first = int(rng.integers(len(passages)))
        far = np.flatnonzero(np.abs(years - years[first]) >= _YEARS)
        if not len(far):
            continue
        first, second = rng.permutation([first, int(rng.choice(far))]).tolist()
        label = len(pairs) % 2
        if label:
            second = int(rng.choice(np.flatnonzero(of == of[first])))
        if second != first and (first, second) not in seen:
            seen.add((first, second))
            pairs.append(Pair(passages[first], passages[second], label))
    raise ValueError(
        f"retrieval: {len(addresses)} addresses do not give {n} pairs; want some that are {_YEARS} years apart"
    )
