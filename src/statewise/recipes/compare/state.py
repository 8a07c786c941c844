"""How far a run of a comparison is, as its directory tells."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..._files import write_atomically
from ...training.directory import RunDirectory

WAITING, STARTED, FINISHED, DIVERGED = "waiting", "started", "finished", "diverged"
_TAIL = 4096  # bytes at the end of metrics.csv that hold a few rows
_FAILURE = "failed.json"


def write_failure(path: str | os.PathLike, message: str) -> None:
    """Mark a run as diverged. It would diverge again, so it is not tried again."""
    text = json.dumps({"message": message}) + "\n"
    write_atomically(Path(path) / _FAILURE, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: want a JSON object, got a {type(content).__name__}")
    return content


def state_of(path: Path) -> tuple[str, str]:
    """(WAITING, STARTED, FINISHED or DIVERGED; a message if it diverged)."""
    run = RunDirectory(path)
    if (path / _FAILURE).is_file():
        return DIVERGED, str(read_json(path / _FAILURE).get("message", ""))
    if run.card.is_file():  # the last file of a finished run that resuming asks for
        return FINISHED, ""
    return (STARTED if run.metrics.is_file() else WAITING), ""


def last_row(path: Path) -> dict[str, str]:
    """The newest row of metrics.csv, and in it the newest value of every column, from the end of the file alone."""
    try:
        with open(path, "rb") as f:
            head = f.readline().decode().rstrip("\n").split(",")
            f.seek(max(f.seek(0, os.SEEK_END) - _TAIL, len(",".join(head)) + 1))
            lines = f.read().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return {}
    found: dict[str, str] = {}
    for line in lines[:-1]:  # what follows the last line break is a row cut in half
        cells = line.split(",")
        if len(cells) == len(head):  # or the first line is, whose beginning was before the tail
            found |= {k: v for k, v in zip(head, cells) if v}
    return found
