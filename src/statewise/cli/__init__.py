"""The command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

from .main import entry, main

__all__ = ["entry", "main"]
