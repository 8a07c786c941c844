"""Generation and evaluation with an explicit state."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Name -> the file that has it, without the underscore: names such as `generate` would hide a module.
_PLACES = {
    "Bytes": "text",
    "Context": "reading",
    "DONE": "generation",
    "DraftModel": "speculative",
    "Generation": "generation",
    "Guess": "speculative",
    "NGram": "speculative",
    "Sampling": "sampling",
    "TextGeneration": "text",
    "Vocabulary": "text",
    "bits_per_token": "evaluate",
    "generate": "generation",
    "generate_text": "text",
    "load_run": "runs",
    "min_p": "sampling",
    "read": "reading",
    "repetition_penalty": "sampling",
    "sample": "sampling",
    "temperature": "sampling",
    "tokenizer_for": "text",
    "top_k": "sampling",
    "top_p": "sampling",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name == "store":
        return import_module(f"{__name__}.store")
    if name in _PLACES:
        return getattr(import_module(f"{__name__}._{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
