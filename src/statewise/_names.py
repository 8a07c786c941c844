"""Errors for names that do not exist, with the nearest that do."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """A message such as: unknown model 'mambo-130m'; did you mean 'mamba-130m'?"""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = "did you mean " + " or ".join(repr(n) for n in near) if near else "known: " + ", ".join(known)
    return f"unknown {kind} {name!r}; {hint}?" if near else f"unknown {kind} {name!r}; {hint}"


def check_options(what: str, build: Callable, options: dict[str, Any]) -> None:
    """Raise TypeError naming the first option that `build` does not take, with the nearest that it does."""
    accepted = [
        p.name
        for p in inspect.signature(build).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"
    ]
    for name in options:
        if name not in accepted:
            raise TypeError(unknown(f"option of {what}", name, accepted))
