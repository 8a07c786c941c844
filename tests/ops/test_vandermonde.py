"""The kernels of diagonal state spaces on every back-end, against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from statewise import ops
from statewise.ops._backend import interpreted
from statewise.testing import assert_no_worse, poisoned_empty

F64, C64, C128 = torch.float64, torch.complex64, torch.complex128
# A product of two rounded powers beside one rounded power, and sums in another order.
FACTOR = 3.0
_INTERPRETED = pytest.mark.skipif(
    not interpreted(), reason="the Triton kernels without a GPU: TRITON_INTERPRET=1 is not set"
)
BACKENDS = ["numba", pytest.param("triton", marks=[pytest.mark.triton, _INTERPRETED])]


def sample(D: int, N: int, kind: str = "complex", readouts: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Modes that decay slowly, fast and at once, of any angle."""
    g = torch.Generator().manual_seed(D + N)
    log_a = -(10 ** (-6 + 7 * torch.rand(D, N, generator=g, dtype=F64)))
    if kind == "complex":
        log_a = torch.complex(log_a, 4 * torch.randn(D, N, generator=g, dtype=F64))
    coeff = torch.randn(*readouts, D, N, dtype=log_a.dtype, generator=g)
    single = C64 if kind == "complex" else torch.float32
    return log_a.to(single), coeff.to(single)


def definition(log_a: Tensor, coeff: Tensor, length: int) -> Tensor:
    """Power by power; the angle of each is taken in float64 and rounded, so that float32 does not lose it."""
    at = torch.arange(length)
    modulus = torch.exp(log_a.real.unsqueeze(-1) * at.to(log_a.real.dtype))
    if not log_a.is_complex():
        return (coeff.unsqueeze(-1) * modulus).sum(-2)
    angle = (log_a.imag.to(F64).unsqueeze(-1) * at).remainder(2 * math.pi).to(modulus.dtype)
    powers = modulus * torch.polar(torch.ones_like(angle), angle)
    return 2 * (coeff.unsqueeze(-1) * powers).sum(-2).real


def outcome(run, log_a: Tensor, coeff: Tensor, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Kernel and gradients, for one cotangent of every size."""
    leaves = [t.to(dtype).requires_grad_() for t in (log_a, coeff)]
    out = run(*leaves, length)
    g = torch.Generator().manual_seed(length)
    grad = torch.randn(out.shape, generator=g, dtype=torch.float32).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("kind", ["complex", "real"])
@pytest.mark.parametrize(
    ("D", "N", "readouts", "length"),
    [(1, 1, (), 1), (3, 5, (), 16), (2, 17, (2,), 67), (2, 16, (2, 2), 1000), (1, 3, (), 2049)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_its_definition(backend, D, N, readouts, length, kind):
    log_a, coeff = sample(D, N, kind, readouts)
    with poisoned_empty():
        fast = outcome(
            lambda a, c, n: ops.diagonal_kernel(a, c, n, backend=backend), log_a, coeff, length, log_a.dtype
        )  # fmt: skip
    plain = outcome(definition, log_a, coeff, length, log_a.dtype)
    truth = outcome(definition, log_a, coeff, length, C128 if kind == "complex" else F64)
    for name, *results in zip(("kernel", "gradient of log_a", "gradient of coeff"), fast, plain, truth):
        assert_no_worse(*results, FACTOR, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows_of_modes_that_hardly_decay(backend):
    """16,384 turns of a mode on the unit circle, where an angle in float32 has three digits left."""
    length, g = 16384, torch.Generator().manual_seed(0)
    log_a = torch.complex(torch.full((1, 4), -1e-6), 3 * torch.rand(1, 4, generator=g))
    coeff = torch.randn(1, 4, dtype=C64, generator=g)
    fast = outcome(lambda a, c, n: ops.diagonal_kernel(a, c, n, backend=backend), log_a, coeff, length, C64)
    plain, truth = (outcome(definition, log_a, coeff, length, dtype) for dtype in (C64, C128))
    for name, *results in zip(("kernel", "gradient of log_a", "gradient of coeff"), fast, plain, truth):
        assert_no_worse(*results, FACTOR, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_without_memory_and_modes_that_grow(backend):
    log_a = torch.tensor([[-math.inf, -3000.0, 0.0, 60 / 500]]).to(C64)
    coeff = torch.tensor([[1.0, 2.0, 3.0, 1e-20]]).to(C64).requires_grad_()
    kernel = ops.diagonal_kernel(log_a, coeff, 500, conjugate=False, backend=backend)
    growing = 1e-20 * torch.exp(60 / 500 * torch.arange(500, dtype=F64))
    want = 3 + growing
    want[0] += 3
    plain = (3 + 1e-20 * torch.exp(torch.tensor(60 / 500) * torch.arange(500))).index_add(
        0, torch.tensor([0]), torch.tensor([3.0])
    )
    assert_no_worse(kernel[0], plain, want, FACTOR, "kernel")
    (gradient,) = torch.autograd.grad(kernel.sum(), coeff)
    assert torch.isfinite(torch.view_as_real(gradient)).all()
    assert gradient[0, :2].tolist() == [1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_rows_of_modes_that_grow(backend):
    log_a, coeff = torch.tensor([[10.0, 1.0]]).to(C64), torch.tensor([[1.0, 2.0]]).to(C64)
    fast = outcome(lambda a, c, n: ops.diagonal_kernel(a, c, n, backend=backend), log_a, coeff, 9, C64)
    plain, truth = (outcome(definition, log_a, coeff, 9, dtype) for dtype in (C64, C128))
    for name, *results in zip(("kernel", "gradient of log_a", "gradient of coeff"), fast, plain, truth):
        assert_no_worse(*results, FACTOR, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("D", "N", "length"), [(3, 2, 0), (0, 2, 9), (2, 0, 9)])
def test_nothing_to_do(backend, D, N, length):
    leaves = [torch.zeros(D, N, dtype=C64, requires_grad=True) for _ in range(2)]
    kernel = ops.diagonal_kernel(*leaves, length, backend=backend)
    assert torch.equal(kernel, torch.zeros(D, length))
    for g in torch.autograd.grad(kernel.sum(), leaves):
        assert torch.equal(g, torch.zeros(D, N, dtype=C64))


@pytest.mark.usefixtures("split_small")
def test_threads_change_nothing():
    log_a, coeff = sample(7, 20, readouts=(2,))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(outcome(lambda *t: ops.diagonal_kernel(*t, backend="numba"), log_a, coeff, 300, C64))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_are_operators(backend):
    leaves = [t.requires_grad_() for t in sample(2, 3, readouts=(2,))]
    operator = getattr(torch.ops.statewise, f"vandermonde_{backend}")
    torch.library.opcheck(operator.default, (*leaves, 20))
    given = (torch.randn(2, 2, 20), *(t.detach() for t in leaves), 20)
    torch.library.opcheck(getattr(torch.ops.statewise, f"vandermonde_{backend}_backward").default, given)


def test_reasons():
    narrow, wide = (torch.zeros(1, 1, dtype=dtype) for dtype in (C64, C128))
    with pytest.raises(ops.BackendError, match=r"compute in float32, got torch\.float64"):
        ops.diagonal_kernel(wide, wide, 4, backend="numba")
    if not interpreted():
        with pytest.raises(ops.BackendError, match="run on CUDA tensors"):
            ops.diagonal_kernel(narrow, narrow, 4, backend="triton")
    assert ops.diagonal_kernel(narrow, narrow, 4, backend="reference").dtype == torch.float32
    assert ops.diagonal_kernel(wide, wide, 4).dtype == F64


def test_half_precision_is_computed_in_single():
    log_a, coeff = (t.bfloat16() for t in sample(2, 3, "real"))
    assert torch.equal(ops.diagonal_kernel(log_a, coeff, 50), ops.diagonal_kernel(log_a.float(), coeff.float(), 50))


# ---- compiled, though not run ----------------------------------------------------------------------------------------


@pytest.mark.skipif(interpreted(), reason="compiling Triton kernels: TRITON_INTERPRET is set")
@pytest.mark.parametrize("kind", ["complex", "real"])
def test_compiled_for_a_gpu(kind, compiled):
    from statewise.ops.lti import vandermonde_triton as T

    log_a, coeff = sample(8, 32, kind, (1,))
    grad = T.forward(log_a, coeff, 4096)
    T.backward(grad, log_a, coeff, 4096)
    assert set(compiled) == {"_forward", "_backward"}
    for ptx in compiled.values():
        assert "atom" not in ptx
        # The hardware's quick sine loses digits towards half a turn.
        assert "sin.approx" not in ptx
