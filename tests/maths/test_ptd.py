"""Perturb, then diagonalise: exact for a nearby matrix, pairs only, stable, reproducible, and safe on disk."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from statewise.maths import hippo, ptd
from statewise.testing import assert_agree

F64 = torch.float64


# With gamma = 1e6 the price of E pushes against the wall at the real axis as hard as it may.
@pytest.mark.parametrize(("n", "gamma"), [(2, 1e3), (4, 1e3), (8, 1e3), (16, 1e3), (6, 1e6)])
def test_it_is_the_exact_decomposition_of_a_nearby_matrix(n, gamma):
    found = ptd.perturb(n, gamma)
    want = hippo.legs(n)[0] + found.E
    rebuilt = 2 * (found.V * found.Lambda @ found.V_inv).real
    # Backward error: a few roundings, times the condition of the eigenvectors.
    allowed = 100 * torch.finfo(F64).eps * found.condition * want.norm()
    assert (rebuilt - want).norm() <= allowed
    assert_agree(found.V_inv @ found.V, torch.eye(n // 2, dtype=found.V.dtype), "V_inv V", 1 << n)
    assert (found.V_inv @ found.V.conj()).abs().max() <= allowed
    assert_agree(found.V.norm(dim=0), torch.ones(n // 2, dtype=F64), "columns of length one", n)
    # Pairs only, stable, sorted; with their conjugates they are the spectrum that LAPACK finds.
    assert (found.Lambda.real < 0).all()
    assert (found.Lambda.imag < 0).all()
    assert (found.Lambda.imag.diff() >= 0).all()
    spectrum = np.sort_complex(np.linalg.eigvals(want.numpy()))
    both = np.sort_complex(torch.cat([found.Lambda, found.Lambda.conj()]).numpy())
    assert np.abs(spectrum - both).max() <= allowed


# cond(V) of at most 30 (gamma 100) and 300 (gamma 1000), |E| / |A| near 1 / gamma: what the search is for.
@pytest.mark.parametrize(("n", "gamma", "condition", "relative"), [(16, 100.0, 30, 2e-2), (16, 1000.0, 300, 2e-3)])
def test_condition_and_size(n, gamma, condition, relative):
    found = ptd.perturb(n, gamma)
    assert found.condition < condition
    assert found.relative < relative
    # It beats what it starts from, and chance: a random E of the same size.
    A, _ = hippo.legs(n)
    E = torch.randn(n, n, dtype=F64)
    E *= torch.linalg.matrix_norm(found.E, 2) / torch.linalg.matrix_norm(E, 2)
    assert found.condition < 0.7 * torch.linalg.cond(torch.linalg.eig(A + E).eigenvectors).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "gamma", "condition"), [(32, 10.0, 13), (32, 100.0, 30), (32, 10_000.0, 2500), (64, 1000.0, 300)]
)
def test_condition_of_larger_ones(n, gamma, condition):
    found = ptd.perturb(n, gamma)
    assert found.condition < condition
    assert float(found.Lambda.real.max()) < -0.4


def test_gradient_of_the_search():
    n = 6
    A, size = hippo.legs(n)[0].numpy(), 10.0
    rng = np.random.default_rng(0)
    noise, direction = rng.standard_normal((2, n, n))
    P = np.sqrt(np.arange(n) + 0.5)
    E = 0.3 * np.outer(P, P) + 0.1 * noise

    def objective(step: float) -> float:
        moved = E + step * direction
        Lambda, V = np.linalg.eig(A + moved)
        walls = np.maximum(Lambda.real + ptd.MARGIN, 0).sum() + np.maximum(ptd.GAP - np.abs(Lambda.imag), 0).sum()
        return math.log(np.linalg.cond(V)) + 100 / size * np.linalg.norm(moved, 2) + ptd.SLOPE * walls

    assert ptd._only_pairs(A + E)  # else the wall has a corner here
    got = (ptd._slope(A, E, 100 / size) * direction).sum()
    want = (objective(1e-5) - objective(-1e-5)) / 2e-5
    assert got == pytest.approx(want, rel=1e-6)


def test_the_start_is_stable_without_noise():
    # A + s P P^T: the symmetric part is at most -I/2 for 0 <= s <= 1.
    A, P = hippo.legs(24)[0], hippo.legs_low_rank(24)
    for s in (0.0, 0.03, 0.5, 1.0):
        M = A + s * torch.outer(P, P)
        assert torch.linalg.eigvalsh(M + M.T).max() <= -1 + 1e3 * torch.finfo(F64).eps * M.norm()


def test_seeds_and_repetition(tmp_path, monkeypatch):
    monkeypatch.setenv("STATEWISE_PTD", str(tmp_path))
    ptd._perturbed.cache_clear()
    first = ptd.perturb(6, seed=3)
    (file,) = tmp_path.iterdir()
    file.unlink()
    ptd._perturbed.cache_clear()
    again = ptd.perturb(6, seed=3)  # searched again
    ptd._perturbed.cache_clear()
    loaded = ptd.perturb(6, seed=3)  # read from disk
    for a, b, c in zip(first, again, loaded):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not torch.equal(first.E, ptd.perturb(6, seed=4).E)
    first.E.zero_()  # what is handed out is the caller's own
    assert torch.equal(ptd.perturb(6, seed=3).E, loaded.E)


def broken(how: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    match how:
        case "another size":
            return {name: t[..., :1] for name, t in tensors.items()}
        case "other numbers":
            return {**tensors, "E": tensors["E"] + 1}
        case "not finite":
            return {**tensors, "V": tensors["V"] * math.nan}
        case "single precision":
            return {name: t.float() for name, t in tensors.items()}
        case _:
            return {name: t for name, t in tensors.items() if name != "E"}


@pytest.mark.parametrize(
    "how", ["another size", "other numbers", "not finite", "single precision", "one missing", "text"]
)
def test_a_bad_file_is_found_and_replaced(how, tmp_path, monkeypatch):
    monkeypatch.setenv("STATEWISE_PTD", str(tmp_path))
    ptd._perturbed.cache_clear()
    want = ptd.perturb(4)
    (file,) = tmp_path.iterdir()
    if how == "text":
        file.write_bytes(b"no tensors here")
    else:
        save_file({k: t.contiguous() for k, t in broken(how, load_file(file)).items()}, file)
    ptd._perturbed.cache_clear()
    with pytest.warns(UserWarning, match="it is computed anew"):
        got = ptd.perturb(4)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    ptd._perturbed.cache_clear()
    ptd.perturb(4)  # good again: a warning would be an error here


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("STATEWISE_PTD", str(blocked / "below"))
    ptd._perturbed.cache_clear()
    assert ptd.perturb(4).Lambda.shape == (2,)


def test_leaving_the_half_plane_is_an_error():
    E = 3 * torch.eye(4, dtype=F64).numpy() + 2 * np.triu(np.ones((4, 4)), 1)
    assert ptd._only_pairs(hippo.legs(4)[0].numpy() + E)
    with pytest.raises(
        RuntimeError, match=r"ptd: n=4: an eigenvalue has real part .*, want < 0; a larger gamma may do"
    ):
        ptd._diagonalise(4, E, "n=4")
    with pytest.raises(RuntimeError, match="4 real eigenvalues are left"):
        ptd._diagonalise(4, np.zeros((4, 4)), "n=4")


def test_it_does_not_depend_on_global_settings(tmp_path, monkeypatch):
    want = ptd.perturb(4)
    monkeypatch.setenv("STATEWISE_PTD", str(tmp_path))
    ptd._perturbed.cache_clear()
    random = torch.get_rng_state()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"), torch.no_grad():
            searched = ptd.perturb(4)
            ptd._perturbed.cache_clear()
            read = ptd.perturb(4)
    finally:
        torch.set_default_dtype(torch.float32)
    for got in (searched, read):
        assert got.V.device.type == "cpu"
        assert torch.equal(got.Lambda, want.Lambda)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 5}, "n: .* even state size, got 5"),
        ({"n": 0}, "n: .* even state size, got 0"),
        ({"n": 4, "gamma": 0.1}, "gamma: want a number from 1 to 1e6, got 0.1"),
        ({"n": 4, "gamma": math.nan}, "gamma"),
        ({"n": 4, "seed": -1}, "seed: want a number >= 0, got -1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ptd.perturb(**arguments)


def test_modes_of_any_real_matrix():
    # Eigenvalues -1 +- 2i, -3, -0.5: a pair counts twice, a real mode once.
    M = torch.block_diag(torch.tensor([[-1.0, -2.0], [2.0, -1.0]]), torch.tensor([[-3.0]]), torch.tensor([[-0.5]]))
    change = torch.randn(4, 4, dtype=F64)
    M = change @ M.double() @ torch.linalg.inv(change)
    found = ptd.modes(M)
    assert found.weight.tolist() == [2, 1, 1]
    assert_agree(found.Lambda, torch.tensor([-1 - 2j, -3, -0.5], dtype=torch.complex128), "eigenvalues", 1 << 20)
    rebuilt = torch.einsum("k,nk,k,km->nm", found.weight + 0j, found.V, found.Lambda, found.V_inv).real
    assert_agree(rebuilt, M, "weighted sum", 1 << 20)
    halved = found.V_inv * found.weight[:, None] / 2
    assert_agree(2 * (found.V * found.Lambda @ halved).real, M, "2 Re, with the real ones halved", 1 << 20)


def test_modes_of_a_matrix_without_eigenvectors():
    with pytest.raises(ValueError, match="its eigenvectors have condition"):
        ptd.modes(hippo.legs(64)[0])
    with pytest.raises(ValueError, match=r"want \(N, N\)"):
        ptd.modes(torch.zeros(2, 3))
