"""Statewise: every state space sequence model, one contract, on any machine, with no compiler at install."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .interop.checkpoints import load
    from .models import create_model, list_models
    from .ops._deterministic import deterministic
    from .segments import Segments

__all__ = ["Segments", "__version__", "create_model", "deterministic", "list_models", "load"]

# Imported when first named: `statewise --help` should not wait for torch.
_LAZY = {
    "Segments": "segments",
    "create_model": "models",
    "deterministic": "ops._deterministic",
    "list_models": "models",
    "load": "interop.checkpoints",
}
_MODULES = (
    "blocks",
    "inference",
    "interop",
    "maths",
    "mixers",
    "models",
    "ops",
    "recipes",
    "state",
    "testing",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
