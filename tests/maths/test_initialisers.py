"""Initial values: the formulas at small sizes, the published extremes, and the laws of the random ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from statewise.maths import hippo, ptd
from statewise.maths import initialisers as I
from statewise.testing import assert_agree

PI = math.pi


@pytest.mark.parametrize(
    ("init", "real", "imag"),
    [
        ("lin", [-0.5] * 4, [0, PI, 2 * PI, 3 * PI]),
        ("inv", [-0.5] * 4, [8 / PI * (8 / 1 - 1), 8 / PI * (8 / 3 - 1), 8 / PI * (8 / 5 - 1), 8 / PI * (8 / 7 - 1)]),
        ("inv2", [-0.5] * 4, [8 / PI * 7, 8 / PI * 3, 8 / PI * (8 / 3 - 1), 8 / PI * 1]),
        ("quad", [-0.5] * 4, [1 / PI, 9 / PI, 25 / PI, 49 / PI]),
        ("real", [-1, -2, -3, -4], [0] * 4),
    ],
)
def test_formulas(init, real, imag):
    A, B = I.diagonal_init(init, 3, 8)
    want = torch.complex(torch.tensor(real, dtype=torch.float64), torch.tensor(imag, dtype=torch.float64))
    assert_agree(A, want.expand(3, 4), init)
    assert torch.equal(B, torch.ones(3, 4, dtype=torch.complex128))


@pytest.mark.parametrize(("init", "least", "most"), [("inv", "0.3234", "1283.43"), ("legs", "0.2639", "1303.27")])
def test_published_extremes(init, least, most):
    A, _ = I.diagonal_init(init, 1, 64)
    assert f"{A.imag.min().item():.4f}" == least
    assert f"{A.imag.max().item():.2f}" == most


def test_legs_is_the_rotated_hippo_system():
    A, B = I.diagonal_init("legs", 1, 32, b_clip=None)
    Lambda, V = hippo.legs_diagonal(32)
    _, full = hippo.legs(32)
    assert_agree(A[0], Lambda.conj().resolve_conj(), "A")
    # Both halves together carry the whole of B.
    assert_agree(2 * (V.conj() @ B[0]).real, full, "B back in the original basis", 32)
    _, clipped = I.diagonal_init("legs", 1, 32)
    assert clipped.imag.abs().max() == 2
    assert torch.equal(clipped.real, B.real)


def test_diag_is_half_inv_half_lin():
    A, B = I.diagonal_init("diag", 6, 16)
    assert torch.equal(A[:3], I.diagonal_init("inv", 3, 16)[0])
    assert torch.equal(A[3:], I.diagonal_init("lin", 3, 16)[0])
    assert B.shape == A.shape
    with pytest.raises(ValueError, match="even number, got 5"):
        I.diagonal_init("diag", 5, 16)


def test_random_ones_differ_between_copies_and_follow_the_generator():
    for options in ({"init": "rand"}, {"init": "lin", "real_random": True}):
        A = I.diagonal_init(copies=2, d_state=64, generator=torch.Generator().manual_seed(3), **options)[0]
        again = I.diagonal_init(copies=2, d_state=64, generator=torch.Generator().manual_seed(3), **options)[0]
        assert torch.equal(A, again)
        assert not torch.equal(A[0], A[1])
    assert ((A.real > -1) & (A.real <= 0)).all()


@pytest.mark.parametrize("init", I.DIAGONAL_INITS)
def test_all_are_stable_and_above_the_real_axis(init):
    A, B = I.diagonal_init(init, 2, 32)
    assert A.shape == B.shape == (2, 16)
    assert (A.real < 0).all()
    assert (A.imag >= 0).all()


def test_ptd_is_the_perturbed_system():
    A, B = I.diagonal_init({"name": "ptd", "gamma": 100.0}, 2, 8)
    found = ptd.perturb(8, 100.0)
    assert torch.equal(A[0], found.Lambda.conj().resolve_conj())
    assert_agree(2 * (found.V.conj() @ B[1]).real, hippo.legs(8)[1], "B back in the original basis", 1 << 20)


@pytest.mark.parametrize("init", I.BLOCK_INITS)
def test_blocks_rebuild_a_real_matrix(init):
    Lambda, V, V_inv = I.block_init(init, 16, 2)
    assert Lambda.shape == (8,)
    assert V.shape == (16, 8)
    want = {"legs": hippo.legs_normal(8), "ptd": hippo.legs(8)[0] + ptd.perturb(8).E}[init]
    rebuilt = 2 * (V * Lambda @ V_inv).real
    assert_agree(rebuilt, torch.block_diag(want, want), "2 Re(V Lambda V_inv)", 1 << 20)


def test_errors():
    with pytest.raises(ValueError, match="did you mean 'legs'"):
        I.diagonal_init("leg", 1, 8)
    for d_state in (0, 7):
        with pytest.raises(ValueError, match=f"even number.*got {d_state}"):
            I.diagonal_init("lin", 1, d_state)
    for low, high in ((0.0, 0.1), (0.2, 0.1), (-1.0, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="dt_min"):
            I.log_uniform_log_dt(3, low, high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_softplus(dtype):
    y = torch.logspace(-6, 2, 200, dtype=torch.float64).to(dtype)
    x = I.inverse_softplus(y).double()
    # x is good to its own rounding, which softplus then magnifies by x softplus'(x) / softplus(x), of order |x|.
    error = (torch.logaddexp(x, torch.zeros_like(x)) - y.double()).abs() / y.double()
    assert (error <= 8 * torch.finfo(dtype).eps * x.abs().clamp(min=1)).all()


def test_dt_bias_is_log_uniform_with_a_floor():
    n = 20_000
    dt = F.softplus(I.inverse_softplus_dt((n,), 1e-3, 0.1, dtype=torch.float64))
    assert dt.min() >= 1e-3 * (1 - 1e-9)
    assert dt.max() <= 0.1 * (1 + 1e-9)
    u = (torch.log(dt) - math.log(1e-3)).div(math.log(100)).sort().values
    distance = (u - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, one in a thousand
    floored = F.softplus(I.inverse_softplus_dt((n,), 1e-6, 1e-3, floor=1e-4, dtype=torch.float64))
    assert_agree(floored.min(), torch.tensor(1e-4, dtype=torch.float64), "floor")
    assert (floored > 2e-4).any()


def test_variances():
    n = 200_000
    z = torch.view_as_complex(I.complex_normal((n,), 3.0))
    t = I.truncated_normal((n,), 0.25, dtype=torch.float64)
    # Five standard errors of a variance: of |z|^2 it is 3, of a truncated square below sqrt(2) * 0.25.
    assert abs(z.abs().square().mean().item() - 3) < 5 * 3 / math.sqrt(n)
    assert abs(t.square().mean().item() - 0.25) < 5 * 0.25 * math.sqrt(2) / math.sqrt(n)
    assert t.abs().max() <= 2 * 0.5 / 0.879
