"""Transfer functions, and what they say about diagonal forms of HiPPO: weak and strong agreement, and the bounds."""

from __future__ import annotations

import math

import pytest
import torch

from statewise.maths import hippo, ptd, transfer
from statewise.maths.discretize_dense import zoh
from statewise.testing import assert_agree

F64 = torch.float64


def test_it_is_the_transform_of_the_impulse_response():
    A, B = hippo.legs(4)
    C = torch.randn(4, dtype=F64)
    t = (torch.arange(60_000, dtype=F64) + 0.5) * 5e-4
    step = torch.linalg.matrix_exp(5e-4 * A)
    x, kernel = torch.linalg.matrix_exp(2.5e-4 * A) @ B, []
    for _ in t:
        kernel.append(C @ x)
        x = step @ x
    omega = torch.tensor([0.0, 1.0, 7.0], dtype=F64)
    want = (torch.stack(kernel) * torch.exp(-1j * omega[:, None] * t)).sum(-1) * 5e-4
    got = transfer.transfer(A, B, C, omega)
    # The midpoint rule is second order: (step * fastest rate)^2 / 24.
    assert (got - want).abs().max() < (5e-4 * 11) ** 2 / 24 * got.abs().max() * 10


@pytest.mark.parametrize("family", ["legs", "fout"])
def test_modes_and_matrix_agree(family):
    A, B = hippo.system(family, 6)
    C, omega = torch.randn(6, dtype=F64), torch.linspace(0.1, 30, 300, dtype=F64)  # FouT has an eigenvalue 0
    found = ptd.modes(A)
    half = found.weight / 2
    got = transfer.diagonal_transfer(found.Lambda, half * (found.V_inv @ (B + 0j)), (C + 0j) @ found.V, omega)
    assert_agree(got, transfer.transfer(A, B, C, omega), family, 1 << 20)


# For a random read-out of length one: the largest deviation from HiPPO, within a factor of two.
@pytest.mark.parametrize(
    ("n", "perturbed", "normal"), [(16, 0.0018, 0.14), pytest.param(32, 0.0025, 0.06, marks=pytest.mark.slow)]
)
def test_deviations(n, perturbed, normal):
    found = transfer.compare(n)
    assert perturbed / 2 < found.deviation("perturbed") < 2 * perturbed
    assert normal / 2 < found.deviation("normal") < 2 * normal


def test_the_spike_is_at_the_largest_frequency():
    found = transfer.compare(16)
    at = found.omega[(found.normal - found.exact).abs().argmax()]
    assert at == pytest.approx(80.966, rel=1e-4)
    # PTD has none: nowhere does it exceed the largest gain of HiPPO.
    assert found.perturbed.abs().max() < 1.1 * found.exact.abs().max()
    assert found.normal.abs().max() > 3 * found.exact.abs().max()


@pytest.mark.parametrize("gamma", [100.0, 1000.0, 10_000.0])
def test_backward_error_bound(gamma):
    """The resolvent identity bounds the deviation for any E; the bound of the theory, (2 ln n + 4) |E|, holds too."""
    n = 16
    A, B = hippo.legs(n)
    B = B / B.norm()
    found = ptd.perturb(n, gamma)
    C = torch.randn(n, dtype=F64)
    C = C / C.norm()
    result = transfer.compare(n, gamma, readout=C)
    size = torch.linalg.matrix_norm(found.E, 2)
    to_state = transfer.states(A + found.E, B, result.omega).norm(dim=1)
    from_state = transfer.states(A.T, C, result.omega).norm(dim=1)
    gap = (result.perturbed - result.exact).abs()
    assert (gap <= from_state * size * to_state * (1 + 1e-8)).all()
    assert gap.max() <= (2 * math.log(n) + 4) * size


def test_strong_agreement_follows_the_size_of_the_perturbation():
    # Any direction E, scaled down: the largest deviation falls in proportion.
    n = 16
    A, B = hippo.legs(n)
    C, omega = torch.ones(n, dtype=F64) / 4, torch.linspace(0, 160, 2000, dtype=F64)
    E = ptd.perturb(n).E
    exact = transfer.transfer(A, B, C, omega)
    gaps = [(transfer.transfer(A + s * E, B, C, omega) - exact).abs().max().item() for s in (1e-2, 1e-3, 1e-4)]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.01)


def test_weak_and_strong():
    small, large = transfer.agreement(8), transfer.agreement(16)
    # S4D-LegS: on a smooth input the error halves with every doubling of n; on the worst input it stays.
    assert large.weak_normal == pytest.approx(small.weak_normal / 2, rel=0.15)
    assert large.strong_normal == pytest.approx(small.strong_normal, rel=0.05)
    assert large.strong_normal > 0.5
    # PTD: both fall with the perturbation.
    close = transfer.agreement(16, 10_000.0)
    assert close.strong_perturbed < 0.3 * large.strong_perturbed
    assert close.weak_perturbed < 0.3 * large.weak_perturbed
    assert large.strong_perturbed < 0.2 * large.strong_normal


def test_a_wave_at_the_spike_disturbs_the_normal_part_alone():
    """In time: the mean of a slow signal, which a fast wave on top should not reach."""
    n, height = 16, 0.1
    run = transfer.disturb(n, amplitude=height)
    assert_agree((run.noisy - run.signal).abs().max(), torch.tensor(height, dtype=F64), "wave", 1 << 20)
    # LegS hardly sees the wave: its gain there is that of a mean.
    size = run.quiet["exact"].norm()
    assert (run.loud["exact"] - run.quiet["exact"]).norm() < 0.01 * size
    # It moves PTD as little, and S4D-LegS by its transfer function: a wave of the height |G| times that of the input.
    assert run.error("perturbed", noisy=True) < 1.05 * run.error("perturbed")
    late = run.time > 2
    moved = (run.loud["normal"] - run.quiet["normal"])[late]
    first = torch.zeros(n, dtype=F64)
    first[0] = 1
    gain = transfer.transfer(*hippo.legsd(n), first, torch.tensor([run.omega], dtype=F64)).abs().item()
    assert moved.abs().max().item() == pytest.approx(gain * height, rel=0.15)
    assert run.error("normal", noisy=True) > 1.5 * run.error("normal")


@pytest.mark.parametrize("length", [1, 2, 5, 37])
def test_the_first_state_is_that_of_the_recurrence(length):
    A, B = hippo.legs(4)
    u, x, want = torch.randn(2, length, dtype=F64), torch.zeros(2, 4, dtype=F64), []
    power, into = zoh(A, 0.1, B)
    for t in range(length):
        x = x @ power.mT + u[:, t, None] * into
        want.append(x[:, 0])
    torch.testing.assert_close(transfer._first_state(A, B, u, 0.1), torch.stack(want, 1), rtol=1e-12, atol=1e-13)
