"""The three ways to run a time-invariant system."""

from __future__ import annotations

from ...segments import Segments

ALGORITHMS = ("fft", "chunk", "recurrent")


def check_algorithm(op: str, algorithm: str | None, seg: Segments | None) -> None:
    """Raise ValueError unless `algorithm` is one of them, or None, and can serve `seg`."""
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"{op}: algorithm: want one of {', '.join(ALGORITHMS)} or None, got {algorithm!r}")
    if algorithm == "fft" and seg is not None:
        raise ValueError(
            f"{op}: algorithm: 'fft' is one convolution over the whole row and cannot serve documents, resets or "
            "padding; with seg want 'chunk', 'recurrent' or None, got 'fft'"
        )
