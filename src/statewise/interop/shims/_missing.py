"""What a stand-in module says when it is asked for a name that it does not have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any


def missing(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__`: submodules are imported when first named, other names raise an ImportError.

    ImportError and not AttributeError, because `from module import name` would replace the text of the latter. Names
    with two underscores are looked up by Python itself, which expects AttributeError.
    """
    shown = module.partition(".shims.")[2]

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {shown!r} has no attribute {name!r}")
        here = sys.modules[module]
        if hasattr(here, "__path__") and find_spec(f"{module}.{name}") is not None:
            return import_module(f"{module}.{name}")
        offered = list(getattr(here, "__all__", []))
        if hasattr(here, "__path__"):
            offered += [m.name for m in iter_modules(here.__path__) if not m.name.startswith("_")]
        raise ImportError(
            f"Statewise stands in for {shown.partition('.')[0]}, but its {shown} has no {name}; "
            f"it has {', '.join(sorted(offered))}",
            name=shown,
        )

    return __getattr__
