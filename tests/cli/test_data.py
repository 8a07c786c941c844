"""`statewise data`: make, list, info and preview, on small sets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from statewise.cli import main
from statewise.data import sets
from statewise.data.labelled import Labelled, Ragged, Split
from statewise.data.preview import preview
from statewise.data.sets import listops, pathfinder


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(listops.PROFILES, "small", listops.Size(listops.Grammar(20, 60), (300, 20, 30), 60))
    monkeypatch.setitem(pathfinder.PROFILES, "small", pathfinder.Size("easy", (60, 10, 20)))


@pytest.fixture
def run(capsys):
    def _run(*arguments, code=0):
        capsys.readouterr()
        assert main(["data", *map(str, arguments)]) == code
        out, err = capsys.readouterr()
        if code:
            assert err.startswith("statewise: error: ")
            assert err.count("\n") == 1
        return err if code else out

    return _run


def test_make_info_and_list(run, tmp_path):
    assert "made here" in run("list")
    assert "small-0" not in run("list")
    out = run("make", "listops", "--workers", 2)
    assert "300 / 20 / 30" in out
    assert "root operator" in out
    assert "it was there already, all checksums agree" in run("make", "listops", "--verify")
    run("make", "pathfinder32", "--seed", 4)
    out = run("info")
    assert "listops-small-0" in out
    assert "pathfinder32-small-4" in out
    assert "pictures of 32 x 32" in run("info", "pathfinder32")
    assert "max_depth=10" in run("info", "listops", "--verify")
    line = next(line for line in run("list").split("\n") if line.startswith("listops "))
    assert line.rstrip().endswith("small-0")
    labels = tmp_path / "data" / "listops-small-0" / "train_labels.npy"
    labels.write_bytes(labels.read_bytes()[:-8] + b"\x01" + bytes(7))
    assert "checksum" in run("make", "listops", "--verify", code=2)


def test_mistakes_are_one_line(run, tmp_path):
    assert "did you mean 'listops'" in run("make", "listop", code=2)
    assert "want small|full" in run("make", "listops", "--profile", "tiny", code=2)
    assert "there is no /nowhere" in run("make", "listops", "--source", "/nowhere", code=2)
    assert "workers: want at least 1" in run("make", "listops", "--workers", "-1", code=2)
    assert "statewise data make listops" in run("info", "listops", code=2)
    assert "NAME is missing" in run("make", code=2)
    assert "did you mean 'make'" in run("mak", code=2)
    assert "did you mean 'listops'" in run("preview", "listop", code=2)
    assert "--out: there is no directory" in run("preview", "listops", "--out", tmp_path / "no" / "x.png", code=2)
    assert "ends in .png" in run("preview", "listops", "--out", tmp_path / "x.jpg", code=2)
    assert "--profile full" in run("preview", "listops", "--profile", "full", "--out", tmp_path / "x.png", code=2)


def test_another_source_replaces_the_set(run, tmp_path, monkeypatch):
    """A set made from a copy of the published files stays until another source is named."""
    source = tmp_path / "published"
    source.mkdir()
    for name in ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"):
        (source / name).write_text("Source\tTarget\n[MAX 3 5 ]\t5\n")
    monkeypatch.setitem(listops.PROFILES, "full", listops.PROFILES["small"])
    assert "300 / 20 / 30" in run("make", "listops", "--profile", "full")
    assert "1 / 1 / 1" in run("make", "listops", "--profile", "full", "--source", source)
    assert "already" in run("make", "listops", "--profile", "full", "--source", source)
    assert "1 / 1 / 1" in run("make", "listops", "--profile", "full")
    (tmp_path / "other").mkdir()
    assert "basic_train.tsv is missing" in run(
        "make", "listops", "--profile", "full", "--source", tmp_path / "other", code=2
    )
    assert len(sets.prepare("listops", "full").train) == 1  # what failed has removed nothing
    assert not [p for p in (tmp_path / "data").glob(".*") if p.suffix != ".lock"]


def test_a_preview_shows_the_images(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("preview", "pathfinder32", "--rows", 4).strip() == "pathfinder32.png"
    out = tmp_path / "p.png"
    assert run("preview", "pathfinder32", "--out", out, "--rows", 4).strip() == str(out)
    assert out.read_bytes() == (tmp_path / "pathfinder32.png").read_bytes()
    picture = np.asarray(Image.open(out).convert("L"))
    data = sets.prepare("pathfinder32")
    first = np.flatnonzero(np.asarray(data.train.labels) == 0)[0]
    values = np.asarray(data.train.inputs[first]).reshape(32, 32)
    # The first axes: find the black square, and compare its reduced pixels with the image.
    dark = picture < 250
    rows = np.flatnonzero(dark[:, : picture.shape[1] // 4].mean(1) > 0.5)
    columns = np.flatnonzero(dark[rows[0] : rows[-1], : picture.shape[1] // 4].mean(0) > 0.5)
    square = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    middle = (np.arange(32) + 0.5) / 32
    seen = square[np.ix_((middle * len(square)).astype(int), (middle * square.shape[1]).astype(int))]
    assert np.corrcoef(seen.reshape(-1), values.reshape(-1))[0, 1] > 0.95


def _set(kind: str) -> Labelled:
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 1, 0])
    bytes_ = Ragged.of([np.frombuffer(b"two words, $5 and \x00 more ", np.uint8)] * 4)
    letters = Ragged.of([rng.integers(0, 4, 300) for _ in range(4)])
    options = {
        "bytes": (bytes_, {"vocab_size": 256, "length": 300}),
        "pairs": ((bytes_, letters), {"vocab_size": 256, "length": 300}),
        "letters": (letters, {"vocab_size": 4, "length": 300, "symbols": ("<pad>", "a", "b", " ")}),
        "curves": (rng.normal(size=(4, 50, 2)), {"length": 50}),
        "colours": (rng.integers(0, 256, (4, 16, 3), np.uint8), {"length": 16, "image": (4, 4)}),
    }
    inputs, more = options[kind]
    split = Split(inputs, labels)
    return Labelled("demo", split, split, split, n_classes=2, classes=("no", "yes"), **more)


@pytest.mark.parametrize("kind", ["bytes", "pairs", "letters", "curves", "colours"])
def test_every_kind_of_input_can_be_drawn(kind, tmp_path):
    path = tmp_path / "p.png"
    preview(_set(kind), path, rows=3)
    picture = np.asarray(Image.open(path).convert("L"))
    assert (picture < 128).mean() > 0.002
    with pytest.raises(ValueError, match="rows: want 1 to 100"):
        preview(_set(kind), path, rows=0)
