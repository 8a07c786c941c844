"""How an architecture's arguments name mixers and feed-forward parts, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Spec = str | Mapping[str, Any] | None


def spec_list(what: str, given: Spec | Sequence[Spec], n_layer: int) -> list[dict[str, Any] | None]:
    """One {"name": ..., **options}, or None, per layer; a shorter list is a pattern that repeats."""
    return [None if entry is None else _named(what, entry) for entry in _per_layer(what, given, n_layer)]


def _per_layer(what: str, given: Any, n_layer: int) -> list[Any]:
    entries = [given] if given is None or isinstance(given, (str, Mapping)) else list(given)
    if not entries or n_layer % len(entries):
        raise ValueError(
            f"{what}: a list of {len(entries)} {what}s does not divide n_layer = {n_layer}; give one per layer or a "
            "pattern that repeats"
        )
    return entries * (n_layer // len(entries))


def plain(given: Any) -> Any:
    """What JSON can hold, and the caller cannot change any more."""
    if isinstance(given, Mapping):
        return {name: plain(value) for name, value in given.items()}
    return [plain(value) for value in given] if isinstance(given, (list, tuple)) else given


def _named(what: str, entry: Any) -> dict[str, Any]:
    spec = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    if not isinstance(spec.get("name"), str):
        raise ValueError(f"{what}: want a name or a dict with 'name', got {entry!r}")
    return spec
