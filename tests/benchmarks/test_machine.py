"""What a benchmark and a run say about the machine."""

import os

import pytest

from statewise.benchmarks import machine


@pytest.mark.parametrize(
    ("cores", "load", "threads", "want"),
    [(2, 0.1, 2, None), (2, 1.2, 2, 1), (2, 1.2, 1, None), (2, 7.0, 2, 1), (64, 3.0, 64, None), (64, 40.5, 64, 23)],
)
def test_threads_that_need_not_share_a_core(monkeypatch, cores, load, threads, want):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load), raising=False)
    assert machine.better_threads(threads) == want


def test_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert machine.better_threads(4) is None


def test_memory():
    held = machine.memory()
    assert held is None or 0 < held <= machine.peak_memory()
