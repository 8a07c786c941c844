"""Errors that end the program with one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """What was asked cannot be done; the message names the argument, what was got and what would do."""


class Interrupted(Exception):
    """Stopped by a signal in good order; the message says how to go on."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.code = 128 + signal


def check_folder(option: str, out: str) -> None:
    """Raise UserError unless there is a directory for the file `out`; to be asked before the work is done."""
    if not Path(out).parent.is_dir():
        raise UserError(f"{option}: there is no directory {Path(out).parent}")
    if Path(out).is_dir():
        raise UserError(f"{option}: want a file name, got the directory {out}")


@contextmanager
def user_errors() -> Iterator[None]:
    """For the part of a command that reads options and files and builds models: what the library refuses there is a
    mistake in what was asked. Errors in training and evaluation proper keep their traceback: they are ours."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
