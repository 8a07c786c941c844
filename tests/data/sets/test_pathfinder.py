"""Pathfinder: the label is true of the snakes, pixels alone do not tell it, and stopped work goes on."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import statewise
from statewise.data import sets
from statewise.data.labelled import check
from statewise.data.sets import pathfinder
from statewise.data.sets.pathfinder import draw, make32, style
from statewise.data.sets.pathfinder_files import HARD
from statewise.data.sets.pathfinder_stamps import tables

# What this process imports, other processes import too, with the kernels that it has compiled.
SRC = Path(statewise.__file__).parents[1]


def _silent(done: int, total: int) -> None:
    pass


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.hypot(*np.moveaxis(a - b, -1, 0))


def _label_is_true(size: int, difficulty: str, n: int) -> None:
    how = style(size, difficulty)
    found = draw(n, how, seed=1)
    gap = 2 * max(how.margins) + 3  # rounding of coordinates included
    for i in range(n):
        # On which snake's first and last pixel the markers are; two snakes may end in one pixel.
        origin = (found.dashes[i, :, 0, 0] == found.markers[i, 0]).all(-1)
        terminal = (found.dashes[i, :, -1, 1] == found.markers[i, 1]).all(-1)
        assert origin.any()
        assert (origin & (terminal if found.labels[i] else terminal[::-1])).any()
        # Both snakes hold together: each dash begins where the one before it ended, but for a gap.
        before, after = found.dashes[i, :, :-1, 1], found.dashes[i, :, 1:, 0]
        assert _distance(before, after).max() <= gap
        assert _distance(found.dashes[i, :, :, 0], found.dashes[i, :, :, 1]).max() <= how.dash + 2
        # Markers are as bright as anything but the brightest dashes; all that is lit belongs to a snake or a marker.
        lit = found.images[i] > 60
        y, x = np.argwhere(lit & (found.snakes[i] == 0)).T
        near = [np.hypot(y - m[0], x - m[1]) <= how.marker + 2 for m in found.markers[i]]
        assert (near[0] | near[1]).all()
        assert found.snakes[i].max() == 2 + found.distractors[i]


@pytest.mark.parametrize("difficulty", ["easy", "intermediate", "hard"])
def test_the_label_is_true_of_the_snakes(difficulty):
    _label_is_true(32, difficulty, 64)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_label_is_true_of_the_snakes_of_larger_images(size):
    _label_is_true(size, "hard", 24)


def test_statistics_of_the_published_parameters():
    """Figures of another implementation of the same description: 4.5 of 5 distractors."""
    found = draw(1500, style(32))
    assert found.labels.mean() == pytest.approx(0.5, abs=4 * 0.5 / 1500**0.5)
    assert found.distractors.mean() == pytest.approx(4.5, rel=0.1)
    assert found.distractors.max() == style(32).distractors == 5
    assert (found.images.max((1, 2)) == 255).all()
    assert (found.images.min((1, 2)) == 0).all()


@pytest.mark.slow
def test_path_x_has_nearly_all_its_distractors():
    found = draw(150, style(128))
    assert found.distractors.mean() == pytest.approx(7.8, rel=0.05)
    assert style(128).distractors == 8


def test_the_published_programs_first_dashes():
    """OpenCV's border leaves few angles at a margin of 1, so few distractors find a place; at larger margins all."""
    narrow = style(32)._replace(any_angle=False)
    assert (tables(narrow, 1).solid_counts > 0).mean() < 0.5
    assert draw(200, narrow).distractors.mean() < 3
    wide = style(128)._replace(any_angle=False)
    assert all((tables(wide, margin).solid_counts > 0).all() for margin in wide.margins)


def test_pixels_alone_do_not_tell_the_label():
    """Logistic regression on pixels, by Newton steps with a penalty, stays near chance on images it has not seen."""
    found = draw(3500, style(32), seed=2)
    x = found.images.reshape(3500, -1) / 255.0
    x = np.concatenate([x - x[:2500].mean(0), np.ones((3500, 1))], 1)
    train, test, y = x[:2500], x[2500:], found.labels[:2500]
    w = np.zeros(x.shape[1])
    for _ in range(4):
        p = 1 / (1 + np.exp(-train @ w))
        hessian = (train * (p * (1 - p))[:, None]).T @ train + 10 * np.eye(len(w))
        w -= np.linalg.solve(hessian, train.T @ (p - y) + 10 * w)
    accuracy = ((test @ w > 0) == found.labels[2500:]).mean()
    assert accuracy < 0.57


_DIGEST = """
import hashlib
from statewise.data.sets.pathfinder import draw, style
found = draw(150, style(32), seed=4, workers={workers})
print(hashlib.sha256(b"".join(part.tobytes() for part in found)).hexdigest())
"""


def test_images_depend_on_the_seed_alone():
    found = draw(150, style(32), seed=4, workers=3)
    here = hashlib.sha256(b"".join(part.tobytes() for part in found)).hexdigest()
    environment = {**os.environ, "PYTHONPATH": str(SRC), "PYTHONHASHSEED": "77"}
    code = _DIGEST.format(workers=1)
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert len({image.tobytes() for image in found.images}) == 150
    assert not np.array_equal(draw(1, style(32), seed=5).images, found.images[:1])


def test_styles_that_cannot_be_drawn(monkeypatch):
    with pytest.raises(ValueError, match="want 32, 64, 128, 256, got 48"):
        style(48)
    with pytest.raises(ValueError, match="did you mean 'hard'"):
        style(32, "hart")
    monkeypatch.setattr(pathfinder, "_TRIES", 1000)
    with pytest.raises(ValueError, match="more room"):
        draw(1, style(32)._replace(size=8))


# ---- making ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path / "data"))
    for profile, difficulty in (("small", "easy"), ("full", "hard")):
        monkeypatch.setitem(pathfinder.PROFILES, profile, pathfinder.Size(difficulty, (200, 30, 40)))


def test_a_set_is_made_of_the_images_in_order(tiny):
    data = sets.prepare("pathfinder32", "full", seed=3, workers=2)
    check(data)
    found = draw(270, style(32), seed=3)
    together = [
        np.concatenate([getattr(s, k) for s in (data.train, data.validation, data.test)]) for k in ("inputs", "labels")
    ]
    np.testing.assert_array_equal(together[0].reshape(270, 32, 32), found.images)
    np.testing.assert_array_equal(together[1], found.labels)
    assert not sets.parts("pathfinder32", "full", 3).exists()
    assert (data.mean, data.std, data.image, data.channels) == (0.0, 255.0, (32, 32), 1)


def test_stopped_work_goes_on(tiny, monkeypatch):
    """Stopped after two of five blocks, the rest is drawn the next time, and the set is the same."""

    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= 128:
            raise Stop

    with pytest.raises(Stop):
        sets.prepare("pathfinder32", "full", workers=1, progress=stop)
    assert not sets.made()
    drawn = []
    renderer = pathfinder.renderer

    def watched(how, seed):
        render = renderer(how, seed)

        def one(start, stop):
            drawn.append(start)
            return render(start, stop)

        return one

    monkeypatch.setattr(pathfinder, "renderer", watched)
    data = sets.prepare("pathfinder32", "full", workers=1)
    assert drawn == [128, 192, 256]
    np.testing.assert_array_equal(np.asarray(data.train.inputs).reshape(-1, 32, 32), draw(200, style(32)).images)
    # What was begun with other settings is of no use: it is drawn anew.
    with pytest.raises(Stop):
        sets.prepare("pathfinder32", "full", seed=1, workers=1, progress=stop)
    monkeypatch.setitem(pathfinder.PROFILES, "full", pathfinder.Size("easy", (200, 30, 40)))
    drawn.clear()
    sets.prepare("pathfinder32", "full", seed=1, workers=1)
    assert drawn[0] == 0


# ---- the published folders -------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """30 images in two lists, as published: text in files named .npy, the label in the fourth column."""
    found = draw(30, style(32), seed=9)
    for part in range(2):
        folder = tmp_path / HARD / "imgs" / str(part)
        folder.mkdir(parents=True)
        lines = []
        for i in range(15):
            row = part * 15 + i
            Image.fromarray(found.images[row]).save(folder / f"sample_{i}.png")
            lines.append(f"imgs/{part} sample_{i}.png {i} {found.labels[row]} 1.0 14 4 2 0.5 1 1\n")
        (tmp_path / HARD / "metadata").mkdir(exist_ok=True)
        (tmp_path / HARD / "metadata" / f"{part}.npy").write_text("".join(lines))
    return tmp_path, found


def _read(folder):
    return make32("full", seed=0, source=folder, workers=2, progress=_silent)


def test_the_published_folder_is_read(published):
    import torch

    folder, found = published
    data = _read(folder)
    check(data)
    parts = torch.utils.data.random_split(range(30), [24, 3, 3], generator=torch.Generator().manual_seed(42))
    for split, part in zip((data.train, data.validation, data.test), parts, strict=True):
        rows = list(part)
        np.testing.assert_array_equal(split.labels, found.labels[rows])
        np.testing.assert_array_equal(split.inputs.reshape(-1, 32, 32), found.images[rows])


def test_published_folders_that_are_not_right(published, tmp_path):
    folder, found = published
    with pytest.raises(ValueError, match="--profile full"):
        make32("small", seed=0, source=folder, workers=1, progress=_silent)
    with pytest.raises(ValueError, match=HARD):
        _read(tmp_path / "elsewhere")
    metadata = folder / HARD / "metadata" / "1.npy"
    good = metadata.read_text()
    for line, message in [
        ("imgs/1 sample_0.png 0 2", "line 16: want folder, file, number and a label"),
        ("imgs/1 sample_0.png", "line 16: want folder"),
        ("../../imgs sample_0.png 0 1", "is not inside"),
        ("/etc passwd 0 1", "is not inside"),
        ("imgs/1 sample_99.png 0 1", "cannot be read as a PNG"),
    ]:
        metadata.write_text(good + line + "\n")
        with pytest.raises(ValueError, match=message):
            _read(folder)
    np.save(metadata, found.labels)
    with pytest.raises(ValueError, match=r"another format of \.npy"):
        _read(folder)
    metadata.write_text(good)
    path = folder / HARD / "imgs" / "1" / "sample_0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as a PNG"):
        _read(folder)
    Image.fromarray(found.images[0][:16]).save(path)
    with pytest.raises(ValueError, match="want 32 x 32 pixels, got 32 x 16"):
        _read(folder)
