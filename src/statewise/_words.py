"""What stands in texts for people."""

from __future__ import annotations


def counted(n: int, what: str) -> str:
    """A number of things, such as "1 layer" and "2 layers"."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
