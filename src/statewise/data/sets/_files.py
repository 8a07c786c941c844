"""Files that a user has: found and read with errors that say what would do."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

# Larger than any file of the published sets.
_LIMIT = 4 << 30


def folder(name: str, source: Path | None, what: str) -> Path:
    """`source`, which must be a folder.

    Raises:
        ValueError: it is not; the message says `what` the set is read from.
    """
    if source is None:
        raise ValueError(f"{name}: source: the full profile is read from files; give {what}")
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{name}: source: {source} is not a folder; want {what}")
    return source


def content(path: Path) -> bytes:
    """All bytes of a file, unpacked if its name ends with .gz.

    Raises:
        ValueError: not there, not readable, cut short, or larger than any published file.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            found = file.read(_LIMIT + 1)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}; get it again") from error
    if len(found) > _LIMIT:
        raise ValueError(f"{path}: larger than {_LIMIT} bytes, which no file of the published sets is")
    return found
