"""Data modules, readers of text, and generated probes. The batch of a step is a pure function of (seed, step)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Readers need no torch, data modules need Lightning: each is imported when it is asked for.
_PLACES = {
    "Batch": "steps",
    "ByteData": "language",
    "Corpus": "text",
    "IGNORE": "steps",
    "MQARData": "probes",
    "SelectiveCopyingData": "probes",
    "StepData": "steps",
    "TextOptions": "text",
    "baselines": "baselines",
    "load_corpus": "text",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module = import_module(f"{__name__}.{_PLACES[name]}")
        return module if name == "baselines" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
