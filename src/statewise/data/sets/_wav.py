"""Recordings: 16-bit mono WAV files as arrays."""

from __future__ import annotations

import io
import wave

import numpy as np


def wav(data: bytes, where: str, rate: int) -> np.ndarray:
    """The samples of a WAV file, (n,) int16.

    Args:
        data: the file.
        where: its name, for errors.
        rate: samples a second that it must have.

    Raises:
        ValueError: not a WAV file, cut short, or not 16-bit mono of that rate.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            form = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            frames, samples = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{where}: not a WAV file: {error or 'cut short'}; get it again") from error
    if form != (1, 16, rate):
        channels, bits, got = form
        raise ValueError(
            f"{where}: {channels} channels of {bits} bits at {got} Hz; want 1 of 16 bits at {rate} Hz. Convert it first"
        )
    if len(samples) != 2 * frames:
        raise ValueError(f"{where}: {len(samples)} bytes of samples, but its header says {2 * frames}; get it again")
    return np.frombuffer(samples, "<i2").astype(np.int16)
