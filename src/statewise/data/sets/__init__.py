"""Classification data sets by name: made here, or read from files that the user has.

A maker is `make(profile, *, seed, source, workers, progress) -> Labelled`:
    profile: "small" needs no files of yours (it is drawn here, or a package is fetched) and is made in minutes on two
        cores; "full" is the published size.
    seed: of what is drawn and of the split.
    source: folder or file with the published data, for sets that are read; None where the set makes its own.
    workers: threads to use, 0 for one on each core; the result does not depend on it.
    progress: called as progress(done, total) now and then.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..._files import alone
from ..._names import unknown
from ..labelled import CARD, Labelled
from ._workers import full_only

# Name -> "module:function"; the first line of the function's docstring is its line in `statewise data list`.
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
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statewise" / "data"


def folder_of(name: str, profile: str, seed: int) -> Path:
    """Where a set is kept, whether it has been made or not."""
    return root() / f"{name}-{profile}-{seed}"


def parts(name: str, profile: str, seed: int) -> Path:
    """Where a maker may keep what it has so far, to go on after it was stopped; `prepare` removes it in the end."""
    return root() / f".{name}-{profile}-{seed}.parts"


def prepare(
    name: str,
    profile: str = "small",
    *,
    seed: int = 0,
    source: Path | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    verify: bool = False,
) -> Labelled:
    """The set from `root()`, made and saved there if it is not there yet.

    Args:
        source: your copy of the published data. If what is there was made from something else, it is replaced; without
            a source what is there is taken, whatever it was made from.
        workers: 0 for one on each core, up to 16.
        verify: compare the checksums of a set that is there already.

    Raises:
        ValueError: unknown name or profile, or what the maker says about its source.
    """
    make = get(name)
    if profile not in PROFILES:
        raise ValueError(unknown("profile", profile, PROFILES))
    if seed < 0:
        raise ValueError(f"seed: want 0 or more, got {seed}")
    if source is not None:
        full_only(profile)
    folder = folder_of(name, profile, seed)
    path = None if source is None else str(source.resolve())
    try:
        found = _there(folder, path, verify)
    except (ValueError, OSError):
        found = None  # another process may be putting a new one in its place: the look under the lock decides
    if found is not None:
        return found
    root().mkdir(parents=True, exist_ok=True)
    # Several processes of one run want the set at the same time: the first one makes it.
    with alone(root() / f".{folder.name}.lock"):
        found = _there(folder, path, verify)
        if found is not None:
            return found
        progress = progress or _silent
        progress(0, 1)  # so that a caller knows that something is made
        data = make(profile, seed=seed, source=source, workers=workers, progress=progress)
        if path is not None:
            data = replace(data, settings={**data.settings, "path": path})
        _put(data, folder)
        shutil.rmtree(parts(name, profile, seed), ignore_errors=True)
        return Labelled.load(folder, verify=verify)


def made() -> list[Path]:
    """Folders of the sets in `root()`."""
    return sorted(card.parent for card in root().glob(f"[!.]*/{CARD}"))


def baselines(data: Labelled) -> dict[str, float]:
    """Test accuracy of what a model has to beat: the most frequent label, and what else the set's maker knows."""
    counts = np.bincount(data.train.labels, minlength=data.n_classes)
    most_frequent = float((np.asarray(data.test.labels) == counts.argmax()).mean())
    more = own(data.name, "baselines")
    return {"most frequent label": most_frequent, **(more(data) if more else {})}


def own(name: str, function: str) -> Callable[..., Any] | None:
    """What the module of a set offers besides its maker: `baselines(data)`, or `outline(tokens)` for previews."""
    if name not in _SETS:
        return None
    return getattr(import_module(f"{__name__}.{_SETS[name].split(':')[0]}"), function, None)


# ---- inside ----------------------------------------------------------------------------------------------------------


def _there(folder: Path, path: str | None, verify: bool) -> Labelled | None:
    """The set in a folder, unless it was made from another path than is asked for."""
    if not (folder / CARD).is_file():
        return None
    data = Labelled.load(folder, verify=verify)
    return data if path in (None, data.settings.get("path")) else None


def _put(data: Labelled, folder: Path) -> None:
    """Save under another name first, so that a set is there whole or not at all."""
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    try:
        data.save(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _silent(done: int, total: int) -> None:
    pass
