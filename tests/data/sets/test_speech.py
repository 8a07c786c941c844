"""Recordings come out sample by sample, in the published splits."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest

from statewise.data import sets
from statewise.data.labelled import check, decimated
from statewise.data.sets import speech
from statewise.data.sets._wav import wav


def make(name, source, profile="full", seed=0):
    data = sets.get(name)(profile, seed=seed, source=source, workers=1, progress=lambda done, total: None)
    check(data)
    return data


def wav_bytes(samples, rate=16000, channels=1, width=2):
    packed = io.BytesIO()
    with wave.open(packed, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, "<i2").tobytes())
    return packed.getvalue()


@pytest.fixture
def commands(tmp_path):
    """Four clips of each word; the third of each is short. The first is for validation, the second for the test."""
    rng = np.random.default_rng(0)
    for i, word in enumerate(speech.WORDS):
        (tmp_path / word).mkdir()
        for clip in range(4):
            samples = rng.integers(-1000, 3001, 9000 if clip == 2 else 16000)
            samples[0] = 10 * i + clip
            (tmp_path / word / f"{clip}.wav").write_bytes(wav_bytes(samples))
    for name, clip in (("validation", 0), ("testing", 1)):
        (tmp_path / f"{name}_list.txt").write_text("".join(f"{word}/{clip}.wav\n" for word in speech.WORDS))
    (tmp_path / "_background_noise_").mkdir()
    return tmp_path


def test_35_words(commands):
    data = make("speech_commands", commands)
    assert (len(speech.WORDS), list(speech.WORDS)) == (35, sorted(set(speech.WORDS)))
    assert data.classes == speech.WORDS
    first = {s: getattr(data, s).inputs[:, 0, 0].tolist() for s in ("train", "validation", "test")}
    assert first["validation"] == [10 * i for i in range(35)]
    assert first["test"] == [10 * i + 1 for i in range(35)]
    assert first["train"] == [10 * i + clip for i in range(35) for clip in (2, 3)]
    assert data.train.labels.tolist() == [i for i in range(35) for _ in range(2)]
    assert (data.train.inputs.dtype, data.length, data.channels) == (np.int16, 16000, 1)
    assert not data.train.inputs[0, 9000:].any()
    assert data.train.inputs[0, 8999]
    # By the training clips, silence included. The division by 32,768 of the published code cancels.
    samples = data.train.inputs.astype(np.float64)
    assert data.mean == pytest.approx(samples.mean())
    assert data.std == pytest.approx(samples.std())


def test_ten_words(commands):
    data = make("speech_commands_10", commands)
    assert data.classes == speech.TEN_WORDS
    parts = [data.train, data.validation, data.test]
    assert sum(map(len, parts)) == 30  # three of each word are whole
    assert sum(np.bincount(p.labels, minlength=10) for p in parts).tolist() == [3] * 10
    with pytest.raises(ValueError, match="want full and a source"):
        make("speech_commands_10", commands, "small")


def test_half_the_rate(commands):
    data = make("speech_commands", commands)
    half = decimated(data, 2)
    check(half)
    assert half.length == 8000
    assert (half.mean, half.std) == (data.mean, data.std)
    np.testing.assert_array_equal(half.test.inputs, data.test.inputs[:, ::2])
    np.testing.assert_array_equal(half.test.labels, data.test.labels)


@pytest.mark.parametrize(
    ("path", "data", "message"),
    [
        ("validation_list.txt", None, "there is no such file"),
        ("testing_list.txt", b"", "no clip is left for test"),
        ("tree/3.wav", b"RIFF", "not a WAV file"),
        ("tree/3.wav", b"text of another kind", "not a WAV file"),
        ("tree/3.wav", wav_bytes([1, 2])[:-2], "not a WAV file|2 bytes of samples, but its header says 4"),
        ("tree/3.wav", wav_bytes([1, 2], rate=8000), "16 bits at 8000 Hz; want 1 of 16 bits at 16000 Hz"),
        ("tree/3.wav", wav_bytes([1, 2], channels=2), "2 channels"),
        ("tree/3.wav", wav_bytes([1, 2], width=1), "8 bits"),
        ("tree/3.wav", wav_bytes(np.ones(16001)), "16001 samples; want up to 16000"),
    ],
)
def test_a_broken_file_is_named(path, data, message, commands):
    (commands / path).write_bytes(data) if data is not None else (commands / path).unlink()
    with pytest.raises(ValueError, match=message) as error:
        make("speech_commands", commands)
    assert path.split("/")[0].removesuffix("ing_list.txt") in str(error.value)


def test_words_that_are_missing(commands):
    for path in (commands / "tree").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"tree: no clips \(\*\.wav\) here"):
        make("speech_commands", commands)
    with pytest.raises(ValueError, match="give the folder of Speech Commands"):
        make("speech_commands", None)


def test_extreme_samples():
    assert wav(wav_bytes([-32768, 0, 32767], 8000), "here", 8000).tolist() == [-32768, 0, 32767]
    assert wav(wav_bytes([], 8000), "here", 8000).shape == (0,)


def test_recordings_are_cut_into_seconds():
    windows = speech._windows(np.arange(1, 20001).astype(np.int16))
    assert windows.shape == (2, 8000)
    assert windows[1, 0] == 8001
    short = speech._windows(np.ones(10, np.int16))
    assert short.shape == (1, 8000)
    assert short.sum() == 10
