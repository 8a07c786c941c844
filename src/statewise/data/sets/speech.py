"""Raw recordings, one sample a step: spoken words (Speech Commands), and which language is spoken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import archives
from ..labelled import SPLITS, Labelled, Split
from . import _packages
from ._files import content, folder
from ._splits import stratified
from ._wav import wav

Progress = Callable[[int, int], None]

_COMMANDS = "the folder of Speech Commands v0.02, with a folder for each word, validation_list.txt and testing_list.txt"
_RATE = 16000
# fmt: off
WORDS = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy",
    "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop",
    "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)
# fmt: on
TEN_WORDS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes")

_SMALL_RATE = 8000
_WINDOW = 8000  # samples: one second
_QUIET = 0.1  # a window whose deviation is below this share of the median over all windows holds no speech


def speech_commands(profile: str, *, seed: int, source: Path | None, workers: int, progress: Progress) -> Labelled:
    """35 spoken words, 16,000 samples; small is one second of a recorded voice at 8,000 Hz: which of 5 languages?

    Full has the published lists of validation and test clips; shorter clips are followed by silence. Small is a
    stand-in with real recordings: one voice speaks each language, so it asks as much who speaks as what is spoken.
    """
    if profile == "small" and source is None:
        return _languages(seed, progress)
    root = folder("speech_commands", source, _COMMANDS)
    clips = _clips(root, WORDS)
    listed = {name: _listed(root / f"{name}_list.txt") for name in ("validation", "testing")}
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for i, (name, _) in enumerate(clips):
        split = "validation" if name in listed["validation"] else "test" if name in listed["testing"] else "train"
        rows[split].append(i)
    for split, chosen in rows.items():
        if not chosen:
            raise ValueError(f"{root}: no clip is left for {split}; want {_COMMANDS}")
    settings = {"profile": "full", "seed": seed, "source": str(root)}
    return _standardised("speech_commands", _read(root, clips, rows, progress), WORDS, settings, _RATE)


def speech_commands_10(profile: str, *, seed: int, source: Path | None, workers: int, progress: Progress) -> Labelled:
    """Ten of the words of Speech Commands (SC10 of older papers), clips of exactly 16,000 samples; full only.

    70 / 15 / 15 % of each word, drawn here; the papers drew with scikit-learn, so theirs are other clips.
    """
    if profile != "full":
        raise ValueError("speech_commands_10: profile: is read from files only; want full and a source")
    root = folder("speech_commands_10", source, _COMMANDS)
    clips = [(name, label) for name, label in _clips(root, TEN_WORDS) if _is_whole(root / name)]
    if not clips:
        raise ValueError(f"{root}: no clip has exactly {_RATE} samples; want {_COMMANDS}")
    parts = stratified(np.array([label for _, label in clips]), (0.15, 0.15), seed)
    rows = {split: part.tolist() for split, part in zip(SPLITS, parts)}
    settings = {"profile": "full", "seed": seed, "source": str(root)}
    return _standardised("speech_commands_10", _read(root, clips, rows, progress), TEN_WORDS, settings, _RATE)


def _standardised(
    name: str, splits: dict[str, Split], classes: Sequence[str], settings: dict[str, Any], rate: int
) -> Labelled:
    """A set whose values have mean 0 and deviation 1 over all samples of the training split."""
    samples = splits["train"].inputs
    assert isinstance(samples, np.ndarray)
    # In blocks: float64 copies of all clips would not fit. Sums of integers of 16 bits are exact.
    total, squares = 0, 0
    for block in np.array_split(samples, max(1, len(samples) // 256)):
        whole = block.astype(np.int64)
        total, squares = total + int(whole.sum()), squares + int((whole * whole).sum())
    mean = total / samples.size
    std = (squares / samples.size - mean**2) ** 0.5
    if not std:
        raise ValueError(f"{name}: all training clips are silent")
    return Labelled(
        name,
        splits["train"],
        splits["validation"],
        splits["test"],
        length=samples.shape[1],
        n_classes=len(classes),
        mean=mean,
        std=std,
        classes=tuple(classes),
        settings={**settings, "rate": rate},
    )


# ---- full: Speech Commands -----------------------------------------------------------------------------------------


def _clips(root: Path, words: Sequence[str]) -> list[tuple[str, int]]:
    """word/file.wav and the number of the word, in order."""
    clips = []
    for label, word in enumerate(words):
        found = sorted(path.name for path in (root / word).glob("*.wav"))
        if not found:
            raise ValueError(f"{root / word}: no clips (*.wav) here; want {_COMMANDS}")
        clips += [(f"{word}/{name}", label) for name in found]
    return clips


def _listed(path: Path) -> set[str]:
    return set(content(path).decode("utf-8", "replace").split())


def _is_whole(path: Path) -> bool:
    # 44 bytes of header; the files of the set have nothing else in them. `_read` checks what is inside.
    return path.stat().st_size == 44 + 2 * _RATE


def _read(root: Path, clips: list[tuple[str, int]], rows: dict[str, list[int]], progress: Progress) -> dict[str, Split]:
    splits, done = {}, 0
    for split, chosen in rows.items():
        values = np.zeros((len(chosen), _RATE, 1), np.int16)
        for row, i in enumerate(chosen):
            path = root / clips[i][0]
            samples = wav(content(path), str(path), _RATE)
            if len(samples) > _RATE:
                raise ValueError(f"{path}: {len(samples)} samples; want up to {_RATE}, as in all of Speech Commands")
            values[row, : len(samples), 0] = samples
            done += 1
            if done % 1000 == 0 or done == len(clips):
                progress(done, len(clips))
        splits[split] = Split(values, np.array([clips[i][1] for i in chosen], np.int64))
    return splits


# ---- small: which language? ----------------------------------------------------------------------------------------


def _languages(seed: int, progress: Progress) -> Labelled:
    """Windows of one second of the prompts of a telephone exchange; no recording is in two splits."""
    languages = tuple(_packages.VOICES)
    recordings: list[np.ndarray] = []
    labels: list[int] = []
    for label, language in enumerate(languages):
        progress(label, len(languages))
        archive = archives.fetch(_packages.VOICES[language])
        for name, data in sorted(archives.members(archive, "usr/share/asterisk/sounds/*.wav")):
            recordings.append(_windows(wav(data, f"{archive}: {name}", _SMALL_RATE)))
            labels.append(label)
    progress(len(languages), len(languages))
    loud = float(np.median(np.concatenate([r.std(axis=1) for r in recordings]))) * _QUIET
    recordings = [r[r.std(axis=1) > loud] for r in recordings]
    splits = {}
    for split, rows in zip(SPLITS, stratified(np.array(labels), (0.1, 0.2), seed)):
        counts = [len(recordings[i]) for i in rows]
        values = np.concatenate([recordings[i] for i in rows])[..., None]
        splits[split] = Split(values, np.repeat(np.array(labels, np.int64)[rows], counts))
    source = [asdict(package) for package in _packages.VOICES.values()]
    settings = {"profile": "small", "seed": seed, "source": source, "window": _WINDOW, "quiet": _QUIET}
    return _standardised("speech_commands", splits, languages, settings, _SMALL_RATE)


def _windows(samples: np.ndarray) -> np.ndarray:
    """(n, _WINDOW): whole windows, one after the other; a recording shorter than one is followed by silence."""
    n = max(1, len(samples) // _WINDOW)
    padded = np.zeros(n * _WINDOW, np.int16)
    padded[: len(samples)] = samples[: len(padded)]
    return padded.reshape(n, _WINDOW)
