"""Documents as bytes, and their split into a training and a held-out part. Plain Python and NumPy only."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

PYTHON_DOCS = "Python's own documentation (pydoc_data.topics)"


@dataclass(frozen=True)
class TextOptions:
    """Which text, and how it is cut up.

    Args:
        path: a text file, a directory or a quoted glob pattern (one document per file); Python's own documentation
            if not given
        held_out: share of the bytes, taken from the end, that is kept for validation
        packed: fill rows with whole documents that do not see each other, instead of windows over the joined text
    """

    path: str | None = None
    held_out: float = 0.1
    packed: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out: want a share between 0 and 1, got {self.held_out}")


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents. The held-out part is the end of the joined text.

    Args:
        name: where the text came from, for reports.
        train, held_out: documents in order; joined they give the whole text.
    """

    name: str
    train: list[bytes]
    held_out: list[bytes]


def python_docs() -> list[bytes]:
    """One document per topic of `help()`. The text differs a little between Python versions."""
    from pydoc_data import topics

    return [text.encode() for text in topics.topics.values()]


def _files(path: str) -> list[Path]:
    found = Path(path)
    if found.is_dir():
        files = sorted(p for p in found.rglob("*") if p.is_file() and not p.name.startswith("."))
        if not files:
            raise ValueError(f"data.path: the directory {path} holds no files; want text files in it")
        return files
    if found.exists():
        return [found]
    if glob.has_magic(path):
        files = sorted(Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not files:
            raise ValueError(f"data.path: no file matches {path}")
        return files
    raise ValueError(f"data.path: there is no file or directory {path}; want a text file, a directory or a glob")


def read_documents(path: str) -> list[bytes]:
    """The files at `path` (a file, a directory, or a glob pattern), in order of name, as bytes.

    Raises:
        ValueError: nothing there, not readable, or no bytes in it. The message names the argument `data.path`.
    """
    documents = []
    for file in _files(path):
        try:
            documents.append(file.read_bytes())
        except OSError as error:
            raise ValueError(f"data.path: cannot read {file}: {error.strerror or error}") from error
    documents = [d for d in documents if d]
    if not documents:
        raise ValueError(f"data.path: {path} is empty (0 bytes); want a text of some kilobytes at least")
    return documents


def split(documents: list[bytes], held_out: float) -> tuple[list[bytes], list[bytes]]:
    """Cut the joined text so that its last `held_out` share is held out; the document at the cut is cut in two."""
    keep = round(sum(map(len, documents)) * (1 - held_out))
    train, rest = [], []
    for document in documents:
        if keep > 0:
            train.append(document[:keep])
        if len(document) > keep:
            rest.append(document[max(keep, 0) :])
        keep -= len(document)
    return train, rest


def load_corpus(options: TextOptions) -> Corpus:
    documents = python_docs() if options.path is None else read_documents(options.path)
    train, rest = split(documents, options.held_out)
    return Corpus(PYTHON_DOCS if options.path is None else options.path, train, rest)
