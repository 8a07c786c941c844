"""States of texts that were read, as files: saved, found by prefix, trimmed, compared, shared between processes."""

from __future__ import annotations

from ._directory import Entry, LeafDifference, StateDirectory, difference
from ._file import Header, StateError, load_context, read_header, read_tensors, save_context
from ._fingerprint import fingerprint
from ._store import StateStore

__all__ = [
    "Entry",
    "Header",
    "LeafDifference",
    "StateDirectory",
    "StateError",
    "StateStore",
    "difference",
    "fingerprint",
    "load_context",
    "read_header",
    "read_tensors",
    "save_context",
]
