"""Limits of arguments."""

from __future__ import annotations

INFINITY = float("inf")


def at_least(name: str, value: float, low: float, high: float = INFINITY) -> None:
    """Raise ValueError naming the argument unless low <= value <= high (so NaN never passes)."""
    if not low <= value <= high:
        limits = f"at least {low}" if high == INFINITY else f"{low} to {high}"
        raise ValueError(f"{name}: want {limits}, got {value}")


def above(name: str, value: float, low: float, high: float = INFINITY) -> None:
    """As `at_least`, but `low` itself is refused."""
    if not low < value <= high:
        limits = f"more than {low}" if high == INFINITY else f"more than {low} and at most {high}"
        raise ValueError(f"{name}: want {limits}, got {value}")
