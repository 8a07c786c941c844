"""HiPPO matrices as normal plus low rank, against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from statewise.maths.dplr import DPLR_RANKS, diagonal_plus_low_rank, nplr
from statewise.testing import assert_agree


def rebuilt(init: str, n: int, **options):
    """A and B from the half of the modes that is kept."""
    Lambda, P, B, V = diagonal_plus_low_rank(init, n, b_clip=None, **options)
    low = 2 * (V @ P.mT).real
    return 2 * (V @ torch.diag(Lambda) @ V.mH).real - low @ low.mT, 2 * (V @ B).real


@pytest.mark.parametrize("init", DPLR_RANKS)
@pytest.mark.parametrize("n", [2, 16, 64, 128])
def test_half_of_the_modes_rebuild_the_matrix(init, n):
    A, B, _ = nplr(init, n)
    got_A, got_B = rebuilt(init, n)
    # The bound of the issue is 1e-10 at N = 64; what rounding explains is less.
    assert (got_A - A).abs().max() < 1e-10
    assert_agree(got_A, A, "A", n)
    assert_agree(got_B, B, "B", n)


@pytest.mark.parametrize("init", DPLR_RANKS)
def test_the_rest_is_skew_plus_a_multiple_of_the_identity(init):
    A, _, P = nplr(init, 24)
    assert len(P) == DPLR_RANKS[init]
    normal = A + P.mT @ P
    decay = {"legs": -0.5, "legt": 0.0, "fout": 0.0}[init]
    assert_agree(normal + normal.mT, 2 * decay * torch.eye(24, dtype=torch.float64), "symmetric part", 24, at_least=24)


def test_closed_forms():
    """Entry by entry, with loops."""
    n = 12
    A = {init: np.zeros((n, n)) for init in DPLR_RANKS}
    B = {init: np.zeros(n) for init in DPLR_RANKS}
    for i in range(n):
        r_i = math.sqrt(2 * i + 1)
        B["legs"][i], B["legt"][i] = r_i, r_i / 2
        B["fout"][i] = 0 if i % 2 else (1 if i == 0 else math.sqrt(2))
        for j in range(n):
            r_j = math.sqrt(2 * j + 1)
            A["legs"][i, j] = -(r_i * r_j) if i > j else -(i + 1) if i == j else 0
            A["legt"][i, j] = -r_i * r_j / 2 * (1 if i >= j else (-1) ** (i - j))
    A["fout"] -= np.outer(B["fout"], B["fout"])
    for k in range(n // 2):
        A["fout"][2 * k, 2 * k + 1] -= math.pi * k
        A["fout"][2 * k + 1, 2 * k] += math.pi * k
    for init in DPLR_RANKS:
        got_A, got_B, _ = nplr(init, n)
        assert_agree(got_A, torch.from_numpy(A[init]), f"A of {init}")
        assert_agree(got_B, torch.from_numpy(B[init]), f"B of {init}")


@pytest.mark.parametrize(("n", "largest"), [(8, 19.857), (16, 80.966), (32, 325.43), (64, 1303.27), (128, 5214.7)])
def test_known_eigenvalues_of_legs(n, largest):
    Lambda = diagonal_plus_low_rank("legs", n).Lambda
    assert_agree(Lambda.real, torch.full_like(Lambda.real, -0.5), "Re Lambda", n)
    assert (Lambda.imag < 0).all()
    assert (Lambda.imag.diff() > 0).all()
    assert f"{-Lambda.imag[0]:.5g}" == f"{largest:.5g}"


def test_the_zero_pair_of_fout():
    Lambda, _, B, V = diagonal_plus_low_rank("fout", 16)
    assert Lambda[-1] == 0
    assert torch.allclose(V[:2, -1], torch.tensor([1, 1j], dtype=V.dtype) / math.sqrt(2))
    assert (V[2:, -1] == 0).all()
    frequencies = torch.arange(7, -1, -1, dtype=torch.float64) * math.pi
    assert_agree(-Lambda.imag, frequencies, "frequencies", 16)
    assert_agree(B.abs()[:-1], torch.ones(7, dtype=torch.float64), "B", 16)


def test_clip_and_rank():
    free, clipped = (diagonal_plus_low_rank("legs", 64, b_clip=clip) for clip in (None, 2.0))
    assert free.B.imag.abs().max() > 2
    assert clipped.B.imag.abs().max() == 2
    assert torch.equal(free.B.real, clipped.B.real)
    wide = diagonal_plus_low_rank("legs", 64, rank=3)
    assert wide.P.shape == (3, 32)
    assert torch.equal(wide.P[:1], free.P)
    assert (wide.P[1:] == 0).all()


def test_eigenvectors_do_not_depend_on_who_asks():
    """The phase is fixed, and what one caller does to its tensors reaches no other."""
    first = diagonal_plus_low_rank("legs", 32)
    assert (first.V[0].real > 0).all()
    assert_agree(first.V[0].imag, torch.zeros(16, dtype=torch.float64), "phase", 32, at_least=1.0)
    first.Lambda.zero_()
    first.V.zero_()
    assert (diagonal_plus_low_rank("legs", 32).Lambda != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lgs", 8), "unknown init 'lgs'; did you mean 'legs'"),
        (("legs", 7), "n: want an even state size >= 2"),
        (("legs", 0), "n: want an even state size >= 2"),
        (("legt", 8, 1), "rank: init='legt' needs 2, got 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagonal_plus_low_rank(*arguments)
