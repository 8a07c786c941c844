"""LRU: the recurrence written out, and the statistics that its initialisation promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from statewise.mixers import LRU
from statewise.testing import assert_agree

F64 = torch.float64
BARE = {"activation": "none", "glu": False}


def test_it_is_its_recurrence():
    m = LRU(3, d_state=5).double()
    raw = {name: p.detach().numpy() for name, p in m.named_parameters()}
    B, C = (raw[name][..., 0] + 1j * raw[name][..., 1] for name in "BC")
    a = np.exp(-np.exp(raw["nu_log"]) + 1j * np.exp(raw["theta_log"]))
    gamma = np.exp(raw["gamma_log"])
    x = torch.randn(2, 40, 3, dtype=F64)
    h, want = np.zeros((2, 5), complex), []
    for u in x.unbind(1):
        h = a * h + gamma * (u.numpy() @ B.T)
        want.append((h @ C.T).real + raw["D"] * u.numpy())
    want = torch.from_numpy(np.stack(want, 1))
    y, state = m.extend(x, None)
    assert_agree(state, torch.from_numpy(h), "state", 40)
    assert_agree(y, F.glu(F.linear(F.gelu(want), m.tail.linear.weight, m.tail.linear.bias), -1), "y", 40)
    # Input i's response to a unit impulse is column i of the kernel.
    bare = LRU(3, d_state=5, **BARE).double()
    bare.load_state_dict(m.state_dict(), strict=False)
    for i in range(3):
        impulse = torch.zeros(1, 20, 3, dtype=F64)
        impulse[0, 0, i] = 1
        assert_agree(bare(impulse)[0].mT, bare.impulse(20)[:, i], f"impulse in channel {i}", 20)


@pytest.mark.parametrize(("r_min", "r_max", "max_phase"), [(0.0, 1.0, 2 * math.pi), (0.9, 0.999, math.pi / 10)])
def test_modes_start_on_the_ring(r_min, r_max, max_phase):
    N = 20_000
    m = LRU(2, d_state=N, r_min=r_min, r_max=r_max, max_phase=max_phase).double()
    log_a = m.discrete()[0].detach()
    r, phase = log_a.real.exp(), log_a.imag
    assert r_min - 1e-6 <= r.min()
    assert r.max() <= r_max
    assert phase.min() >= 0
    assert phase.max() <= max_phase + 1e-5
    # Uniform on the area: r^2 is uniform, and so is the phase. Largest distance of the empirical distributions from
    # uniform ones, whose size is about 1 / sqrt(N) (Kolmogorov; 1.95 is passed once in a thousand).
    for what in ((r**2 - r_min**2) / (r_max**2 - r_min**2), phase / max_phase):
        grid = (torch.arange(N) + 0.5) / N
        assert (what.sort().values - grid).abs().max() < 1.95 / N**0.5
    # Angles and radii are drawn apart.
    assert abs(torch.corrcoef(torch.stack([r, phase]))[0, 1].item()) < 5 / N**0.5


def test_gamma_keeps_white_noise_at_unit_size():
    torch.manual_seed(0)
    m = LRU(32, d_state=64, r_min=0.5, r_max=0.95).double()
    m.reset_dynamics()
    a = m.discrete()[0].exp()
    assert_agree(m.gamma_log.exp(), (1 - a.abs().square()).sqrt(), "gamma")
    x = torch.randn(64, 400, 32, dtype=F64)
    with torch.no_grad():
        _, state = m.extend(x, None)
    # E|B u|^2 is 1 / 2 + 1 / 2 for each mode: the parts of B have variance 1 / (2 D).
    sizes = state.abs().square().mean(0) / torch.view_as_complex(m.B).abs().square().sum(1)
    assert abs(sizes.mean().item() - 1) < 0.05
    assert (sizes - 1).abs().max() < 0.8


def test_projections_start_in_glorot_size():
    m = LRU(64, d_state=128)
    for p, variance in ((m.B, 1 / (2 * 64)), (m.C, 1 / 128)):
        assert abs(p.mean().item()) < 5 * (variance / p.numel()) ** 0.5
        assert abs(p.var().item() / variance - 1) < 5 * (2 / p.numel()) ** 0.5


def test_it_is_stable_whatever_the_parameters():
    m = LRU(4, d_state=6)
    with torch.no_grad():
        m.nu_log.normal_(std=10)
        m.theta_log.normal_(std=3)
    assert (m.discrete()[0].real.exp() <= 1).all()
    assert torch.isfinite(m(torch.randn(1, 500, 4))).all()


def test_ends_of_the_ring_have_finite_parameters(monkeypatch):
    for value in (0.0, 1 - 2**-53):
        monkeypatch.setattr(torch, "rand", lambda *size, value=value, **kw: torch.full(size, value, dtype=kw["dtype"]))
        m = LRU(4, d_state=6)
        m(torch.randn(1, 5, 4)).sum().backward()
        assert all(torch.isfinite(p).all() and torch.isfinite(p.grad).all() for p in m.parameters())


def test_parameter_count():
    H, N = 8, 6
    assert sum(p.numel() for p in LRU(H, d_state=N).parameters()) == 4 * H * N + 3 * N + H + 2 * H * H + 2 * H


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state: want at least one mode, got 0"),
        ({"r_min": 0.9, "r_max": 0.5}, "r_min, r_max: want"),
        ({"r_max": 1.5}, "r_min, r_max: want"),
        ({"r_min": 1.0}, "r_min, r_max: want"),
        ({"max_phase": 0.0}, "max_phase: want an angle"),
        ({"max_phase": 7.0}, "max_phase: want an angle"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LRU(4, **options)
