"""Discretisations of full matrices against SciPy, against the diagonal rules, and against the continuous system."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import scipy.signal
import torch

from statewise.maths import discretize as diagonal
from statewise.maths import discretize_dense as dense
from statewise.maths import hippo
from statewise.testing import assert_agree

F64 = torch.float64
SCIPY = {"zoh": "zoh", "bilinear": "bilinear", "euler": "euler", "backward_euler": "backward_diff"}


@pytest.mark.parametrize(("rule", "method"), SCIPY.items())
@pytest.mark.parametrize("family", ["legs", "legt", "fout", "lagt"])
@pytest.mark.parametrize("dt", [1e-3, 0.1])
def test_against_scipy(rule, method, family, dt):
    A, B = hippo.system(family, 10)
    want = scipy.signal.cont2discrete((A.numpy(), B[:, None].numpy(), np.eye(10), np.zeros((10, 1))), dt, method)
    A_bar, B_bar = dense.discretize(rule, A, dt, B)
    assert_agree(A_bar, torch.from_numpy(want[0]), "A_bar", 10)
    assert_agree(B_bar, torch.from_numpy(want[1][:, 0]), "B_bar", 10)


@pytest.mark.parametrize("rule", dense.DISCRETIZATIONS)
def test_of_a_diagonal_matrix_they_are_the_diagonal_rules(rule):
    A = torch.complex(-torch.rand(6, dtype=F64), torch.randn(6, dtype=F64))
    B = torch.randn(6, 2, dtype=torch.complex128)
    dt = torch.tensor([[0.1, 0.3, 0.7]], dtype=F64)
    A_bar, B_bar = dense.discretize(rule, torch.diag(A), dt, B)
    assert A_bar.shape == (1, 3, 6, 6)
    assert B_bar.shape == (1, 3, 6, 2)
    log_a, gain = diagonal.discretize(rule, A, dt[..., None])
    assert_agree(A_bar, torch.diag_embed(torch.exp(log_a)), "A_bar", 6)
    assert_agree(B_bar, gain[..., None] * B, "B_bar", 6)


def test_asynchronous():
    A, B = hippo.legs(5)
    since = torch.tensor([0.0, 1.0, 2.5], dtype=F64)
    A_bar, B_bar = dense.asynchronous(A, 0.2, B, elapsed=since)
    plain, held = dense.zoh(A, 0.2, B)
    assert_agree(A_bar[0], torch.eye(5, dtype=F64), "nothing is forgotten at once", 5)
    assert_agree(A_bar[1], plain, "a regular step", 5)
    assert_agree(A_bar[2], torch.linalg.matrix_exp(0.5 * A), "a long one", 5)
    assert_agree(B_bar, held.expand(3, 5), "an event counts as one step", 5)


def test_a_singular_matrix():
    # An integrator: A^-1 does not exist, the held response does.
    A, B = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    A_bar, B_bar = dense.zoh(A, 0.5, B)
    assert_agree(A_bar, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=F64), "A_bar")
    assert_agree(B_bar, torch.tensor([0.125, 0.5], dtype=F64), "B_bar")


ORDERS = {"zoh": 1, "bilinear": 2, "euler": 1, "backward_euler": 1}


@pytest.mark.parametrize(("rule", "order"), ORDERS.items())
def test_order_of_convergence(rule, order):
    A, B = hippo.legs(4)
    u = lambda t: np.sin(3 * t) + 1  # noqa: E731
    solved = scipy.integrate.solve_ivp(
        lambda t, x: A.numpy() @ x + B.numpy() * u(t), (0, 1), np.zeros(4), "DOP853", rtol=1e-12, atol=1e-12
    )
    errors = []
    for steps in (100, 200, 400):
        A_bar, B_bar = dense.discretize(rule, A, 1 / steps, B)
        t = np.arange(steps + 1) / steps
        samples = (u(t[1:]) + u(t[:-1])) / 2 if rule == "bilinear" else u(t[:-1]) if rule == "euler" else u(t[1:])
        x = torch.zeros(4, dtype=F64)
        for sample in samples.tolist():
            x = A_bar @ x + B_bar * sample
        errors.append(np.abs(x.numpy() - solved.y[:, -1]).max())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("rule", dense.DISCRETIZATIONS)
def test_gradients(rule):
    A = torch.randn(3, 3, dtype=F64, requires_grad=True)
    B = torch.randn(3, dtype=F64, requires_grad=True)
    dt = torch.tensor([0.1, 0.2], dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(lambda *t: dense.discretize(rule, *t), (A, dt, B))


def test_errors():
    A, B = hippo.legs(3)
    with pytest.raises(ValueError, match="A: want a square matrix"):
        dense.zoh(B, 0.1, B)
    with pytest.raises(ValueError, match=r"B: want \(N,\) or \(N, M\) with N = 3, got \(2,\)"):
        dense.zoh(A, 0.1, B[:2])
    with pytest.raises(ValueError, match="alpha"):
        dense.gbt(A, 0.1, B, alpha=-0.1)
    with pytest.raises(ValueError, match="did you mean 'bilinear'"):
        dense.discretize("bilinaer", A, 0.1, B)
