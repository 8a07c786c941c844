"""Living with other libraries: their checkpoints, names and models. Acts on the library from outside."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._accelerate import Acceleration, accelerate, decelerate
    from .shims import Shims, install_shims, uninstall_shims

__all__ = ["Acceleration", "Shims", "accelerate", "decelerate", "install_shims", "uninstall_shims"]

# Imported when first named: most users need one of these only.
_LAZY = {
    "Acceleration": "_accelerate",
    "Shims": "shims",
    "accelerate": "_accelerate",
    "decelerate": "_accelerate",
    "install_shims": "shims",
    "uninstall_shims": "shims",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
