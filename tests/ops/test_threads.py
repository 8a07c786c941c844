"""How kernels spread over threads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from statewise.ops import _numba


@pytest.fixture(params=["PyTorch's team", "a pool"])
def three_threads(request, monkeypatch):
    if request.param == "a pool":
        monkeypatch.setattr(_numba, "_team", None)
    elif _numba._team is None:
        pytest.skip("PyTorch uses no GNU OpenMP here")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_each_range_is_run_once(three_threads):
    seen = []
    _numba.run(lambda start, stop, worker, *args: seen.append((start, stop, worker, args)), 10, "x")
    assert sorted(seen) == [(0, 3, 0, ("x",)), (3, 6, 1, ("x",)), (6, 10, 2, ("x",))]


def test_errors_come_through(three_threads):
    def fail(start, stop, worker):
        raise ZeroDivisionError(worker)

    with pytest.raises(ZeroDivisionError):
        _numba.run(fail, 10)


def test_fewer_blocks_than_threads(three_threads):
    seen = []
    _numba.run(lambda start, stop, worker: seen.append((start, stop)), 2)
    assert sorted(seen) == [(0, 1), (1, 2)]


@pytest.mark.skipif(sys.platform != "linux", reason="wheels for Linux bring GNU OpenMP")
def test_the_team_of_pytorch_is_found():
    if "OpenMP" in torch.__config__.parallel_info() and "libgomp" in Path("/proc/self/maps").read_text():
        assert _numba._team is not None
