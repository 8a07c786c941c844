"""Training on Lightning: options, parameter groups, checkpoints without pickle, run directories."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Imported when first named: Lightning takes seconds to import.
_LAZY = {
    "Outcome": "fit",
    "RunDirectory": "directory",
    "Training": "options",
    "TrainingError": "fit",
    "adamw": "groups",
    "load_checkpoint": "checkpoint_io",
    "parameter_groups": "groups",
    "save_checkpoint": "checkpoint_io",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
