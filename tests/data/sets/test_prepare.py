"""A set is made once, however many want it at the same time."""

from __future__ import annotations

import os
import threading
import time

import pytest

from statewise.data import sets
from statewise.testing import toys


@pytest.mark.skipif(os.name != "posix", reason="no file locks on this system")
def test_the_first_of_several_makes_a_set(tmp_path, monkeypatch):
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path))
    makers, found = [], []

    def make(profile, *, progress, **_):
        makers.append(threading.get_ident())
        time.sleep(0.3)  # so that the others come while it is at work
        return toys.tokens()

    monkeypatch.setattr(sets, "get", lambda name: make)
    threads = [threading.Thread(target=lambda: found.append(sets.prepare("listops"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(makers) == 1
    assert [path.name for path in sets.made()] == ["listops-small-0"]


def test_a_set_that_is_being_replaced_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path))
    monkeypatch.setattr(sets, "get", lambda name: lambda *_, **__: toys.tokens())
    sets.prepare("listops")
    there, calls = sets._there, []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise ValueError("half of it is gone")
        return there(*arguments)

    monkeypatch.setattr(sets, "_there", once)
    assert sets.prepare("listops").n_classes == toys.tokens().n_classes
    assert len(calls) == 2
