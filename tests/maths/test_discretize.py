"""Discretisations against SciPy, against arithmetic of 60 digits, and against the continuous system."""

from __future__ import annotations

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import scipy.signal
import torch

from statewise.maths import discretize as d
from statewise.testing import assert_agree

RULES = tuple(d.DISCRETIZATIONS)


def modes(count: int = 12) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    real = -(10 ** (4 * torch.rand(count, generator=g, dtype=torch.float64) - 3))
    imag = 10 ** (4 * torch.rand(count, generator=g, dtype=torch.float64) - 2)
    return torch.complex(real, imag)


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "euler", "backward_euler"])
@pytest.mark.parametrize("dt", [1e-3, 0.1, 1.0])
def test_against_scipy(rule, dt):
    A = modes()
    log_a, b = d.discretize(rule, A, torch.tensor(dt, dtype=torch.float64))
    for i, z in enumerate(A.numpy()):
        # A complex mode as a real system of two: multiplication by z, driven by the number 1.
        continuous = (
            np.array([[z.real, -z.imag], [z.imag, z.real]]),
            np.array([[1.0], [0.0]]),
            np.eye(2),
            np.zeros((2, 1)),
        )
        a_bar, b_bar, *_ = scipy.signal.cont2discrete(
            continuous, dt, method="backward_diff" if rule == "backward_euler" else rule
        )
        got = torch.stack([torch.view_as_real(torch.exp(log_a[i])), torch.view_as_real(b[i])])
        assert_agree(got[0], torch.from_numpy(a_bar[:, 0]), f"A_bar of {z}")
        assert_agree(got[1], torch.from_numpy(b_bar[:, 0]), f"B_bar of {z}")


def exact(rule: str, z: complex) -> tuple[complex, complex]:
    """log A_bar and B_bar / dt with 60 digits; z = dt A."""
    with mpmath.workdps(60):
        z = mpmath.mpc(z)
        if rule == "zoh":
            return complex(z), complex(mpmath.expm1(z) / z)
        if rule == "bilinear":
            return complex(mpmath.log((1 + z / 2) / (1 - z / 2))), complex(1 / (1 - z / 2))
        if rule == "backward_euler":
            return complex(-mpmath.log(1 - z)), complex(1 / (1 - z))
        return complex(mpmath.log(1 + z)), 1.0


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "euler", "backward_euler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 0.1, 0.499, 0.501, 1.7])
def test_no_digits_are_lost_near_zero(rule, dtype, size):
    angle = torch.linspace(1.6, 4.6, 7, dtype=torch.float64)
    z = torch.polar(torch.full_like(angle, size), angle).to(
        torch.complex64 if dtype == torch.float32 else torch.complex128
    )
    log_a, b = d.discretize(rule, z, torch.ones((), dtype=dtype))
    for i, value in enumerate(z.tolist()):
        want_log, want_b = exact(rule, value)
        unit = torch.finfo(dtype).eps
        # Relative to the modulus: a few roundings, whatever the size of z.
        assert abs(log_a[i].item() - want_log) <= 8 * unit * abs(want_log)
        assert abs(b[i].item() - want_b) <= 8 * unit * abs(want_b)


@pytest.mark.parametrize("rule", ["bilinear", "euler"])
def test_decay_of_a_slow_oscillation_keeps_its_digits(rule):
    # Re log A_bar is far smaller than Im log A_bar; as a part of one complex logarithm it would be lost.
    z = torch.tensor([complex(-1e-9, 1e-2)], dtype=torch.complex128)
    log_a, _ = d.discretize(rule, z, torch.ones((), dtype=torch.float64))
    want, _ = exact(rule, z[0].item())
    unit = torch.finfo(torch.float64).eps
    assert abs(log_a.real.item() - want.real) <= 8 * unit * abs(want.real) * (1e-4 / 1e-9 if rule == "euler" else 1)


@pytest.mark.parametrize("rule", RULES)
def test_real_and_complex_agree(rule):
    A = -torch.tensor([0.0, 1e-6, 0.2, 0.9], dtype=torch.float64)
    dt = torch.tensor(0.7, dtype=torch.float64)
    log_a, b = d.discretize(rule, A, dt)
    clog_a, cb = d.discretize(rule, A.to(torch.complex128), dt)
    assert not log_a.is_complex()
    assert_agree(clog_a, log_a.to(torch.complex128), "log A_bar")
    assert_agree(cb, b.to(torch.complex128), "B_bar")


@pytest.mark.parametrize("rule", ["bilinear", "euler"])
def test_negative_factors_have_a_complex_logarithm(rule):
    A = torch.tensor([-5.0], dtype=torch.complex128)
    log_a, _ = d.discretize(rule, A, torch.ones((), dtype=torch.float64))
    want = {"bilinear": -1.5 / 3.5, "euler": -4.0}[rule]
    assert_agree(torch.exp(log_a), torch.tensor([want], dtype=torch.complex128), "A_bar")
    assert torch.isnan(d.discretize(rule, A.real, torch.ones((), dtype=torch.float64))[0]).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("complex_", [False, True])
def test_gradients_at_and_near_zero(rule, complex_):
    A = torch.tensor([0.0, -1e-7, -0.3, -0.6], dtype=torch.float64)
    if complex_:
        A = torch.complex(A, torch.tensor([0.0, 1e-7, 0.4, -0.5], dtype=torch.float64))
    B = torch.randn(4, dtype=A.dtype)
    dt = torch.tensor([0.1, 1.0, 0.5, 1.1], dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (A, dt, B))
    torch.autograd.gradcheck(lambda *t: d.discretize(rule, *t), inputs)


def test_gradient_of_phi1_keeps_its_digits_in_float32():
    # The derivative is 1/2 + z/3 + ...; formed as (z exp(z) - expm1(z)) / z^2 it would be off by eps / |z|.
    for size in (0.0, 1e-7, 1e-4, 1e-2):
        z = torch.tensor(complex(-size, size), dtype=torch.complex64, requires_grad=True)
        (gradient,) = torch.autograd.grad(d.phi1(z).real, z)
        with mpmath.workdps(40):
            w = mpmath.mpc(z.item())
            want = complex(mpmath.diff(lambda v: mpmath.nsum(lambda k: v**k / mpmath.factorial(k + 1), [0, 30]), w))
        assert abs(gradient.item() - want.conjugate()) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_kernel_converges_to_the_impulse_response(rule):
    # K_l / dt -> 2 Re(C exp(t A) B), with second order if t is taken at the middle of the step that the input fills.
    A = torch.tensor([complex(-0.5, 3.0), complex(-1.0, 7.0)], dtype=torch.complex128)
    C = torch.tensor([complex(0.3, -1.0), complex(1.0, 0.4)], dtype=torch.complex128)

    def error(steps: int) -> float:
        dt = torch.tensor(1.0 / steps, dtype=torch.float64)
        log_a, b = d.discretize(rule, A, dt)
        at = torch.arange(steps, dtype=torch.float64)[:, None]
        kernel = 2 * (C * b * torch.exp(at * log_a)).sum(-1).real / dt
        want = 2 * (C * torch.exp((at + 0.5) * dt * A)).sum(-1).real
        return (kernel - want).abs().max().item()

    assert error(200) / error(400) == pytest.approx(4, rel=0.02)


def test_dirac_adds_impulses_as_they_are():
    A, B = modes(5), torch.randn(5, dtype=torch.complex128)
    log_a, b = d.dirac(A, torch.tensor(0.3, dtype=torch.float64), B)
    assert torch.equal(b, B)
    assert_agree(log_a, 0.3 * A, "log A_bar")


def test_asynchronous_events():
    A, dt, B = modes(5), torch.tensor(0.3, dtype=torch.float64), torch.randn(5, dtype=torch.complex128)
    one = d.asynchronous(A, dt, B, elapsed=torch.ones((), dtype=torch.float64))
    for got, want in zip(one, d.zoh(A, dt, B)):
        assert torch.equal(got, want)
    log_a, b = d.asynchronous(A, dt, B, elapsed=torch.zeros((), dtype=torch.float64))
    assert (log_a == 0).all()  # nothing is forgotten between two events at one time
    assert torch.equal(b, one[1])
    log_a, _ = d.asynchronous(A, dt, B, elapsed=torch.tensor(2.5, dtype=torch.float64))
    assert_agree(log_a, 2.5 * dt * A, "log A_bar")


ORDERS = {"zoh": 1, "bilinear": 2, "euler": 1, "backward_euler": 1}


@pytest.mark.parametrize(("rule", "order"), ORDERS.items())
def test_order_of_convergence(rule, order):
    """The state after one unit of time, driven by a smooth input that is sampled at the end of each step."""
    A = torch.tensor([complex(-0.5, 3.0), complex(-1.0, 0.0), complex(0.0, 2.0)], dtype=torch.complex128)

    def state(steps: int) -> torch.Tensor:
        # bilinear is the trapezoidal rule, which wants the mean of both ends; the others take one end.
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        u = torch.sin(3 * t) + 1
        u = (u[1:] + u[:-1]) / 2 if rule == "bilinear" else u[:-1] if rule == "euler" else u[1:]
        log_a, b = d.discretize(rule, A, torch.tensor(1 / steps, dtype=torch.float64))
        return (torch.exp(torch.arange(steps - 1, -1, -1)[:, None] * log_a) * b * u[:, None]).sum(0)

    # exact: the integral of exp((1 - t) A) (sin(3t) + 1), with sin as two exponentials
    def ramp(w: torch.Tensor) -> torch.Tensor:
        return (torch.exp(w) - torch.exp(A)) / (w - A)

    w = torch.tensor(3j, dtype=torch.complex128)
    want = (ramp(w) - ramp(-w)) / 2j + d.phi1(A)
    errors = [(state(steps) - want).abs().max().item() for steps in (100, 200, 400)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_generalised_bilinear(alpha):
    A, dt = modes(), torch.tensor(0.2, dtype=torch.float64)
    log_a, b = d.gbt(A, dt, alpha=alpha)
    assert_agree(torch.exp(log_a), (1 + (1 - alpha) * dt * A) / (1 - alpha * dt * A), "A_bar")
    assert_agree(b, dt / (1 - alpha * dt * A), "B_bar")
    if alpha >= 0.5:
        assert (log_a.real < 0).all()
        assert (d.gbt(A, 1e4 * dt, alpha=alpha)[0].real < 0).all()
    name = {0.0: "euler", 0.5: "bilinear", 1.0: "backward_euler"}.get(alpha)
    if name:
        assert all(torch.equal(x, y) for x, y in zip((log_a, b), d.discretize(name, A, dt)))
    with pytest.raises(ValueError, match="alpha: want a number in"):
        d.gbt(A, dt, alpha=1.5)


def test_unknown_rule():
    with pytest.raises(ValueError, match="did you mean 'bilinear'"):
        d.discretize("bilinaer", modes(), torch.tensor(0.1))
