"""Saved sets come back whole, and a folder that is not whole says so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from statewise.data.labelled import Labelled, Ragged, Split, check, decimated


def _tokens(seed: int, paired: bool = False) -> Split:
    rng = np.random.default_rng(seed)
    rows = [Ragged.of([rng.integers(0, 7, n) for n in (3, 1, 5)]) for _ in range(2)]
    return Split((rows[0], rows[1]) if paired else rows[0], np.array([0, 1, 1]))


def _set(kind: str) -> Labelled:
    if kind == "values":
        raw = np.arange(24, dtype=np.uint8).reshape(3, 4, 2)
        splits = [Split(raw + i, np.array([0, 1, 1])) for i in range(3)]
        return Labelled("demo", *splits, length=4, n_classes=2, mean=0.5, std=2.0, image=(2, 2), settings={"seed": 1})
    splits = [_tokens(i, kind == "pairs") for i in range(3)]
    return Labelled("demo", *splits, length=5, n_classes=2, vocab_size=7, symbols=tuple("abcdefg"))


def _arrays(split: Split) -> list[np.ndarray]:
    parts = split.inputs if isinstance(split.inputs, tuple) else (split.inputs,)
    return [split.labels, *(a for p in parts for a in ([p.flat, p.offsets] if isinstance(p, Ragged) else [p]))]


@pytest.mark.parametrize("kind", ["tokens", "pairs", "values"])
def test_a_saved_set_comes_back(kind, tmp_path):
    made = _set(kind)
    made.save(tmp_path / "set")
    read = Labelled.load(tmp_path / "set", verify=True)
    for name in ("train", "validation", "test"):
        for ours, theirs in zip(_arrays(getattr(made, name)), _arrays(getattr(read, name)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    for name in (
        "length",
        "n_classes",
        "vocab_size",
        "mean",
        "std",
        "image",
        "symbols",
        "settings",
        "channels",
        "paired",
    ):
        assert getattr(made, name) == getattr(read, name)


def test_every_second_value():
    made = _set("values")
    half = decimated(made, 3)
    check(half)
    assert half.length == 2
    assert (half.mean, half.std, half.image) == (made.mean, made.std, None)
    np.testing.assert_array_equal(half.test.inputs, made.test.inputs[:, [0, 3]])
    np.testing.assert_array_equal(half.test.labels, made.test.labels)
    assert decimated(decimated(made, 2), 2).settings["every"] == 4
    assert decimated(made, 1) is made
    with pytest.raises(ValueError, match="demo has tokens"):
        decimated(_set("tokens"), 2)
    with pytest.raises(ValueError, match="got every 5th"):
        decimated(made, 5)


def test_rows_of_a_ragged_array():
    rows = [np.array([1, 2, 3]), np.array([4])]
    ragged = Ragged.of(rows)
    assert len(ragged) == 2
    assert ragged.lengths.tolist() == [3, 1]
    assert [ragged[i].tolist() for i in range(2)] == [[1, 2, 3], [4]]


def test_a_folder_that_is_not_whole(tmp_path):
    with pytest.raises(ValueError, match="no data set here"):
        Labelled.load(tmp_path)
    _set("tokens").save(tmp_path)
    labels = tmp_path / "train_labels.npy"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-8] + (1).to_bytes(8, "little")[::-1])
    with pytest.raises(ValueError, match="checksum"):
        Labelled.load(tmp_path, verify=True)
    labels.write_bytes(whole[:40])
    with pytest.raises(ValueError, match="cannot be read as an array"):
        Labelled.load(tmp_path)
    labels.unlink()
    with pytest.raises(ValueError, match="missing"):
        Labelled.load(tmp_path)


def test_a_card_cannot_name_other_files(tmp_path):
    _set("tokens").save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    card["checksums"]["../secret"] = ""
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="no part of a data set"):
        Labelled.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_classes": 1}, "labels: want 0 to 0"),
        ({"length": 4}, "longer than length = 4"),
        ({"vocab_size": 3}, "want 0 to 2"),
    ],
)
def test_what_does_not_fit(change, message):
    made = _set("tokens")
    with pytest.raises(ValueError, match=message):
        check(Labelled(**{**{k: getattr(made, k) for k in made.__dataclass_fields__}, **change}))
