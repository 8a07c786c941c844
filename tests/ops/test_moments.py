"""The last state of diagonal systems on every back-end, against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from statewise import ops
from statewise.ops.lti.moments import moments
from statewise.testing import assert_no_worse, poisoned_empty
from statewise.testing.tolerance import double

from .test_vandermonde import BACKENDS, FACTOR, sample


def definition(u: Tensor, log_a: Tensor) -> Tensor:
    """Position by position; the angle of each power is taken in float64, so that float32 does not lose it."""
    age = torch.arange(u.shape[1] - 1, -1, -1)
    modulus = torch.exp(log_a.real.unsqueeze(-1) * age.to(log_a.real.dtype))
    if log_a.is_complex():
        angle = (log_a.imag.to(torch.float64).unsqueeze(-1) * age).remainder(2 * math.pi).to(modulus.dtype)
        modulus = modulus * torch.polar(torch.ones_like(angle), angle)
    return torch.einsum("dnl,bld->bdn", modulus, u.to(modulus.dtype))


def outcome(run, *inputs: Tensor) -> list[Tensor]:
    """Sums and gradients, for one cotangent of every size."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = run(*leaves)
    g = torch.Generator().manual_seed(inputs[0].shape[1])
    grad = torch.randn(out.shape, generator=g, dtype=torch.complex64 if out.is_complex() else torch.float32)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def check(backend: str, u: Tensor, log_a: Tensor) -> None:
    with ops.use_backend(backend), poisoned_empty():
        fast = outcome(moments, u, log_a)
    plain = outcome(definition, u, log_a)
    truth = outcome(definition, double(u), double(log_a))
    for name, *results in zip(("last state", "gradient of u", "gradient of log_a"), fast, plain, truth):
        assert_no_worse(*results, FACTOR, name)


@pytest.mark.parametrize("kind", ["complex", "real"])
@pytest.mark.parametrize(("B", "D", "N", "length"), [(1, 1, 1, 1), (2, 3, 5, 16), (3, 2, 17, 67), (2, 2, 16, 1000)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_its_definition(backend, B, D, N, length, kind):
    check(backend, rows(B, length, D), sample(D, N, kind)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows_of_modes_that_hardly_decay(backend):
    log_a = torch.complex(torch.full((1, 4), -1e-6), 3 * torch.rand(1, 4, generator=torch.Generator().manual_seed(0)))
    check(backend, rows(1, 16384, 1), log_a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_without_memory_and_modes_that_grow(backend):
    """Up to e^80: one step of 64 more would be infinite, and nothing may look there."""
    log_a = torch.tensor([[-math.inf, -3000.0, 0.0, 80 / 500]]).to(torch.complex64)
    u = rows(1, 500, 1)
    with ops.use_backend(backend):
        got = moments(u, log_a)
    modes = log_a.real.clamp(min=-3000)
    plain, want = definition(u, modes), definition(double(u), double(modes))
    near = definition(double(u), double(modes) * (1 + torch.finfo(torch.float32).eps))
    for n in range(4):
        parts = (t[..., n] for t in (got.real, plain, want))
        assert_no_worse(*parts, FACTOR, f"mode {n}", rounded=near[..., n])


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_short_rows_of_modes_that_grow(backend, length):
    """Sixteen powers of a are infinite."""
    check(backend, rows(2, length, 1), torch.tensor([[80 / max(length - 1, 1), 1.0]]).to(torch.complex64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "length", "D", "N"), [(2, 0, 3, 2), (0, 4, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
def test_nothing_to_do(backend, B, length, D, N):
    leaves = [
        torch.zeros(B, length, D, requires_grad=True),
        torch.zeros(D, N, dtype=torch.complex64, requires_grad=True),
    ]
    with ops.use_backend(backend):
        out = moments(*leaves)
        assert torch.equal(out, torch.zeros(B, D, N, dtype=torch.complex64))
        for g, t in zip(torch.autograd.grad(out.real.sum(), leaves), leaves):
            assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.usefixtures("split_small")
def test_threads_and_strides_change_nothing():
    u, log_a = rows(2, 300, 7), sample(7, 20)[0]
    found = []
    for threads, v in ((1, u), (2, u.expand(2, -1, -1)), (3, u.mT.contiguous().mT), (2, u.repeat(1, 1, 2)[..., :7])):
        torch.set_num_threads(threads)
        found.append(outcome(moments, v, log_a))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_are_operators(backend):
    u, log_a = rows(2, 20, 2), sample(2, 3)[0]
    operator = getattr(torch.ops.statewise, f"moments_{backend}")
    torch.library.opcheck(operator.default, (u.clone().requires_grad_(), log_a.clone().requires_grad_()))
    given = (torch.randn(2, 2, 3, dtype=torch.complex64), u, log_a)
    torch.library.opcheck(getattr(torch.ops.statewise, f"moments_{backend}_backward").default, given)
