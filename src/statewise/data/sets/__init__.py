"""Classification data sets by name: made here, or read from files that the user has.

A maker is `make(profile, *, seed, source, workers, progress) -> Labelled`:
    profile: "small" needs no download and is made in minutes on two cores; "full" is the published size.
    seed: of what is drawn and of the split.
    source: folder or file with the published data, for sets that are read; None where the set makes its own.
    workers: processes to use; the result does not depend on it.
    progress: called as progress(done, total) now and then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ..._names import unknown
from ..labelled import Labelled

# Name -> "module:function"; the first line of the function's docstring is its line in `statewise list`.
_SETS: dict[str, str] = {
    "listops": "listops:make",
    "fashion_mnist": "images:fashion_mnist",
    "permuted_fashion_mnist": "images:permuted_fashion_mnist",
    "bit_reversed_fashion_mnist": "images:bit_reversed_fashion_mnist",
    "mnist": "images:mnist",
    "permuted_mnist": "images:permuted_mnist",
    "bit_reversed_mnist": "images:bit_reversed_mnist",
    "digits": "images:digits",
    "cifar": "cifar:cifar",
    "cifar_grey": "cifar:cifar_grey",
    "pathfinder128": "pathfinder:make128",
    "pathfinder256": "pathfinder:make256",
    "pathfinder32": "pathfinder:make32",
    "pathfinder64": "pathfinder:make64",
    "text": "text:text",
    "retrieval": "retrieval:retrieval",
    "speech_commands": "speech:speech_commands",
    "speech_commands_10": "speech:speech_commands_10",
}
PROFILES = ("small", "full")


def names() -> list[str]:
    return sorted(_SETS)


def get(name: str) -> Callable[..., Labelled]:
    """The maker of a set.

    Raises:
        ValueError: no such set; the message has the nearest names.
    """
    if name not in _SETS:
        raise ValueError(unknown("data set", name, _SETS))
    module, function = _SETS[name].split(":")
    return getattr(import_module(f"{__name__}.{module}"), function)


def root() -> Path:
    """Where made sets are kept: $STATEWISE_DATA, else statewise/data in the user's cache."""
    told = os.environ.get("STATEWISE_DATA")
    if told:
        return Path(told)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "statewise" / "data"


def parts(name: str, profile: str, seed: int) -> Path:
    """Where a maker may keep what it has so far, to go on after it was stopped; `prepare` removes it in the end."""
    return root() / f".{name}-{profile}-{seed}.parts"


def prepare(
    name: str,
    profile: str = "small",
    *,
    seed: int = 0,
    source: Path | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Labelled:
    """The set from `root()`, made and saved there if it is not there yet.

    Raises:
        ValueError: unknown name or profile, or what the maker says about its source.
    """
    make = get(name)
    if profile not in PROFILES:
        raise ValueError(unknown("profile", profile, PROFILES))
    folder = root() / f"{name}-{profile}-{seed}"
    if (folder / "card.json").is_file():
        return Labelled.load(folder)
    data = make(profile, seed=seed, source=source, workers=workers, progress=progress or _silent)
    data.save(folder)
    return Labelled.load(folder)


def _silent(done: int, total: int) -> None:
    pass
