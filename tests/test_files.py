"""Locks where the file system has none."""

from __future__ import annotations

import errno
import os

import pytest

from statewise._files import NO_LOCKS, alone
from statewise.recipes.compare.pool import Lock

fcntl = pytest.importorskip("fcntl")


def _refuse(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", sorted(set(NO_LOCKS)))
def test_without_locks_nobody_waits(tmp_path, monkeypatch, number):
    _refuse(monkeypatch, number)
    with alone(tmp_path / "lock"):
        pass
    Lock(tmp_path).close()


def test_other_errors_are_told(tmp_path, monkeypatch):
    _refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), alone(tmp_path / "lock"):
        pass
