"""A directory of states, one immutable file each. No model is needed to look after it.

Files are named by their content, `LENGTH-KEY.safetensors`, written beside their place and renamed, and never changed.
So any number of processes may use one directory without locks: writers of one text write the same, a reader keeps the
file it has opened, and a file that another process has removed is simply not there. The time of a file's last change
is used as that of its last use.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..._files import write_atomically
from ._file import Header, StateError, prefix_keys, read_header, read_tensors

_NAME = re.compile(r"(\d{12})-([0-9a-f]{64})\.safetensors")
_STALE = 3600.0  # seconds after which a half-written file belongs to a process that is gone


class Entry(NamedTuple):
    """One stored state: what its name and the file system tell, without opening it."""

    path: Path
    key: str
    length: int
    bytes: int
    used: float  # seconds since 1970


@dataclass(frozen=True)
class LeafDifference:
    """One leaf of two states.

    Args:
        name: e.g. "state.layers.0.ssm".
        shapes: in the first and in the second; None where it is missing.
        largest: largest |a - b|; None where the shapes differ.
        relative: that over the largest |a|; 0 where both are zero.
    """

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    largest: float | None
    relative: float | None


class StateDirectory:
    """The states in a directory.

    Args:
        path: made when something is stored.

    Raises:
        ValueError: `path` is a file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{path}: want a directory of states, got a file")

    def place(self, length: int, key: str) -> Path:
        return self.path / f"{length:012d}-{key}.safetensors"

    def entry(self, path: Path) -> Entry:
        """The entry of a file by its name.

        Raises:
            FileNotFoundError: it is not there (any more).
        """
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"path: want LENGTH-KEY.safetensors, got {path.name}")
        facts = path.stat()
        return Entry(path, match[2], int(match[1]), facts.st_size, facts.st_mtime)

    def entries(self) -> list[Entry]:
        """All states, the shortest text first."""
        found = []
        for name in os.listdir(self.path) if self.path.is_dir() else []:
            if _NAME.fullmatch(name):
                with suppress(FileNotFoundError):  # removed by another process since
                    found.append(self.entry(self.path / name))
        return sorted(found, key=lambda e: (e.length, e.key))

    def find(self, key: str) -> Entry:
        """The state whose key begins so.

        Raises:
            StateError: none, or several.
        """
        found = [entry for entry in self.entries() if entry.key.startswith(key.lower())]
        if len(found) == 1:
            return found[0]
        if not found:
            raise StateError(f"{self.path}: holds no state with a key that begins with {key!r}")
        raise StateError(f"{self.path}: {len(found)} states have keys that begin with {key!r}; want more digits")

    def header(self, entry: Entry) -> Header:
        header = read_header(entry.path)
        if (header.key, header.length) != (entry.key, entry.length):
            raise StateError(f"{entry.path}: the name is not that of its content")
        return header

    def prefixes(self, entry: Entry) -> list[Entry]:
        """Stored states of beginnings of the same text under the same model, shortest first, itself included."""
        header, tensors = read_tensors(entry.path)
        shorter = [e for e in self.entries() if e.length <= entry.length]
        keys = prefix_keys(header.fingerprint, tensors["tokens"], {e.length for e in shorter})
        return [e for e in shorter if keys[e.length] == e.key]

    def trim(self, entry: Entry, length: int) -> Entry:
        """The longest stored beginning of at most `length` tokens: a recurrent state cannot be run backwards, so it
        goes back to where it was stored.

        Raises:
            StateError: there is none; the message says where there are some.
        """
        known = self.prefixes(entry)
        fits = [e for e in known if e.length <= length]
        if not fits:
            at = ", ".join(f"{e.length:,}" for e in known)
            raise StateError(
                f"{entry.path.name}: no beginning of at most {length:,} tokens is stored; there are states at {at}"
            )
        return fits[-1]

    def fork(self, entry: Entry, path: str | os.PathLike) -> Header:
        """Copy a state to a file of its own, which may then go another way.

        Raises:
            FileExistsError: `path` exists; it is not written over.
        """
        header, target = self.header(entry), Path(path)
        if target.exists():
            raise FileExistsError(f"{target}: exists already and is not written over")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda temporary: shutil.copyfile(entry.path, temporary))
        return header

    def remove(self, entry: Entry) -> bool:
        """Whether it was still there. Who has loaded the state keeps it."""
        try:
            entry.path.unlink()
        except FileNotFoundError:
            return False
        return True

    def touch(self, entry: Entry) -> None:
        """Note that it is used."""
        with suppress(FileNotFoundError):
            os.utime(entry.path)

    def make_room(self, budget: int, keep: Path) -> list[Entry]:
        """Remove what was not used for longest until all takes at most `budget` bytes; `keep` stays. Returns what
        went. Leftovers of writers that were killed go too."""
        for item in self.path.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - item.stat().st_mtime > _STALE:
                    item.unlink()
        entries = sorted(self.entries(), key=lambda e: e.used)
        total, gone = sum(e.bytes for e in entries), []
        for entry in entries:
            if total <= budget:
                break
            if entry.path != keep and self.remove(entry):
                gone.append(entry)
                total -= entry.bytes
        return gone


def difference(first: str | os.PathLike, second: str | os.PathLike) -> tuple[int, list[LeafDifference]]:
    """Compare two state files: (tokens that both texts begin with, every leaf of the states)."""
    (_, a), (_, b) = read_tensors(first), read_tensors(second)
    x, y = a.pop("tokens"), b.pop("tokens")
    least = min(len(x), len(y))
    differs = (x[:least] != y[:least]).nonzero()
    common = int(differs[0]) if len(differs) else least
    leaves = []
    for name in sorted(a.keys() | b.keys()):
        s, t = a.get(name), b.get(name)
        largest = relative = None
        if s is not None and t is not None and s.shape == t.shape:
            wide = torch.complex128 if s.is_complex() or t.is_complex() else torch.float64
            gap = (s.to(wide) - t.to(wide)).abs()
            largest = float(gap.max()) if gap.numel() else 0.0
            scale = float(s.to(wide).abs().max()) if s.numel() else 0.0
            relative = largest / scale if scale else (0.0 if largest == 0 else float("inf"))
        shapes = (None if s is None else tuple(s.shape), None if t is None else tuple(t.shape))
        leaves.append(LeafDifference(name, shapes, largest, relative))
    return common, leaves
