"""Bases: orthonormal, the source of the published matrices, stable by construction, and good for rebuilding a past."""

from __future__ import annotations

import math

import pytest
import torch

from statewise.maths import bases, hippo
from statewise.testing import assert_agree

F64 = torch.float64
BASES = {
    "legs": (bases.legs, hippo.legs),
    "legt": (bases.legt, hippo.legt),
    "legt, window 1": (lambda n: bases.legt(n, 1.0), lambda n: hippo.legt(n, 1.0)),
    "fout": (bases.fout, hippo.fout),
    "fout, window 5": (lambda n: bases.fout(n, 5.0), lambda n: hippo.fout(n, 5.0)),
    "lagt": (bases.lagt, hippo.lagt),
    "lagt, beta 1": (lambda n: bases.lagt(n, 1.0), lambda n: hippo.lagt(n, 0.0, 1.0)),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("n", [2, 8, 32])
def test_the_published_matrices_follow_from_basis_and_weight(name, n):
    # The basis is integrated numerically; the matrices are closed forms. Neither knows of the other.
    basis, matrices = BASES[name][0](n), BASES[name][1](n)
    A, B = basis.system()
    assert_agree(A, matrices[0], "A", n)
    assert_agree(B, matrices[1], "B", n)


@pytest.mark.parametrize("name", BASES)
def test_orthonormal(name):
    want = torch.eye(12, dtype=F64)
    if name.startswith("fout"):
        want[1, 1] = 0  # the sine of frequency 0
    assert_agree(BASES[name][0](12).gram(), want, name, 12)


@pytest.mark.parametrize("name", ["legs", "lagt", "lagt, beta 1"])
def test_kernels_without_an_end_are_exact(name):
    basis, (A, B) = BASES[name][0](8), BASES[name][1](8)
    for lag in (0.0, 0.4, 3.0):
        s = torch.tensor(lag, dtype=F64)
        assert_agree(torch.linalg.matrix_exp(s * A) @ B, basis.kernel(s), f"kernel at {lag}", 8)


@pytest.mark.parametrize("name", ["legs", "legt", "fout", "lagt, beta 1"])
def test_error_of_the_best_approximation_falls(name):
    def past(s):
        return torch.sin(1.5 * s) * torch.exp(-s / 2) + 0.3 * torch.cos(3 * s)

    s = torch.linspace(0.0, 2.0, 500, dtype=F64)
    errors = []
    for n in (4, 16, 48):
        basis = BASES[name][0](n)
        wrong = (basis.reconstruct(basis.project(past), s) - past(s)).square() * basis.weight(s)
        errors.append(math.sqrt(wrong.mean()))
    assert errors[1] < errors[0] / 1.5
    assert errors[2] < errors[1] / 1.5


def own(n: int, weight) -> bases.Basis:
    """Powers of the lag, which are anything but orthonormal, over three units of time."""
    powers = torch.arange(n, dtype=F64)
    return bases.orthonormalise(lambda s: (s / 3).unsqueeze(-1) ** powers, weight, 3.0)


@pytest.mark.parametrize(
    "weight",
    [lambda s: torch.exp(-2 * s), lambda s: (3.2 - s) ** 2, lambda s: 1 / (1 + s), lambda s: 0.2 + torch.cos(s / 2)],
)
def test_any_weight_that_does_not_grow_gives_a_stable_memory(weight):
    basis = own(7, weight)
    assert_agree(basis.gram(), torch.eye(7, dtype=F64), "orthonormal", 1 << 20)
    A, _ = basis.system()
    assert torch.linalg.eigvalsh(A + A.T).max() <= 0
    assert torch.linalg.eigvals(A).real.max() < 0


def test_a_weight_that_grows_gives_no_such_promise():
    A, _ = own(7, lambda s: torch.exp(2 * s)).system()
    assert torch.linalg.eigvalsh(A + A.T).max() > 0


def test_own_polynomials_under_equal_weight_are_those_of_legendre():
    basis, known = own(6, lambda s: torch.full_like(s, 1 / 3)), bases.legt(6, 3.0)
    s = torch.linspace(0, 3, 20, dtype=F64)
    sign = (-1.0) ** torch.arange(6)  # the leading coefficient of P_k(1 - 2s/3) alternates, that of a power does not
    assert_agree(basis(s) * sign, known(s), "functions", 1 << 20)
    A, B = basis.system()
    assert_agree(sign[:, None] * A * sign, known.system()[0], "A", 1 << 20)
    assert_agree(sign * B, known.system()[1], "B", 1 << 20)


def test_errors():
    with pytest.raises(ValueError, match="not independent"):
        bases.orthonormalise(lambda s: torch.stack([s, 2 * s], -1), torch.ones_like, 1.0)
    with pytest.raises(ValueError, match="from 1 to 128, got 200"):
        bases.lagt(200)
    with pytest.raises(ValueError, match="even state size, got 3"):
        bases.fout(3)
    with pytest.raises(ValueError, match="window"):
        bases.legt(4, -1.0)
