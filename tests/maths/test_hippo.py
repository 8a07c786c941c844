"""HiPPO matrices against closed forms of their kernels, and the eigen-decomposition against what it must rebuild."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch

from statewise.maths import hippo
from statewise.testing import assert_agree


@pytest.mark.parametrize("n", [1, 4, 16])
def test_kernels_are_warped_legendre_polynomials(n):
    A, B = hippo.legs(n)
    for s in (0.0, 0.1, 0.7, 2.0):
        kernel = scipy.linalg.expm(s * A.numpy()) @ B.numpy()
        k = np.arange(n)
        want = np.sqrt(2 * k + 1) * np.exp(-s) * scipy.special.eval_legendre(k, 2 * np.exp(-s) - 1)
        assert_agree(torch.from_numpy(kernel), torch.from_numpy(want), f"LegS kernel at lag {s}", n)


@pytest.mark.parametrize("n", [2, 16, 64])
def test_low_rank_correction_makes_it_normal(n):
    S = hippo.legs_normal(n)
    assert_agree(torch.diagonal(S), torch.full((n,), -0.5, dtype=torch.float64), "diagonal", n)
    skew = S - torch.diag(torch.diagonal(S))
    assert_agree(skew.T, -skew, "off the diagonal", n)
    assert_agree(S @ S.T, S.T @ S, "S commutes with its transpose", n)


@pytest.mark.parametrize("n", [2, 16, 64, 128])
def test_half_of_the_modes_rebuilds_the_matrix(n):
    Lambda, V = hippo.legs_diagonal(n)
    assert Lambda.dtype == V.dtype == torch.complex128
    assert (Lambda.imag < 0).all()
    assert (Lambda.imag.diff() > 0).all()
    assert (Lambda.real == -0.5).all()
    assert_agree(2 * (V * Lambda @ V.mH).real, hippo.legs_normal(n), "2 Re(V Lambda V*)", n)
    assert_agree(V.mH @ V, torch.eye(n // 2, dtype=V.dtype), "V* V", n)
    assert (V[0].real > 0).all()
    assert V[0].imag.abs().max() <= torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("n", "largest"), [(8, "19.857"), (16, "80.966"), (32, "325.43"), (64, "1303.27"), (128, "5214.7")]
)
def test_largest_frequency(n, largest):
    Lambda, _ = hippo.legs_diagonal(n)
    digits = len(largest.split(".")[1])
    assert f"{Lambda.imag.abs().max().item():.{digits}f}" == largest


def test_it_does_not_depend_on_global_settings():
    want, _ = hippo.legs_diagonal(16)
    hippo._eigen.cache_clear()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            got, V = hippo.legs_diagonal(16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert V.device.type == "cpu"
    assert torch.equal(got, want)


def test_blocks():
    Lambda, V, V_star = hippo.legs_block_diagonal(24, 3)
    small, small_V = hippo.legs_diagonal(8)
    assert torch.equal(Lambda, small.repeat(3))
    assert V.shape == (24, 12)
    for j in range(3):
        assert torch.equal(V[8 * j : 8 * j + 8, 4 * j : 4 * j + 4], small_V)
    assert int((V != 0).sum()) <= 3 * small_V.numel()
    assert_agree(V_star @ V, torch.eye(12, dtype=V.dtype), "V* V", 24)


@pytest.mark.parametrize(("n", "blocks"), [(24, 5), (24, 0), (6, 2), (24, 24)])
def test_blocks_that_do_not_fit(n, blocks):
    with pytest.raises(ValueError, match="blocks"):
        hippo.legs_block_diagonal(n, blocks)


@pytest.mark.parametrize("n", [0, -2, 5])
def test_sizes_that_do_not_fit(n):
    with pytest.raises(ValueError, match="n:"):
        hippo.legs_diagonal(n)


def kernels(A: torch.Tensor, B: torch.Tensor, lags: np.ndarray) -> np.ndarray:
    """exp(s A) B for each lag: (S, N)."""
    return np.stack([scipy.linalg.expm(s * A.numpy()) @ B.numpy() for s in lags])


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.0, 1.0), (0.5, 0.3), (-0.4, 0.01)])
def test_lagt_kernels_are_laguerre_functions(alpha, beta):
    n, lags = 8, np.array([0.0, 0.3, 1.0, 4.0])
    k = np.arange(n)
    norm = np.exp(0.5 * (scipy.special.gammaln(k + 1) - scipy.special.gammaln(k + alpha + 1)))
    want = norm * scipy.special.eval_genlaguerre(k, alpha, lags[:, None]) * np.exp(-(1 + beta) / 2 * lags[:, None])
    got = kernels(*hippo.lagt(n, alpha, beta), lags)
    assert_agree(torch.from_numpy(got), torch.from_numpy(want), "LagT kernels", n)


def windowed(family: str, lags: np.ndarray, n: int, window: float) -> np.ndarray:
    """What the kernels of LegT and FouT tend to on their window: p_k(s) / window."""
    k = np.arange(n)
    if family == "legt":
        return np.sqrt(2 * k + 1) * scipy.special.eval_legendre(k, 1 - 2 * lags[:, None] / window) / window
    angle = 2 * np.pi * (k // 2) * lags[:, None] / window
    want = math.sqrt(2) * np.where(k % 2, np.sin(angle), np.cos(angle))
    want[:, 0] = 1
    return want / window


# How far off they are at N = 128, for the first eight, in (0.2, 1.8) of a window of 2, is known: ripples.
@pytest.mark.parametrize(("family", "inside"), [("legt", 0.05), ("fout", 0.02)])
@pytest.mark.parametrize("window", [2.0, 1.0])
def test_kernels_of_a_window(family, inside, window):
    A, B = getattr(hippo, family)(128, window)
    lags = np.linspace(0.2, 1.8, 9) * window / 2
    ripple = np.abs(kernels(A, B, lags)[:, :8] - windowed(family, lags, 8, window)).max() * window / 2
    assert ripple < inside
    after = np.abs(kernels(A, B, np.linspace(2.2, 3.0, 5) * window / 2)[:, :8]).max() * window / 2
    assert after < 0.02


def test_a_shorter_window_is_a_faster_system():
    for family in (hippo.legt, hippo.fout, hippo.lmu):
        (A, B), (fast, faster) = family(8, 2.0), family(8, 0.5)
        assert_agree(fast, 4 * A, "A")
        assert_agree(faster, 4 * B, "B")
        with pytest.raises(ValueError, match="window: want a positive"):
            family(8, 0.0)


def test_lmu_is_the_published_matrix():
    A, B = hippo.lmu(6, 1.0)
    for i in range(6):
        assert B[i] == pytest.approx((-1) ** i * (2 * i + 1), rel=1e-14)
        for k in range(6):
            assert A[i, k] == pytest.approx((2 * i + 1) * (-1 if i < k else (-1) ** (i - k + 1)), rel=1e-14)


RANKS = {"legs": 1, "legt": 2, "lagt": 1, "fout": 1, "fourier_decay": 1, "legsd": 0, "foud": 0}


@pytest.mark.parametrize(("family", "rank"), RANKS.items())
def test_normal_plus_low_rank(family, rank):
    n = 12
    A, _ = hippo.system(family, n)
    P = hippo.low_rank(family, n)
    assert P.shape == (rank, n)
    S = A + P.T @ P
    S = S - torch.diagonal(S).mean() * torch.eye(n, dtype=S.dtype)
    assert_agree(S.T, -S, "skew-symmetric", n)


@pytest.mark.parametrize("family", RANKS)
@pytest.mark.parametrize("n", [2, 64])
def test_half_of_the_modes_rebuilds_the_normal_part(family, n):
    Lambda, V = hippo.normal_diagonal(family, n)
    A, P = hippo.system(family, n)[0], hippo.low_rank(family, n)
    assert_agree(2 * (V * Lambda @ V.mH).real, A + P.T @ P, "2 Re(V Lambda V*)", n, at_least=A.abs().max())
    assert_agree(V.mH @ V, torch.eye(n // 2, dtype=V.dtype), "V* V", n)
    assert_agree(V.mT @ V, torch.zeros(n // 2, n // 2, dtype=V.dtype), "V^T V", n, at_least=1.0)
    assert (Lambda.imag <= 0).all()
    assert (Lambda.real == {"legs": -0.5, "legsd": -0.5, "foud": -0.5}.get(family, 0.0)).all()


def test_every_family_has_a_rank_or_says_that_it_has_none():
    assert {*RANKS, "lmu"} == set(hippo.FAMILIES)
    with pytest.raises(ValueError, match="'lmu' is no normal matrix"):
        hippo.low_rank("lmu", 4)
    with pytest.raises(ValueError, match="did you mean"):
        hippo.system("legz", 4)


def test_fourier_frequencies():
    lam = torch.linalg.eigvals(hippo.foud(8)[0])
    assert_agree(lam.imag.sort().values, 2 * math.pi * torch.tensor([-3, -2, -1, 0, 0, 1, 2, 3], dtype=lam.real.dtype),
                 "foud", 8)  # fmt: skip
    assert_agree(lam.real, torch.full_like(lam.real, -0.5), "decay")
    for family in (hippo.fout, hippo.foud, hippo.fourier_decay):
        with pytest.raises(ValueError, match="even state size, got 7"):
            family(7)


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"beta": -0.1}, {"beta": math.inf}])
def test_lagt_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        hippo.lagt(4, **options)
