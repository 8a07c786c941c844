"""Where tables are printed."""

from __future__ import annotations

from typing import Any


def terminal() -> Any:
    """rich's console; into a pipe as wide as it takes, so that a row stays a line for grep."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=200)
