"""A memory is run over a signal, and the past is read off its last state."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor

from statewise.maths import bases, hippo, memory
from statewise.testing import assert_agree

F64 = torch.float64


def band_limited(length: int, dt: float, limit: float, seed: int = 0) -> Tensor:
    """A random signal without frequencies above `limit`, that starts from 0: a jump there is part of the past too."""
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.randn(length // 2 + 1, dtype=torch.complex128, generator=g)
    spectrum[torch.fft.rfftfreq(length, dt) > limit] = 0
    u = torch.fft.irfft(spectrum, length)
    return (u - u[0]) / u.square().mean().sqrt()


def profile() -> Tensor:
    """403 heights of ground along a line across a geological fault, from a survey that matplotlib ships."""
    survey = np.load(Path(matplotlib.get_data_path()) / "sample_data" / "jacksboro_fault_dem.npz")["elevation"]
    u = torch.from_numpy(survey[100].astype(np.float64))
    assert u.shape == (403,)
    return (u - u.mean()) / u.std()


def relative_error(family: str, n: int, u: Tensor, dt: float, window: float, *, method: str = "bilinear") -> float:
    """Root mean square of what the last state says about the last `window` units of time, minus the truth."""
    basis = getattr(bases, family)(n)
    state = memory.project(*hippo.system(family, n), u, dt, method=method)[-1]
    count = round(window / dt)
    # Sample L - 1 - j was held over the lags from j dt to (j + 1) dt.
    lags = (torch.arange(count, dtype=F64) + 0.5) * dt
    past = u.flip(-1)[:count]
    return ((basis.reconstruct(state, lags) - past).square().mean() / past.square().mean()).sqrt().item()


# Figures of the literature's setting: 4 units of time, dt = 0.001; they depend a little on the random signal.
@pytest.mark.parametrize(
    ("family", "window", "bounds"),
    [
        ("legt", 2.0, {16: 0.06, 32: 1e-3}),
        ("fout", 2.0, {16: 0.6, 32: 0.36, 64: 0.22}),
        ("legs", 1.0, {16: 0.3, 64: 0.03}),
    ],
)
def test_reconstruction_of_a_smooth_signal(family, window, bounds):
    u = band_limited(4000, 1e-3, 2.0)
    errors = [relative_error(family, n, u, 1e-3, window) for n in bounds]
    assert all(error < bound for error, bound in zip(errors, bounds.values())), errors
    assert errors == sorted(errors, reverse=True)


def test_a_rougher_signal_needs_more_coefficients():
    smooth, rough = (band_limited(4000, 1e-3, limit) for limit in (2.0, 5.0))
    errors = [relative_error("legt", n, u, 1e-3, 2.0) for n, u in ((32, smooth), (32, rough), (64, rough))]
    assert errors[0] < errors[1] / 20
    assert errors[2] < errors[1] / 20


@pytest.mark.parametrize(("family", "window"), [("legt", 2.0), ("fout", 2.0), ("legs", 1.0)])
def test_reconstruction_of_a_real_signal(family, window):
    dt = window / 100  # remembers the last 100 samples
    errors = [relative_error(family, n, profile(), dt, window, method="zoh") for n in (8, 32, 128)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.4 * errors[1]


def test_the_state_is_the_projection_of_the_past():
    # LegS is exact: what the recurrence holds are the integrals that define the coefficients.
    dt, n = 2e-3, 12
    time = (torch.arange(10_000, dtype=F64) + 0.5) * dt
    signal = lambda t: torch.sin(2 * t) + torch.cos(5 * t)  # noqa: E731
    state = memory.project(*hippo.legs(n), signal(time), dt)[-1]
    end = 10_000 * dt
    lags = (torch.arange(60_000, dtype=F64) + 0.5) * 5e-4  # beyond 30 the weight is 1e-13
    want = signal(end - lags) @ bases.legs(n).kernel(lags) * 5e-4
    # Samples at the middle of each step: second order in dt, so of the size (5 dt)^2 / 24.
    assert (state - want).abs().max() < (5 * dt) ** 2 / 10


def test_project_continues_and_takes_batches():
    A, B = hippo.legt(6)
    u = torch.randn(2, 3, 20, dtype=F64)
    whole = memory.project(A, B, u, 0.05)
    assert whole.shape == (2, 3, 20, 6)
    first = memory.project(A, B, u[..., :7], 0.05)
    rest = memory.project(A, B, u[..., 7:], 0.05, state=first[..., -1, :])
    assert_agree(torch.cat([first, rest], -2), whole, "in two parts", 20)
    assert_agree(memory.project(A, B, u[1, 2], 0.05), whole[1, 2], "one row", 20)
    assert memory.project(A, B, u[..., :0], 0.05).shape == (2, 3, 0, 6)


def scaled_error(u: Tensor, n: int, method: str) -> float:
    state = memory.project_scaled(u, n, method=method)[-1]
    fractions = (torch.arange(len(u), dtype=F64) + 0.5) / len(u)
    wrong = memory.reconstruct_scaled(state, fractions) - u
    return (wrong.square().mean() / u.square().mean()).sqrt().item()


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
def test_the_whole_past(method):
    # 1000 samples, five full swings at most: smooth for 32 polynomials, not for 8.
    u = band_limited(1000, 1e-3, 5.0)
    errors = [scaled_error(u, n, method) for n in (8, 16, 32)]
    assert errors[1] < errors[0] / 1.5
    assert errors[2] < errors[1] / 3
    assert errors[2] < 0.05


def test_the_whole_past_of_a_real_signal():
    errors = [scaled_error(profile(), n, "zoh") for n in (4, 16, 64)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_stretching_time_changes_nothing():
    u = band_limited(400, 1e-3, 8.0)
    once = memory.project_scaled(u, 16, method="zoh")[-1]
    twice = memory.project_scaled(u.repeat_interleave(2), 16, method="zoh")[-1]
    assert_agree(twice, once, "each sample held for two steps", 800)
    # The bilinear rule is off by its own error, which falls with the number of steps.
    off = []
    for length in (250, 500, 1000):
        v = torch.sin(torch.linspace(0, 20, length, dtype=F64))
        a, b = (memory.project_scaled(w, 8)[-1] for w in (v, v.repeat_interleave(2)))
        off.append((a - b).norm().item())
    assert off[2] < off[1] < off[0]


def test_a_constant_signal_is_its_own_first_coefficient():
    u = torch.full((50,), 3.0, dtype=F64)
    want = torch.zeros(50, 5, dtype=F64)
    want[:, 0] = 3
    assert_agree(memory.project_scaled(u, 5, method="zoh"), want, "constant", 50)
    with pytest.raises(ValueError, match="method: want 'bilinear' or 'zoh', got 'euler'"):
        memory.project_scaled(u, 5, method="euler")


def test_the_published_recurrence():
    A, B = (part.numpy() for part in hippo.legs(5))
    u, x, want = torch.randn(12, dtype=F64), np.zeros(5), []
    for k, value in enumerate(u.tolist(), 1):
        x = np.linalg.solve(np.eye(5) - A / (2 * k), (np.eye(5) + A / (2 * k)) @ x + B * value / k)
        want.append(x)
    assert_agree(memory.project_scaled(u, 5), torch.from_numpy(np.stack(want)), "bilinear", 12)


def test_rows_of_the_whole_past_are_independent():
    u = torch.randn(2, 3, 15, dtype=F64)
    for method in ("bilinear", "zoh"):
        got = memory.project_scaled(u, 4, method=method)
        assert got.shape == (2, 3, 15, 4)
        assert_agree(got[1, 2], memory.project_scaled(u[1, 2], 4, method=method), "row", 15)
        assert memory.project_scaled(u[..., :0], 4, method=method).shape == (2, 3, 0, 4)


def delay_error(A: Tensor, B: Tensor, dt: float) -> float:
    """A frozen memory, and the best linear read-out of the signal 100 steps ago."""
    u = torch.stack([band_limited(400, 1.0, 50 / 400, seed) for seed in range(40)])
    x = memory.project(A, B, u, dt, method="bilinear")[:, 150:].flatten(0, 1)
    target = u[:, 50:300].flatten()
    half = len(target) // 2
    # By singular values: states this dependent have a rank that pivoted QR, the default, tells by luck.
    weights = torch.linalg.lstsq(x[:half], target[:half], driver="gelsd").solution
    wrong = x[half:] @ weights - target[half:]
    return (wrong.square().mean() / target[half:].square().mean()).sqrt().item()


def test_delay_wants_the_right_basis_and_the_right_step():
    n = 64
    right = delay_error(*hippo.legt(n), 2 / 100)  # a window of exactly the lag
    assert right < 0.02
    assert right < 0.1 * delay_error(*hippo.fout(n), 2 / 100)
    real = delay_error(-torch.diag(torch.arange(1.0, n + 1, dtype=F64)), torch.ones(n, dtype=F64), 1 / 100)
    for wrong in (real, delay_error(*hippo.legt(n), 2 / 1000), delay_error(*hippo.legt(n), 2 / 10)):
        assert wrong > 0.4
    assert math.isfinite(real)
