"""HiPPO-LegS against its closed form, and its eigen-decomposition against what it must rebuild."""

from __future__ import annotations

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
    hippo._legs_eigen.cache_clear()
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
