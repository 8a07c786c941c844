"""How kernels spread over threads."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from statewise.ops import _numba


@_numba.kernel
def _note(start, stop, worker, seen):
    seen[worker, 0] += 1
    seen[worker, 1], seen[worker, 2] = start, stop


@_numba.kernel
def _fail(start, stop, worker, seen):
    if worker == seen.shape[0] - 1:
        raise ZeroDivisionError


@pytest.fixture(params=["PyTorch's team", "a pool"])
def three_threads(request, monkeypatch):
    if request.param == "a pool":
        monkeypatch.setattr(_numba, "_team", 0)
    elif not _numba._team:
        pytest.skip("PyTorch uses no GNU OpenMP here")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("blocks", "ranges"), [(10, [(0, 3), (3, 6), (6, 10)]), (2, [(0, 1), (1, 2)]), (1, [(0, 1)])])
def test_each_range_is_run_once(blocks, ranges, three_threads):
    seen = np.zeros((3, 3), np.int64)
    _numba.run(_note, blocks, seen)
    assert seen.tolist() == [[1, *r] for r in ranges] + [[0, 0, 0]] * (3 - len(ranges))


def test_errors_come_through(three_threads):
    with pytest.raises((ZeroDivisionError, RuntimeError), match=r"_fail failed|^$"):
        _numba.run(_fail, 10, np.zeros((3, 3), np.int64))


def test_from_several_threads_of_python(three_threads):
    wrong = []

    def work():
        for _ in range(100):
            seen = np.zeros((3, 3), np.int64)
            _numba.run(_note, 10, seen)
            if seen.tolist() != [[1, 0, 3], [1, 3, 6], [1, 6, 10]]:
                wrong.append(seen)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(sys.platform != "linux", reason="wheels for Linux bring GNU OpenMP")
def test_the_team_of_pytorch_is_found():
    if "OpenMP" in torch.__config__.parallel_info() and "libgomp" in Path("/proc/self/maps").read_text():
        assert _numba._team
