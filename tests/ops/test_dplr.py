"""The diagonal-plus-low-rank op against dense matrices, and the Cauchy product against its definition."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from statewise import ops
from statewise.maths.dplr import DPLR_RANKS, diagonal_plus_low_rank
from statewise.ops import _backend
from statewise.ops.dplr import cases, reference
from statewise.ops.dplr import kernel as kernels
from statewise.ops.dplr.cauchy import damped
from statewise.ops.lti.algorithms import ALGORITHMS
from statewise.segments import Segments
from statewise.testing import assert_agree, assert_no_worse

F64, C128 = torch.float64, torch.complex128


def sample(variant="rank 1", batch=2, length=150, dtype=F64, decay="mixed", **options) -> dict[str, Tensor]:
    return cases.sample(
        variant, batch, length, dtype=dtype, decay=decay, generator=torch.Generator().manual_seed(5), **options
    )


def hippo(init: str, n: int, D: int, dtype=C128) -> dict[str, Tensor]:
    """The coefficients with which S4 begins, with steps from 1e-3 to 1e-1."""
    Lambda, P, B, _ = diagonal_plus_low_rank(init, n)
    dt = torch.logspace(-3, -1, D, dtype=F64).unsqueeze(-1)
    c = torch.randn(D, n // 2, dtype=C128, generator=torch.Generator().manual_seed(0))
    Lambda = torch.complex(Lambda.real.clamp(max=-1e-4), Lambda.imag)
    return {"w": (dt * Lambda).to(dtype), "p": (dt.sqrt() * P.unsqueeze(1)).to(dtype), "b": (dt * B).to(dtype),
            "c": c.to(dtype)}  # fmt: skip


def dense(w: Tensor, p: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A_bar, B_bar and C over both halves of each conjugate pair, (D, 2N, 2N) and (D, 2N), by dense solves."""

    def both(t: Tensor) -> Tensor:
        return torch.cat([t, t.conj()], -1)

    low = both(p)
    M = torch.diag_embed(both(w)) - torch.einsum("rdn,rdm->dnm", low, low.conj())
    eye = torch.eye(M.shape[-1], dtype=M.dtype)
    left = eye - M / 2
    return torch.linalg.solve(left, eye + M / 2), torch.linalg.solve(left, both(b)), both(c)


def by_dense_powers(w: Tensor, p: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    A, x, C = dense(w, p, b, c)
    taps = []
    for _ in range(length):
        taps.append((C * x).sum(-1).real)
        x = (A @ x.unsqueeze(-1)).squeeze(-1)
    return torch.stack(taps, -1)


@pytest.mark.parametrize("algorithm", kernels.ALGORITHMS)
@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("length", [1, 2, 64, 100, 257])
@pytest.mark.parametrize("init", DPLR_RANKS)
def test_kernel_is_dense_powers(init, length, backend, algorithm):
    coefficients = hippo(init, 16, 4)
    want = by_dense_powers(**coefficients, length=length)
    got = ops.dplr_kernel(**coefficients, length=length, algorithm=algorithm, backend=backend)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-8
    assert_agree(got, want, "kernel", length)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_it_is_the_dense_recurrence(variant, algorithm):
    inputs = sample(variant, length=90)
    u, skip = inputs["u"], inputs["D"]
    A, B, C = dense(*(inputs[k] for k in "wpbc"))
    start = torch.randn(2, 5, 4, dtype=C128)
    x, want = torch.cat([start, start.conj()], -1), []
    for t in range(90):
        x = (A @ x.unsqueeze(-1)).squeeze(-1) + B * u[:, t, :, None]
        want.append((C * x).sum(-1).real + skip * u[:, t])
    y, state = ops.dplr_ssm(**inputs, state=start, algorithm=algorithm)
    assert_agree(y, torch.stack(want, 1), "y", 90)
    assert_agree(state, x[..., :4], "state", 90)


@pytest.mark.parametrize("variant", cases.VARIANTS)
@pytest.mark.parametrize("size", [(3, 4), (2, 17)])
@pytest.mark.parametrize("rows", [None, [[70, 30, 20], [119]], [[150], [1, 149]]])
def test_the_loop_is_the_recurrence_with_a_state_in_double_precision(variant, size, rows):
    call = sample(variant, dtype=torch.float32, size=size)
    state = torch.randn(2, *size, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    seg = None if rows is None else Segments.pack(rows, total=150)
    with torch.no_grad():
        got = ops.dplr_ssm(**call, state=state, seg=seg)
    wide = {name: t.to(C128 if t.is_complex() else F64) for name, t in call.items()}
    want = reference.dplr_ssm(**wide, state=state.to(C128), seg=seg)
    for name, x, y in zip(("y", "state"), got, want):
        rounded = y.to(x.dtype)
        assert_no_worse(x, rounded, y, 2.0, name)


@pytest.mark.usefixtures("split_small")
def test_threads_change_nothing_in_the_loop():
    call, found = sample(dtype=torch.float32, size=(7, 20)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            found.append(ops.dplr_ssm(**call))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_longer_kernels_begin_with_the_shorter():
    coefficients = hippo("legs", 32, 3)
    short, longer = (ops.dplr_kernel(**coefficients, length=n) for n in (200, 400))
    assert_agree(longer[:, :200], short, "first taps", 400)


def test_two_readouts_of_one_state():
    inputs = hippo("legs", 16, 4)
    other = torch.randn(4, 8, dtype=C128)
    both = ops.dplr_kernel(inputs["w"], inputs["p"], inputs["b"], torch.stack([inputs["c"], other]), 70)
    for got, c in zip(both, (inputs["c"], other)):
        assert_agree(got, ops.dplr_kernel(inputs["w"], inputs["p"], inputs["b"], c, 70), "kernel", 70)


@pytest.mark.parametrize("algorithm", kernels.ALGORITHMS)
def test_kernel_in_float32_keeps_its_digits(algorithm):
    """At the size of S4 the recurrence in float32 is what honest rounding costs."""
    L = 2048
    wide = hippo("legs", 64, 4)
    narrow = {k: v.to(torch.complex64) for k, v in wide.items()}
    wide = {k: v.to(C128) for k, v in narrow.items()}
    impulse = torch.zeros(1, L, 4)
    impulse[:, 0] = 1
    plain = reference.dplr_ssm(impulse, **narrow)[0][0].mT
    truth = ops.dplr_kernel(**wide, length=L)
    assert_no_worse(ops.dplr_kernel(**narrow, length=L, algorithm=algorithm), plain, truth, 2.0, algorithm)


@pytest.mark.parametrize("variant", cases.VARIANTS)
@pytest.mark.parametrize("r", [0.98, 0.3])
def test_a_damped_system_has_the_damped_kernel(variant, r):
    inputs = sample(variant)
    w, p, b, c = (inputs[k] for k in "wpbc")
    w2, p2, q2, b2 = damped(w, p, b, r)
    A, B, _ = dense(w, p, b, c)

    def both(t: Tensor) -> Tensor:
        return torch.cat([t, t.conj()], -1)

    M, eye = torch.diag_embed(both(w2)) - torch.einsum("rdn,rdm->dnm", both(p2), both(q2)), torch.eye(A.shape[-1])
    assert_agree(torch.linalg.solve(eye - M / 2, eye + M / 2), r * A, "r A", A.shape[-1])
    assert_agree(torch.linalg.solve(eye - M / 2, both(b2)), B, "B", A.shape[-1])


def test_gradients_of_the_kernel_in_float32():
    L = 300
    narrow = {k: v.to(torch.complex64) for k, v in hippo("legs", 16, 3).items()}
    impulse, weights = torch.zeros(1, L, 3), torch.randn(3, L, generator=torch.Generator().manual_seed(1))
    impulse[:, 0] = 1

    def grads(run, dtype):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in narrow.items()}
        return torch.autograd.grad((run(leaves) * weights).sum(), list(leaves.values()))

    fast = grads(lambda t: ops.dplr_kernel(**t, length=L), torch.complex64)
    plain = grads(lambda t: reference.dplr_ssm(impulse, **t)[0][0].mT, torch.complex64)
    truth = grads(lambda t: ops.dplr_kernel(**t, length=L, algorithm="powers"), C128)
    for name, *results in zip("wpbc", fast, plain, truth):
        assert_no_worse(*results, 2.0, f"gradient of {name}")


@pytest.mark.parametrize("algorithm", kernels.ALGORITHMS)
def test_gradients_of_the_kernel(algorithm, monkeypatch):
    monkeypatch.setattr(kernels, "_NUMBERS", 1)  # every channel a block of its own
    for variant in cases.VARIANTS:
        inputs = [sample(variant, size=(3, 2))[k].requires_grad_() for k in "wpbc"]
        torch.autograd.gradcheck(lambda *t: ops.dplr_kernel(*t, 9, algorithm=algorithm), inputs, fast_mode=True)


# ---- the Cauchy product ---------------------------------------------------------------------------------------------


def plainly(v: Tensor, w: Tensor, length: int) -> Tensor:
    theta = torch.pi * torch.arange(length // 2 + 1, dtype=F64) / length
    node, cos = 2j * torch.sin(theta), torch.cos(theta)
    return sum((a.unsqueeze(-1) / (node - cos * b.unsqueeze(-1))).sum(-2) for a, b in ((v, w), (v.conj(), w.conj())))


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize(("modes", "length"), [(1, 1), (3, 2), (4, 7), (5, 600), (8, 1023)])
def test_cauchy_is_its_definition(backend, modes, length):
    w = torch.complex(-torch.rand(3, modes, dtype=F64) - 1e-3, 4 * torch.randn(3, modes, dtype=F64))
    v = torch.randn(2, 2, 3, modes, dtype=C128)
    grad = torch.randn(2, 2, 3, length // 2 + 1, dtype=C128)
    results = []
    for run in (lambda v, w: ops.cauchy(v, w, length, backend=backend), lambda v, w: plainly(v, w, length)):
        leaves = [t.clone().requires_grad_() for t in (v, w)]
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for name, got, want in zip(("product", "gradient of v", "gradient of w"), *results):
        assert_agree(got, want, name, length)


def test_cauchy_at_minus_one_is_finite():
    w = torch.tensor([[-0.1 + 3j, -1e-3 + 0j]], dtype=C128)
    v = torch.randn(1, 2, dtype=C128)
    for backend in ("numba", "reference"):
        last = ops.cauchy(v, w, 8, backend=backend)[:, -1]
        assert_agree(last, (v.sum(-1) + v.conj().sum(-1)) / 2j, backend)


def test_cauchy_kernels_are_operators():
    w = -torch.rand(2, 3, dtype=F64)
    args = (torch.randn(4, 2, 3, dtype=F64), torch.randn(4, 2, 3, dtype=F64), -2 * w, w)
    args = tuple(t.requires_grad_() for t in args)
    torch.library.opcheck(torch.ops.statewise.cauchy_numba.default, (*args, 12))
    small = (torch.randn(4, 2, 7, dtype=F64), torch.randn(4, 2, 7, dtype=F64), *(t.detach() for t in args), 12)
    torch.library.opcheck(torch.ops.statewise.cauchy_numba_backward.default, small)


@pytest.mark.triton
@pytest.mark.skipif(
    not _backend.interpreted(), reason="the Triton kernels without a GPU: TRITON_INTERPRET=1 is not set"
)
@pytest.mark.parametrize(("products", "modes", "length"), [(1, 1, 1), (4, 3, 12), (9, 2, 150)])
def test_cauchy_on_triton(products, modes, length):
    w = torch.complex(-torch.rand(2, modes, dtype=F64) - 1e-3, torch.randn(2, modes, dtype=F64))
    v = torch.randn(products, 2, modes, dtype=C128)
    grad = torch.randn(products, 2, length // 2 + 1, dtype=C128)
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (v, w)]
        out = ops.cauchy(*leaves, length, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for name, got, want in zip(("product", "gradient of v", "gradient of w"), *results):
        assert_agree(got, want, name, length)


# ---- memory and errors ----------------------------------------------------------------------------------------------

_MEMORY = """
import sys, torch
from statewise import mixers
from statewise.benchmarks.machine import peak_memory
from statewise.ops.dplr import kernel

kernel._NUMBERS = 1  # one channel of S4 at a time, so that what a block of them may take does not hide the rest
mixer = mixers.create(sys.argv[1], 16, activation="none", glu=False)
for length in (256, *map(int, sys.argv[2:])):  # the first one compiles
    x = torch.randn(1, length, 16)
    open("/proc/self/clear_refs", "w").write("5")  # from here on the peak is that of the run
    mixer(x).sum().backward()
    if length > 256:
        print(peak_memory())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resets the peak memory in /proc")
@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_training_memory_is_linear_in_length_without_a_state_per_position(name):
    """Kernel and convolution, forward and backward. A state of 32 complex modes in 16 channels is 4 kB."""
    lengths = [1 << 14, 1 << 15, 1 << 16]
    environment = os.environ | {"STATEWISE_KEEP_MB": "0", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # nothing is kept
    command = [sys.executable, "-c", _MEMORY, name, *map(str, lengths)]
    peaks = [int(n) for n in subprocess.run(command, capture_output=True, check=True, env=environment).stdout.split()]
    earlier, later = ((b - a) / (n - m) for a, b, m, n in zip(peaks, peaks[1:], lengths, lengths[1:]))
    print(f"\n{name}: peak bytes per position: {earlier:.0f}, then {later:.0f}; a state is {16 * 32 * 8}")
    assert later < 16 * 32 * 8
    assert 0.7 < later / earlier < 1.4


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"w": torch.zeros(5, 3, dtype=torch.complex64)}, ValueError, "p: want shape"),
    ({"p": torch.zeros(5, 4, dtype=torch.complex64)}, ValueError, r"p: want shape \(R, D, N\)"),
    ({"b": torch.zeros(5, 4)}, TypeError, "b: want a complex tensor"),
    ({"D": torch.zeros(4)}, ValueError, "D: want shape"),
    ({"state": torch.zeros(1, 5, 4, dtype=torch.complex64)}, ValueError, "state: want shape"),
    ({"algorithm": "ftt"}, ValueError, "algorithm: want one of fft, chunk, recurrent"),
    ({"algorithm": "fft", "seg": Segments.pack([[150]] * 2)}, ValueError, "'fft' is one convolution"),
    ({"c": torch.zeros(5, 4, dtype=C128)}, TypeError, "c is torch.complex128"),
    ({"backend": "numba"}, ops.BackendError, "no numba implementation"),
])  # fmt: skip
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.dplr_ssm(**{**sample(dtype=torch.float32), **change})


def test_kernel_errors():
    inputs = hippo("legs", 8, 2)
    with pytest.raises(ValueError, match="length: want 0 or more, got -1"):
        ops.dplr_kernel(**inputs, length=-1)
    with pytest.raises(ValueError, match="algorithm: want one of cauchy, powers"):
        ops.dplr_kernel(**inputs, length=4, algorithm="cauchi")
    with pytest.raises(TypeError, match="want complex tensors"):
        ops.cauchy(torch.ones(1, 2), torch.ones(1, 2), 4)
    with pytest.raises(ValueError, match="length: want 1 or more, got 0"):
        ops.cauchy(inputs["b"], inputs["w"], 0)
    assert ops.dplr_kernel(**inputs, length=0).shape == (2, 0)
