"""S4-PTD and S5-PTD: the mixers are the dense system LegS + E, and otherwise their parents."""

from __future__ import annotations

import inspect

import pytest
import torch

from statewise import mixers
from statewise.maths import discretize_dense, hippo, memory, ptd
from statewise.mixers import S4D, S4PTD, S5, S5PTD, BidirectionalS5
from statewise.testing import assert_agree

F64 = torch.float64


def dense_kernel(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, dt: float, length: int) -> torch.Tensor:
    """C A_bar^l B_bar for l < length, by powers of the full matrix."""
    A_bar, x = discretize_dense.zoh(A, dt, B)
    out = []
    for _ in range(length):
        out.append(C @ x)
        x = A_bar @ x
    return torch.stack(out)


@pytest.mark.parametrize("n", [8, 16])
def test_s4ptd_is_the_dense_system(n):
    dt, length = 0.01, 300
    m = S4PTD(2, d_state=n, dt_min=dt, dt_max=dt, activation="none", glu=False).double()
    C = torch.randn(2, n, dtype=F64)
    found = ptd.perturb(n)
    with torch.no_grad():
        m.reset_dynamics()  # again, now in float64
        m.log_dt.fill_(torch.tensor(dt, dtype=F64).log())
        m.D.zero_()
        # The stored half is the one above the real axis.
        m.C.copy_(torch.view_as_real((C.to(found.V.dtype) @ found.V).conj().resolve_conj()))
    A, B = hippo.legs(n)
    for h in range(2):
        want = dense_kernel(A + found.E, B, C[h], dt, length)
        assert (m.impulse(length)[h] - want).abs().max() <= 1e-8 * want.abs().max()


def test_s5ptd_is_the_dense_system():
    H, P, blocks, dt, length = 3, 16, 2, 0.01, 200
    m = S5PTD(H, d_state=P, blocks=blocks, dt_min=dt, dt_max=dt, activation="none").double()
    found = ptd.perturb(P // blocks)
    A = torch.block_diag(*[hippo.legs(P // blocks)[0] + found.E] * blocks)
    V, V_inv = (torch.block_diag(*[t] * blocks) for t in (found.V, found.V_inv))
    B, C = torch.randn(P, H, dtype=F64), torch.randn(H, P, dtype=F64)
    with torch.no_grad():
        m.reset_dynamics()
        m.log_step.fill_(torch.tensor(dt, dtype=F64).log())
        m.D.zero_()
        m.B.copy_(torch.view_as_real(V_inv @ B.to(V.dtype)))
        m.C.copy_(torch.view_as_real(C.to(V.dtype) @ V))
    want = dense_kernel(A, B, C, dt, length).permute(1, 2, 0)
    assert (m.impulse(length) - want).abs().max() <= 1e-8 * want.abs().max()


def test_initial_b_of_s5ptd_is_a_real_matrix_in_the_modes():
    m = S5PTD(64, d_state=32, blocks=4).double()
    with torch.no_grad():
        m.reset_dynamics()
    found = ptd.perturb(8)
    V, V_inv = (torch.block_diag(*[t] * 4) for t in (found.V, found.V_inv))
    B = torch.view_as_complex(m.B.detach())
    real = 2 * (V @ B).real
    assert (V_inv @ real.to(V.dtype) - B).abs().max() <= 1e-10 * B.abs().max()
    # Its entries have the variance 1 / P, whatever the basis: five standard errors.
    assert abs(real.square().mean().item() * 32 - 1) < 5 * (2 / real.numel()) ** 0.5
    assert torch.equal(m.Lambda_im.detach(), found.Lambda.imag.repeat(4))


@pytest.mark.parametrize("blocks", [1, 2])
def test_with_the_b_of_hippo_a_block_is_the_memory_of_one_mixture(blocks):
    H, P, dt, length = 3, 8 * blocks, 0.02, 120
    m = S5PTD(H, d_state=P, blocks=blocks, b_init="hippo", dt_min=dt, dt_max=dt, activation="none").double()
    m.reset_dynamics()  # again, now in float64
    found = ptd.perturb(8)
    A, b = hippo.legs(8)
    u = torch.randn(1, length, H, dtype=F64)
    with torch.no_grad():
        m.log_step.fill_(torch.tensor(dt, dtype=F64).log())
        h = torch.cat([m.extend(u[:, :t], None)[1] for t in range(1, length + 1)])  # (length, P/2)
        B = torch.view_as_complex(m.B)
    mixtures = []
    for modes, into in zip(h.chunk(blocks, 1), B.chunk(blocks, 0)):
        real = 2 * (found.V @ into).real  # (8, H): the B of HiPPO times a row
        mixture = real[0] / b[0]
        assert_agree(real, b[:, None] * mixture, "B", 8)
        want = memory.project(A + found.E, b, u[0] @ mixture, dt)
        assert_agree(2 * (modes @ found.V.mT).real, want, "states", length)
        mixtures.append(mixture)
    assert blocks == 1 or not torch.equal(*mixtures)


def test_with_the_b_of_hippo_s5_comes_near_to_the_memory():
    """S5's own start, the normal part: the error of the slow states halves with every doubling of the size."""

    def error(n: int) -> float:
        m = S5(1, d_state=n, b_init="hippo", dt_min=1e-2, dt_max=1e-2, activation="none").double()
        m.reset_dynamics()
        with torch.no_grad():
            m.log_step.fill_(torch.tensor(1e-2, dtype=F64).log())
            u = torch.sin(torch.arange(300, dtype=F64) / 50).reshape(1, -1, 1)
            last = m.extend(u, None)[1][0]
        got = 2 * (hippo.legs_diagonal(n)[1] @ last).real
        b = hippo.legs(n)[1]
        mixture = 4 * (hippo.legs_diagonal(n)[1] @ torch.view_as_complex(m.B.detach()))[0, 0].real / b[0]
        want = memory.project(*hippo.legs(n), u[0, :, 0] * mixture, 1e-2)[-1]
        return ((got - want)[:4].norm() / want[:4].norm()).item()

    errors = [error(n) for n in (8, 16, 32)]
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


@pytest.mark.parametrize(("preset", "parent"), [(S4PTD, S4D), (S5PTD, S5)])
def test_it_is_the_parent_but_for_the_start(preset, parent):
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    m, plain = preset(6, d_state=8), parent(6, d_state=8)
    assert count(m) == count(plain)
    assert {n: p.shape for n, p in m.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    plain.load_state_dict(m.state_dict())
    x = torch.randn(2, 20, 6)
    assert torch.equal(m(x), plain(x))
    options = set(inspect.signature(parent).parameters) - {"init"} | {"gamma", "seed"}
    assert set(inspect.signature(preset).parameters) == options
    # Left of the imaginary axis from the start, in the same way as the parent by its option.
    torch.manual_seed(1)
    m = preset(6, d_state=8, gamma=100.0, seed=2)
    torch.manual_seed(1)
    same = parent(6, d_state=8, init={"name": "ptd", "gamma": 100.0, "seed": 2})
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), same.state_dict().values()))
    assert (m.discrete()[0].real < 0).all()


def test_both_directions():
    m = BidirectionalS5(6, d_state=8, init="ptd")
    assert torch.equal(m.Lambda_im.detach(), ptd.perturb(8).Lambda.imag.float())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: mixers.create("s4ptd", 4, init="lin"), TypeError, "unknown option of s4ptd 'init'"),
        (lambda: mixers.create("s5ptd", 4, gama=1.0), TypeError, "did you mean 'gamma'"),
        (lambda: S5(4, b_init="hipo"), ValueError, "unknown b_init 'hipo'; did you mean 'hippo'"),
        (lambda: S5(4, init="lin"), ValueError, "unknown init 'lin'; known: legs, ptd"),
        (
            lambda: S4D(4, init={"name": "ptd", "sed": 1}),
            ValueError,
            "unknown option of init 'ptd' 'sed'; did you mean",
        ),
        (lambda: S4D(4, init={"name": "lin", "seed": 1}), ValueError, "unknown option of init 'lin' 'seed'"),
        (lambda: S4D(4, init={"gamma": 1.0}), ValueError, "unknown init 'None'"),
        (lambda: S5PTD(4, d_state=6, blocks=2), ValueError, "blocks: want 2"),
        (lambda: S4PTD(4, gamma=0.0), ValueError, "gamma: want a number from 1 to 1e6"),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()
