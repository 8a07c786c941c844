"""What every test relies on: fixed seeds, one thread, and a count of what this machine could not run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

# The tensors of the tests are small: a second thread only waits, five times as long where test processes share cores.
# Kernels that split their work over threads are tested with two by test_op_laws.py.
THREADS = 1
torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _steady():
    """The same random numbers whatever ran before, and no test leaves global settings changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    assert after == before, "the test left the default dtype, grad mode or determinism changed"
    assert torch.get_num_threads() == THREADS, "the test left the number of threads changed"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Matrices that are kept on disk go to a folder of this run, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATEWISE_PTD", str(tmp_path_factory.getbasetemp() / "ptd"))
        yield


@pytest.fixture
def split_small(monkeypatch):
    """Kernels spread even tiny work over threads."""
    monkeypatch.setattr("statewise.ops._numba.split_small", True)


def pytest_collection_modifyitems(items):
    """Slow tests first: no process waits at the end for another that has just begun with a long one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter):
    """Skips are never silent: say how many there were, and why."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}", yellow=True)
