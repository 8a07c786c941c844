"""Memory of results that are gone is used again, and never while something still refers to it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from statewise.ops import _memory, short_conv
from statewise.testing.poison import poisoned_empty

MB = 1 << 20


@pytest.fixture(autouse=True)
def recycler(monkeypatch):
    made = _memory.Recycler(64 * MB)
    monkeypatch.setattr(_memory, "_recycler", made)
    return made


def _large(dtype=torch.float32):
    return _memory.empty(2, 3, MB, dtype=dtype)


def test_memory_is_used_again(recycler):
    t = _large()
    where = t.data_ptr()
    assert t.shape == (2, 3, MB)
    assert t.is_contiguous()
    assert t._base is None
    del t
    assert recycler.held == 24 * MB
    again = _large()
    assert again.data_ptr() == where
    assert recycler.held == 0
    assert _large().data_ptr() != where


@pytest.mark.parametrize("keeper", [lambda t: t[1, 2, 5:6], lambda t: t.numpy()[:, :1], lambda t: t.untyped_storage()])
def test_whatever_refers_to_it_keeps_it(keeper, recycler):
    t = _large()
    kept = keeper(t)
    del t
    assert recycler.held == 0
    del kept
    assert recycler.held == 24 * MB


def test_a_graph_keeps_it(recycler):
    w = torch.ones(1, requires_grad=True)
    y = (_large().fill_(2.0) * w).sum()
    assert recycler.held == 0
    y.backward()
    assert recycler.held == 24 * MB
    assert w.grad is not None
    assert w.grad.item() == 12 * MB


def test_no_more_than_the_limit_is_kept(recycler):
    recycler.limit = 50 * MB
    many = [_large() for _ in range(3)]
    kept = {t.data_ptr() for t in many[1:]}
    while many:
        many.pop(0)
    assert recycler.held == 48 * MB
    assert {_large().data_ptr() for _ in range(2)} <= kept
    recycler.clear()
    assert recycler.held == 0


def test_small_results_are_left_to_the_library(recycler):
    t = _memory.empty(100)
    del t
    assert recycler.held == 0
    assert _memory.empty(0, 5).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float64])
def test_dtypes(dtype):
    t = _large(dtype)
    assert t.dtype == dtype
    assert (t.fill_(1) == 1).all()


def test_poison_reaches_it():
    with poisoned_empty():
        assert _large().isnan().all()


def test_results_of_ops_do_not_share(recycler):
    x, w = torch.randn(1, 1024, 2048), torch.randn(2048, 4)
    first, _ = short_conv(x, w, backend="numba")
    kept = first.clone()
    second, _ = short_conv(2 * x, w, backend="numba")
    assert torch.equal(first, kept)
    assert first.data_ptr() != second.data_ptr()


def test_from_several_threads():
    wrong = []

    def work(value):
        for _ in range(30):
            t = _memory.empty(5 * MB, dtype=torch.uint8).fill_(value)
            if not bool((t == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_process(recycler):
    t = _large().fill_(3.0)
    free = _large()
    del free
    child = os.fork()
    if child == 0:
        ok = bool((t == 3).all()) and _memory._recycler.held == 0 and _large().shape == t.shape
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(("told", "limit"), [("0", 0), ("12", 12 * MB)])
def test_the_environment_says_how_much(told, limit, monkeypatch):
    monkeypatch.setenv("STATEWISE_KEEP_MB", told)
    assert _memory._limit() == limit


def test_an_environment_that_cannot_be_read():
    result = subprocess.run(
        [sys.executable, "-c", "import statewise.ops._memory"],
        env={**os.environ, "STATEWISE_KEEP_MB": "-1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "STATEWISE_KEEP_MB: want a number of megabytes, got '-1'" in result.stderr
