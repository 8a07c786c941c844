"""LTI ops against SciPy filters, dense Toeplitz matrices, NumPy convolution and their own definition."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from statewise import ops
from statewise.ops.lti import cases, convolution, reference
from statewise.ops.lti.algorithms import ALGORITHMS
from statewise.segments import Segments
from statewise.testing import assert_agree, assert_no_worse

F64 = torch.float64


def sample(variant="conjugate", batch=2, length=150, dtype=F64, decay="mixed", **options) -> dict[str, Tensor]:
    return cases.sample(
        variant, batch, length, dtype=dtype, decay=decay, generator=torch.Generator().manual_seed(5), **options
    )


# ---- diagonal_ssm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("variant", ["conjugate", "real"])
def test_it_is_a_sum_of_rational_filters(algorithm, variant):
    inputs = sample(variant)
    y, _ = ops.diagonal_ssm(**inputs, algorithm=algorithm)
    u, want = inputs["u"].numpy(), inputs["u"].numpy() * inputs["D"].numpy()
    a, g = torch.exp(inputs["log_a"]).numpy(), (inputs["b"] * inputs["c"]).numpy()
    for d in range(a.shape[0]):
        for n in range(a.shape[1]):
            if variant == "real":
                top, bottom = [g[d, n]], [1, -a[d, n]]
            else:  # g / (1 - a z) and its conjugate over a common denominator
                top = [2 * g[d, n].real, -2 * (g[d, n] * a[d, n].conj()).real]
                bottom = [1, -2 * a[d, n].real, abs(a[d, n]) ** 2]
            want[..., d] += scipy.signal.lfilter(top, bottom, u[..., d], axis=1)
    assert_agree(y, torch.from_numpy(want), algorithm, u.shape[1])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_is_a_toeplitz_matrix(algorithm):
    inputs = sample(length=100)
    y, _ = ops.diagonal_ssm(**inputs, algorithm=algorithm)
    powers = torch.exp(inputs["log_a"].unsqueeze(-1) * torch.arange(100))
    kernel = 2 * ((inputs["b"] * inputs["c"]).unsqueeze(-1) * powers).sum(1).real
    kernel[:, 0] += inputs["D"]
    for d, column in enumerate(kernel.numpy()):
        dense = torch.from_numpy(scipy.linalg.toeplitz(column, np.zeros(100)))
        assert_agree(y[..., d], inputs["u"][..., d] @ dense.T, algorithm, 100)


@pytest.mark.parametrize("algorithm", ["fft", "chunk"])
@pytest.mark.parametrize("decay", ["slow", "fast"])
def test_long_rows_in_float32(algorithm, decay):
    wide = sample(length=5000, batch=1, decay=decay, size=(2, 3))
    narrow = {k: v.to(torch.complex64 if v.is_complex() else torch.float32) for k, v in wide.items()}
    wide = {k: v.to(wide[k].dtype) for k, v in narrow.items()}
    truth, last = reference.diagonal_ssm(**wide)
    plain, plain_last = reference.diagonal_ssm(**narrow)
    y, state = ops.diagonal_ssm(**narrow, algorithm=algorithm)
    assert_no_worse(y, plain, truth, cases.FACTOR, "y")
    assert_no_worse(state, plain_last, last, cases.FACTOR, "state")


@pytest.mark.parametrize("compiling", [False, True])
def test_chunks_with_many_short_documents(compiling, monkeypatch):
    # The two ways through a chunk that holds several documents: only where needed, or everywhere (when compiled).
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    inputs = sample(batch=3, length=300)
    state = torch.randn(3, 5, 4, dtype=torch.complex128)
    valid = torch.rand(3, 300) < 0.8
    document = (torch.rand(3, 300) < 0.05).long().cumsum(1)
    document[1] = 0
    seg = Segments(Segments.from_documents(document).position + (document == 0).long(), valid)
    y, last = ops.diagonal_ssm(**inputs, state=state, seg=seg, algorithm="chunk")
    want, want_last = reference.diagonal_ssm(**inputs, state=state, seg=seg)
    assert_agree(y, want, "y", 300)
    assert_agree(last, want_last, "state", 300)


def test_what_a_reset_hides_never_shows():
    inputs = {k: v.requires_grad_() for k, v in sample(length=20).items()}
    state = torch.full((2, 5, 4), complex("nan"), dtype=torch.complex128, requires_grad=True)
    for algorithm in ("chunk", "recurrent"):
        y, last = ops.diagonal_ssm(**inputs, state=state, seg=Segments.continuing(2, 20, start=0), algorithm=algorithm)
        if algorithm == "chunk":
            grads = torch.autograd.grad(y.sum() + last.real.sum(), [*inputs.values(), state])
            assert all(torch.isfinite(torch.view_as_real(g) if g.is_complex() else g).all() for g in grads)
            assert (grads[-1] == 0).all()
        assert torch.isfinite(y).all()
        assert torch.isfinite(torch.view_as_real(last)).all()


def test_a_mode_without_memory():
    # log 0 = -inf: the mode only passes its input on.
    inputs = sample("real", length=40)
    inputs["log_a"] = torch.full_like(inputs["log_a"], -torch.inf)
    want = inputs["u"] * ((inputs["b"] * inputs["c"]).sum(-1) + inputs["D"])
    for algorithm in ALGORITHMS:
        assert_agree(ops.diagonal_ssm(**inputs, algorithm=algorithm)[0], want, algorithm)


@pytest.mark.parametrize("length", [8, 9, 2049])
def test_automatic_choice_changes_nothing(length):
    inputs = sample(batch=1, length=length, size=(2, 2))
    state = torch.randn(1, 2, 2, dtype=torch.complex128)
    y, last = ops.diagonal_ssm(**inputs, state=state)
    want, want_last = ops.diagonal_ssm(**inputs, state=state, algorithm="chunk")
    assert_agree(y, want, "y", length)
    assert_agree(last, want_last, "state", length)


def test_autocast_does_not_reach_the_state_space():
    inputs = sample(dtype=torch.float32)
    for algorithm in ALGORITHMS:
        want, _ = ops.diagonal_ssm(**inputs, algorithm=algorithm)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, _ = ops.diagonal_ssm(**inputs, algorithm=algorithm)
        assert torch.equal(got, want)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


@pytest.mark.parametrize(("algorithm", "packed"), [("fft", False), ("chunk", False), ("chunk", True)])
def test_no_tensor_holds_every_mode_of_every_token(algorithm, packed):
    B, L, D, N = 2, 2048, 3, 32
    inputs = {k: v.requires_grad_() for k, v in sample(batch=B, length=L, dtype=torch.float32, size=(D, N)).items()}
    seg = Segments.pack([[700, 1000], [2048]], total=L) if packed else None
    with Largest() as largest:
        y, state = ops.diagonal_ssm(**inputs, seg=seg, algorithm=algorithm)
        (y.sum() + state.real.sum()).backward()
    assert largest.bytes < B * L * D * N * 8 / 4
    assert largest.bytes < D * L * N * 8  # nor every power of every mode


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_a": torch.zeros(5, 3)}, ValueError, "b: want shape"),
        ({"log_a": torch.zeros(5)}, ValueError, r"log_a: want shape \(D, N\)"),
        ({"D": torch.zeros(4)}, ValueError, "D: want shape"),
        ({"state": torch.zeros(1, 5, 4)}, ValueError, "state: want shape"),
        ({"algorithm": "ftt"}, ValueError, "algorithm: want one of fft, chunk, recurrent"),
        ({"algorithm": "fft", "seg": Segments.pack([[150]] * 2)}, ValueError, "'fft' is one convolution"),
        ({"c": torch.zeros(5, 4, dtype=torch.float64)}, TypeError, "c is torch.float64"),
        ({"state": torch.zeros(2, 5, 4, dtype=torch.complex64)}, TypeError, "real state"),
        ({"backend": "numba"}, ops.BackendError, "no numba implementation"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.diagonal_ssm(**{**sample("real", dtype=torch.float32), **change})


def test_matrix_and_carry_need_a_length():
    inputs = {k: v for k, v in sample().items() if k != "u"}
    with pytest.raises(ValueError, match="length: want L"):
        ops.diagonal_ssm_matrix(**inputs)
    with pytest.raises(ValueError, match="seg has 7 tokens, got length=6"):
        ops.diagonal_ssm_matrix(**inputs, length=6, seg=Segments.pack([[7]]))
    assert ops.diagonal_ssm_matrix(**inputs, length=6).shape == (1, 5, 6, 6)


# ---- the kernel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 4096, 4999])
@pytest.mark.parametrize("conjugate", [True, False])
def test_kernel(length, conjugate):
    inputs = sample(decay="slow")
    coeff = torch.randn(3, 5, 4, dtype=torch.complex128)
    kernel = ops.diagonal_kernel(inputs["log_a"], coeff, length, conjugate=conjugate)
    powers = torch.exp(inputs["log_a"].unsqueeze(-1) * torch.arange(length))
    want = torch.einsum("bdn,dnl->bdl", coeff, powers).real * (2 if conjugate else 1)
    assert_agree(kernel, want, "kernel", length)


def test_kernel_in_float32_is_better_than_direct_powers():
    g = torch.Generator().manual_seed(0)
    log_a = torch.complex(-torch.full((4, 8), 1e-4), 3 * torch.rand(4, 8, generator=g))
    coeff = torch.randn(4, 8, dtype=torch.complex64, generator=g)
    at = torch.arange(8192)

    def direct(log_a: Tensor, coeff: Tensor) -> Tensor:
        return 2 * (coeff.unsqueeze(-1) * torch.exp(log_a.unsqueeze(-1) * at)).sum(1).real

    truth = direct(log_a.to(torch.complex128), coeff.to(torch.complex128))
    kernel = ops.diagonal_kernel(log_a, coeff, 8192)
    assert_no_worse(kernel, direct(log_a, coeff), truth, 0.1, "kernel")


def test_kernel_errors():
    with pytest.raises(ValueError, match="coeff: want shape"):
        ops.diagonal_kernel(torch.zeros(3, 4), torch.zeros(3, 5), 7)
    with pytest.raises(ValueError, match="length: want 0 or more, got -1"):
        ops.diagonal_kernel(torch.zeros(3, 4), torch.zeros(3, 4), -1)


# ---- lti_conv ------------------------------------------------------------------------------------------------------


def by_numpy(u: Tensor, kernel: Tensor, reverse: bool = False) -> Tensor:
    u = u.flip(1) if reverse else u
    rows = [
        [np.convolve(u[b, :, d].numpy(), kernel[d].numpy())[: u.shape[1]] for d in range(u.shape[2])]
        for b in range(u.shape[0])
    ]
    y = torch.from_numpy(np.array(rows)).reshape(u.shape[0], u.shape[2], u.shape[1]).mT
    return y.flip(1) if reverse else y


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (1, 9), (2, 1), (50, 7), (50, 50), (50, 120), (97, 96)])
def test_convolution(length, taps, reverse):
    u, kernel, D = torch.randn(2, length, 3, dtype=F64), torch.randn(3, taps, dtype=F64), torch.randn(3, dtype=F64)
    y = ops.lti_conv(u, kernel, D, reverse=reverse)
    assert_agree(y, by_numpy(u, kernel, reverse) + D * u, "convolution", length)
    future = torch.randn(3, 11, dtype=F64)
    both = ops.lti_conv(u, kernel, D, future=future, reverse=reverse)
    # A tap on the next position is one on this position of a kernel that begins with zero.
    ahead = by_numpy(u, torch.cat([torch.zeros(3, 1, dtype=F64), future], 1), not reverse)
    assert_agree(both, y + ahead, "both ways", length)
    assert ops.lti_conv(u[:, :0], kernel, D).shape == (2, 0, 3)


@pytest.mark.parametrize("reverse", [False, True])
def test_convolution_per_document(reverse):
    u, kernel, D = torch.randn(3, 40, 3, dtype=F64), torch.randn(3, 25, dtype=F64), torch.randn(3, dtype=F64)
    layout = [[3, 20, 1, 9], [40], [1, 1, 2]]
    seg = Segments.pack(layout, total=40)
    poisoned = u.masked_fill(~seg.valid.unsqueeze(-1), torch.nan).requires_grad_()
    y = ops.lti_conv(poisoned, kernel, D, seg=seg, reverse=reverse)
    assert (y[~seg.valid] == 0).all()
    for b, row in enumerate(layout):
        start = 0
        for size in row:
            part = u[b : b + 1, start : start + size]
            want = by_numpy(part, kernel, reverse) + D * part
            assert_agree(y[b : b + 1, start : start + size], want, f"document at {b}, {start}", 40)
            start += size
    (gradient,) = torch.autograd.grad(y.sum(), poisoned)
    assert (gradient[~seg.valid] == 0).all()
    assert torch.isfinite(gradient).all()


def test_convolution_skips_padding_inside_a_document():
    u, kernel = torch.randn(1, 12, 2, dtype=F64), torch.randn(2, 12, dtype=F64)
    valid = torch.tensor([[False, True, True, False, True, True, False, False, True, True, True, False]])
    y = ops.lti_conv(u, kernel, seg=Segments.from_valid(valid))
    assert_agree(y[valid], by_numpy(u[valid].unsqueeze(0), kernel)[0], "valid tokens", 12)
    assert (y[~valid] == 0).all()


def test_convolution_of_a_continuing_document_starts_afresh():
    u, kernel = torch.randn(1, 9, 2, dtype=F64), torch.randn(2, 9, dtype=F64)
    y = ops.lti_conv(u, kernel, seg=Segments.continuing(1, 9, start=4))
    assert_agree(y, by_numpy(u, kernel), "continuing", 9)


def test_convolution_has_gradients():
    u, kernel, D = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((2, 6, 2), (2, 4), (2,)))
    seg = Segments.pack([[2, 3], [6]], total=6)
    future = torch.randn(2, 3, dtype=F64)
    for options in ({}, {"reverse": True}, {"seg": seg}, {"seg": seg, "reverse": True}, {"seg": seg, "future": future}):
        torch.autograd.gradcheck(
            lambda *t, options=options: ops.lti_conv(*t, **options), (u, kernel, D), fast_mode=True
        )


def test_convolution_in_half_precision_is_computed_in_single():
    u, kernel = torch.randn(2, 300, 3).bfloat16(), torch.randn(3, 300)
    want = ops.lti_conv(u.float(), kernel)
    assert torch.equal(ops.lti_conv(u, kernel), want.bfloat16())


def test_convolution_errors():
    u = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="kernel: want shape"):
        ops.lti_conv(u, torch.randn(4, 5))
    with pytest.raises(ValueError, match="at least one tap"):
        ops.lti_conv(u, torch.randn(3, 0))
    with pytest.raises(TypeError, match="want a real"):
        ops.lti_conv(u, torch.randn(3, 5, dtype=torch.complex64))
    with pytest.raises(ValueError, match="future: want shape"):
        ops.lti_conv(u, torch.randn(3, 5), future=torch.randn(2, 5))


def test_fast_lengths():
    sizes = sorted(2**i * 3**j * 5**k for i in range(1, 14) for j in range(9) for k in range(6))
    for n in range(1, 3000):
        assert convolution.fast_length(n) == next(s for s in sizes if s >= n), n


# ---- the long convolution's kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [None, 0.5, 1.0])
@pytest.mark.parametrize(
    ("batch", "length", "width", "taps"),
    [
        (1, 1, 3, 1),
        (2, 5, 20, 5),
        (2, 64, 16, 1),
        (3, 100, 17, 7),
        (3, 100, 17, 40),
        (2, 1000, 16, 1000),
        (2, 1024, 16, 1024),
        (5, 2049, 33, 2049),
    ],
)
def test_kernels_are_as_good_as_plain_transforms(batch, length, width, taps, ahead):
    u, dy = torch.randn(2, batch, length, width)
    kernels = [torch.randn(width, taps) / taps**0.5]
    kernels += [] if ahead is None else [torch.randn(width, max(1, int(ahead * length))) / taps**0.5]

    def run(dtype, backend):
        given = [t.to(dtype).requires_grad_() for t in (u, *kernels)]
        y = ops.lti_conv(*given[:2], future=given[2] if ahead else None, backend=backend)
        return y, *torch.autograd.grad(y, given, dy.to(dtype))

    fast, plain, exact = run(torch.float32, "numba"), run(torch.float32, "reference"), run(F64, "reference")
    for name, *results in zip(("y", "du", "dkernel", "dfuture"), fast, plain, exact):
        assert_no_worse(*results, 3.0, name)


def test_kernels_are_operators():
    u, kernel = torch.randn(3, 20, 5, requires_grad=True), torch.randn(5, 20, requires_grad=True)
    for future in (None, torch.randn(5, 19, requires_grad=True)):
        torch.library.opcheck(torch.ops.statewise.long_conv_numba.default, (u, kernel, future))


def test_rows_too_long_for_the_kernels_are_said_to_be():
    reasons = convolution.reasons(torch.empty(1, 1, 70_000), torch.empty(1, 70_000))
    assert "65536 positions, got 70000" in reasons["numba"]
