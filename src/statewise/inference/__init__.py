"""Generation and evaluation with an explicit state."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {"bits_per_token": "evaluate", "generate": "generate", "load_run": "runs", "sample": "generate"}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        # Each name is a function; `generate` hides the module of the same name, which nobody needs.
        return getattr(import_module(f"{__name__}._{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
