"""What a sequence classifier must beat: simple rules that know nothing of order, or only the first element."""

from __future__ import annotations

import numpy as np

from .labelled import Labelled, Ragged, Split

# The closed form of the linear baseline holds a matrix of this many columns squared; longer rows are left out.
MAX_FEATURES = 3072
# What the first token of a row is, in sets where it is more than that.
FIRST = {"listops": "root operator"}
# Rows that the linear baseline learns from.
MAX_ROWS = 20_000


def label_baselines(data: Labelled) -> dict[str, float]:
    """Share of right labels on the test split, each rule learned from the training split.

    "majority": the most frequent label. On tokens: "first token" (of ListOps it is called what it is, "root operator"),
    the most frequent label after it; and "unigram", naive Bayes on how often each token stands in a row. On values:
    "linear", least squares on all values of a row at once.
    """
    train, test = data.train, data.test
    if not len(test):
        return {}
    found = {"majority": float((test.labels == np.bincount(train.labels, minlength=data.n_classes).argmax()).mean())}
    if isinstance(train.inputs, Ragged) and data.vocab_size is not None:
        found[FIRST.get(data.name, "first token")] = _first_token(train, test, data.n_classes, data.vocab_size)
        found["unigram"] = _unigram(train, test, data.n_classes, data.vocab_size)
    elif isinstance(train.inputs, np.ndarray) and np.prod(train.inputs.shape[1:]) <= MAX_FEATURES:
        found["linear"] = _linear(train, test, data)
    return found


def _first(split: Split) -> np.ndarray:
    return np.asarray(split.inputs.flat[split.inputs.offsets[:-1]], np.int64)  # type: ignore[union-attr]


def _first_token(train: Split, test: Split, classes: int, vocab: int) -> float:
    counts = np.zeros((vocab, classes), np.int64)
    np.add.at(counts, (_first(train), train.labels), 1)
    return float((counts.argmax(1)[_first(test)] == test.labels).mean())


def _histograms(split: Split, vocab: int) -> np.ndarray:
    rows: Ragged = split.inputs  # type: ignore[assignment]
    where = np.repeat(np.arange(len(rows)), rows.lengths) * vocab + rows.flat
    return np.bincount(where, minlength=len(rows) * vocab).reshape(len(rows), vocab).astype(np.float64)


def _unigram(train: Split, test: Split, classes: int, vocab: int) -> float:
    counts = _histograms(train, vocab)
    per_class = np.stack([counts[train.labels == c].sum(0) for c in range(classes)]) + 1  # add-one smoothing
    tokens = np.log(per_class / per_class.sum(1, keepdims=True))
    prior = np.log(np.bincount(train.labels, minlength=classes) + 1.0)
    return float(((_histograms(test, vocab) @ tokens.T + prior).argmax(1) == test.labels).mean())


def _linear(train: Split, test: Split, data: Labelled) -> float:
    def rows(split: Split, most: int) -> np.ndarray:
        x = (np.asarray(split.inputs[:most], np.float32) - data.mean) / data.std  # type: ignore[index]
        return np.concatenate([x.reshape(len(x), -1), np.ones((len(x), 1), np.float32)], 1)

    x = rows(train, MAX_ROWS)
    wanted = np.eye(data.n_classes, dtype=np.float32)[train.labels[:MAX_ROWS]]
    square = x.T @ x
    # A small ridge: pixels at the border are the same in every picture.
    square[np.diag_indices_from(square)] += 1e-3 * len(x)
    weights = np.linalg.solve(square, x.T @ wanted)
    return float(((rows(test, len(test)) @ weights).argmax(1) == test.labels).mean())
