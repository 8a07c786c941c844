"""Choice of back-end: argument > context > environment > automatic, and never in silence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from statewise.ops import OPS, BackendError, linear_scan, use_backend
from statewise.ops import _backend as B

REASONS = {"triton": "no GPU here", "numba": None, "reference": None}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.setattr(B, "_environment", None)


def test_automatic_takes_the_first_that_can():
    assert B.resolve("op", REASONS) == "numba"
    assert B.resolve("op", {**REASONS, "numba": "float64"}) == "reference"


def test_nothing_can_serve():
    with pytest.raises(BackendError, match="no GPU here"):
        B.resolve("op", {"triton": "no GPU here"})


def test_order_of_precedence(monkeypatch):
    monkeypatch.setattr(B, "_environment", "numba")
    assert B.resolve("op", {"reference": None, "numba": None}) == "numba"
    with use_backend("reference"):
        assert B.resolve("op", REASONS) == "reference"
        assert B.resolve("op", REASONS, "numba") == "numba"
        with use_backend("numba"):
            assert B.resolve("op", REASONS) == "numba"
        assert B.resolve("op", REASONS) == "reference"
    assert B.resolve("op", REASONS) == "numba"


def test_context_ends_with_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert B.resolve("op", REASONS) == "numba"


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_an_explicit_choice_that_cannot_serve_says_why(how, monkeypatch):
    argument = "triton" if how == "argument" else None
    if how == "environment":
        monkeypatch.setattr(B, "_environment", "triton")
    if how == "context":
        monkeypatch.setattr(B, "_forced", "triton")
    with pytest.raises(BackendError, match=r"op: backend 'triton'.*no GPU here"):
        B.resolve("op", REASONS, argument)


def test_an_implementation_that_the_op_does_not_have():
    with pytest.raises(BackendError, match=r"op has no numba implementation .*reference"):
        B.resolve("op", {"reference": None}, "numba")


def test_unknown_names():
    with pytest.raises(ValueError, match="op: backend: want one of triton, numba, reference, got 'cuda'"):
        B.resolve("op", REASONS, "cuda")
    with pytest.raises(ValueError, match="use_backend: want one of"), use_backend("fast"):
        pass


def run(value: str, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "STATEWISE_BACKEND": value}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_environment_is_read_at_import():
    code = "from statewise.ops import _backend as B; print(B.resolve('op', {'numba': None, 'reference': None}))"
    assert run("reference", code).stdout.strip() == "reference"
    assert run("", code).stdout.strip() == "numba"
    assert "STATEWISE_BACKEND: want one of" in run("fast", code).stderr


def test_numba_reasons():
    assert B.numba_reason(torch.zeros(1), None, torch.zeros(1, dtype=torch.bfloat16)) is None
    assert "float64" in str(B.numba_reason(torch.zeros(1, dtype=torch.float64)))
    assert "meta" in str(B.numba_reason(torch.zeros(1, device="meta")))


def test_an_op_obeys():
    a, x = torch.rand(1, 3, 2), torch.rand(1, 3, 2)
    with use_backend("numba"), pytest.raises(BackendError, match="float64"):
        linear_scan(a.double(), x.double())
    with pytest.raises(BackendError, match="triton"):
        linear_scan(a, x, backend="triton")
    torch.testing.assert_close(linear_scan(a, x, backend="reference"), linear_scan(a, x, backend="numba"))


@pytest.mark.parametrize("name", OPS)
def test_reasons_end_with_the_reference(name):
    spec = OPS[name]
    cases = spec.load_cases()
    inputs = cases.sample(
        cases.VARIANTS[0], 1, 4, dtype=torch.float32, decay="mixed", generator=torch.Generator().manual_seed(0)
    )
    reasons = spec.reasons(**inputs)
    assert list(reasons)[-1] == "reference"
    assert set(reasons) <= set(B.BACKENDS)
    assert reasons["reference"] is None
