"""`statewise states ACTION ...`: what is in a directory of states, and what can be done with it without a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .actions import Actions, run
from .console import terminal
from .errors import user_errors


def list_states(directory: str) -> int:
    """List the states in a directory, the longest texts last.

    Args:
        directory: of states
    """
    with user_errors():
        store = _directory(directory)
        rows = [(entry, _model(store, entry)) for entry in store.entries()]
    table = _table("key", "tokens", "size", "used", "model")
    for entry, model in rows:
        table.add_row(entry.key[:12], f"{entry.length:,}", _size(entry.bytes), _ago(entry.used), model)
    total = sum(entry.bytes for entry, _ in rows)
    _print(table, f"{len(rows)} states, {_size(total)}")
    return 0


def show(directory: str, key: str) -> int:
    """Show one state: its model, the stored beginnings of its text, and its tensors.

    Args:
        directory: of states
        key: of the state; its first digits will do
    """
    from ..inference.store import read_tensors

    with user_errors():
        store = _directory(directory)
        entry = store.find(key)
        header, tensors = read_tensors(entry.path)
        beginnings = store.prefixes(entry)
    facts = _table("", "", header=False)
    for name, value in [
        ("key", header.key),
        ("tokens", f"{header.length:,}"),
        ("model", f"{header.model}, fingerprint {header.fingerprint[:12]}"),
        ("written", f"{header.created}, statewise {header.statewise}"),
        ("can be trimmed to", ", ".join(f"{e.length:,}" for e in beginnings)),
    ]:
        facts.add_row(name, value)
    table = _table("tensor", "dtype", "shape", "largest")
    for name, t in sorted(tensors.items()):
        largest = f"{float(t.double().abs().max()):.4g}" if t.numel() else ""
        table.add_row(name, str(t.dtype).removeprefix("torch."), str(tuple(t.shape)), largest)
    _print(facts, table)
    return 0


def diff(directory: str, key: str, other: str) -> int:
    """Compare two states: how far their texts agree, and how far each tensor is off.

    Args:
        directory: of states
        key: of the first state; its first digits will do
        other: key of the second
    """
    from ..inference.store import difference

    with user_errors():
        store = _directory(directory)
        first, second = store.find(key), store.find(other)
        common, leaves = difference(first.path, second.path)
    table = _table("tensor", "first", "second", "largest difference", "relative")
    for leaf in leaves:
        shapes = ["missing" if shape is None else str(shape) for shape in leaf.shapes]
        figures = ["", ""] if leaf.largest is None else [f"{leaf.largest:.3g}", f"{leaf.relative:.3g}"]
        table.add_row(leaf.name, *shapes, *figures)
    _print(f"texts of {first.length:,} and {second.length:,} tokens; the first {common:,} are the same", table)
    return 0


def trim(directory: str, key: str, to: int = 0) -> int:
    """Go back: print the key of the longest stored beginning of a text that has at most so many tokens.

    Args:
        directory: of states
        key: of the state; its first digits will do
        to: tokens; 0 for the last one stored before the state itself
    """
    with user_errors():
        store = _directory(directory)
        entry = store.find(key)
        found = store.trim(entry, to or entry.length - 1)
    print(f"{found.key} {found.length}")
    return 0


def fork(directory: str, key: str, out: str) -> int:
    """Copy a state to a file of its own, for `statewise generate --state FILE`.

    Args:
        directory: of states
        key: of the state; its first digits will do
        out: the new file, ending in .safetensors
    """
    with user_errors():
        if not out.endswith(".safetensors"):
            raise ValueError(f"OUT: want a name that ends in .safetensors, got {out}")
        store = _directory(directory)
        header = store.fork(store.find(key), out)
    print(f"{out}: {header.length:,} tokens")
    return 0


def remove(directory: str, key: str) -> int:
    """Remove a state.

    Args:
        directory: of states
        key: of the state; its first digits will do
    """
    with user_errors():
        store = _directory(directory)
        entry = store.find(key)
        store.remove(entry)
    print(f"removed {entry.key[:12]}, {entry.length:,} tokens, {_size(entry.bytes)}")
    return 0


# Action -> (function, what stands after it).
ACTIONS: Actions = {
    "list": (list_states, ["directory"]),
    "show": (show, ["directory", "key"]),
    "diff": (diff, ["directory", "key", "other"]),
    "trim": (trim, ["directory", "key"]),
    "fork": (fork, ["directory", "key", "out"]),
    "remove": (remove, ["directory", "key"]),
}


def main(argv: list[str]) -> int:
    return run("states", ACTIONS, argv)


# ---- inside ----------------------------------------------------------------------------------------------------------


def _directory(path: str) -> Any:
    from ..inference.store import StateDirectory

    if not Path(path).is_dir():
        raise ValueError(f"DIRECTORY: there is no directory {path}")
    return StateDirectory(path)


def _model(store: Any, entry: Any) -> str:
    from ..inference.store import StateError

    try:
        return store.header(entry).model
    except StateError as error:
        return f"damaged: {error}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count:,} bytes"


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def _table(*columns: str, header: bool = True) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=header)
    for name in columns:
        figures = name in ("tokens", "size", "largest", "largest difference", "relative")
        table.add_column(name, justify="right" if figures else "left", overflow="fold")
    return table


def _print(*parts: Any) -> None:
    out = terminal()
    for part in parts:
        out.print(part, highlight=False, markup=False)
