"""What is particular to the linear scan: running in reverse, broadcast decays, documents that went wrong, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import prod

import pytest
import torch

from statewise import Segments
from statewise.ops import BackendError, linear_scan, linear_scan_apply, linear_scan_matrix, linear_scan_step
from statewise.ops.linear_scan import cases
from statewise.testing.tolerance import assert_agree, assert_no_worse, assert_zero

BACKENDS = ("numba", "reference")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def decays(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def by_hand(a, x, state=None, reverse=False):
    """One row, one document, all tokens valid; all in float64."""
    h = torch.zeros_like(x[0]) if state is None else state
    out = torch.zeros_like(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        h = a[t] * h + x[t]
        out[t] = h
    return out, h


def gradients(a, x, **options):
    a, x = a.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    h, state = linear_scan(a, x, **options)
    weight = normal(*h.shape, dtype=torch.float64, seed=3).to(h.dtype)
    total = (h * weight).sum() + 2 * state.sum()
    return torch.autograd.grad(total.real if total.is_complex() else total, (a, x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0, 1, 2, 40])
def test_reverse_of_a_row(backend, length):
    a, x, state = decays(2, length, 5), normal(2, length, 5), normal(2, 5, seed=2)
    h, last = linear_scan(a, x, state=state, reverse=True, backend=backend)
    plain, plain_last = linear_scan(a.flip(1), x.flip(1), state=state, backend="reference", algorithm="recurrent")
    for b in range(2):
        want, end = by_hand(a[b].double(), x[b].double(), state[b].double(), reverse=True)
        assert_no_worse(h[b], plain.flip(1)[b], want, cases.FACTOR, "h")
        assert_no_worse(last[b], plain_last[b], end, cases.FACTOR, "state")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", [None, "chunk", "recurrent"])
def test_reverse_runs_each_document_alone(backend, algorithm):
    if backend == "numba" and algorithm == "chunk":
        with pytest.raises(BackendError, match="chunk"):
            linear_scan(decays(1, 3, 2), normal(1, 3, 2), algorithm=algorithm, backend=backend)
        return
    dtype = torch.float64 if backend == "reference" else torch.float32
    length = 30
    a, x = decays(2, length, 4, dtype=dtype), normal(2, length, 4, dtype=dtype)
    # The first document of row 0 was under way; padding stands within, between and behind documents.
    position = torch.tensor([[*range(7, 17), *range(20)], [*range(12), *range(18)]])
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, [0, 4, 5, 9, 29]] = False
    valid[1, [13, 14]] = False
    seg = Segments(position, valid)
    bad_a, bad_x = a.masked_fill(~valid[..., None], torch.nan), x.masked_fill(~valid[..., None], torch.nan)
    h, last = linear_scan(bad_a, bad_x, seg=seg, reverse=True, algorithm=algorithm, backend=backend)
    assert_zero(h[~valid], "h at padding")
    grads = gradients(bad_a, bad_x, seg=seg, reverse=True, algorithm=algorithm, backend=backend)
    for g in grads:
        assert_zero(g[~valid], "gradient at padding")
    for b, d in [(0, 0), (0, 1), (1, 1), (1, 2)]:
        where = (valid[b] & (seg.document[b] == d)).nonzero()[:, 0]
        want, end = by_hand(a[b, where].double(), x[b, where].double(), reverse=True)
        assert_agree(h[b, where], want.to(dtype), "h", length)
        if d == seg.document[b].min():
            assert_agree(last[b], end.to(dtype), "state", length)


def test_reverse_with_documents_takes_no_state():
    with pytest.raises(ValueError, match=r"state: want None when reverse=True"):
        linear_scan(decays(1, 4, 2), normal(1, 4, 2), state=normal(1, 2), seg=Segments.continuing(1, 4), reverse=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((6,), (6,)),
        ((9, 6), (6,)),
        ((1, 1, 6), (6,)),
        ((2, 1, 6), (6,)),
        ((1, 9, 6), (6,)),
        ((2, 9, 1), (6,)),
        ((2, 9, 1), (40,)),
        ((1,), (40,)),
        ((2, 9, 1), (4100,)),
        ((9, 5, 1), (5, 16)),
        ((5, 1), (5, 16)),
        ((5, 1), (5, 2500)),
        ((2, 9, 1, 16), (5, 16)),
        ((2, 9, 3, 1, 1), (3, 4, 5)),
        ((2, 9, 200, 1), (200, 16)),
    ],
)
def test_broadcast_decays(backend, shape, channels):
    """A decay that is shared gives what its copies give, and its gradient is the sum of theirs."""
    a, x = decays(*shape), normal(2, 9, *channels)
    full = a.expand(2, 9, *channels)
    options = {"backend": backend}
    h, state = linear_scan(a, x, **options)
    want, want_state = linear_scan(full.double(), x.double(), algorithm="recurrent")
    plain, plain_state = linear_scan(full.clone(), x, backend="reference", algorithm="recurrent")
    assert_no_worse(h, plain, want, cases.FACTOR, "h")
    assert_no_worse(state, plain_state, want_state, cases.FACTOR, "state")
    got, truth, honest = (
        gradients(a, x, **options),
        gradients(a.double(), x.double()),
        gradients(a, x, backend="reference", algorithm="recurrent"),
    )
    for name, g, p, w in zip("ax", got, honest, truth):
        assert_no_worse(g, p, w, cases.FACTOR, f"gradient of {name}")


def test_constant_decay_is_never_copied_out():
    """What is kept for the backward pass is h and the decay as it was given."""
    a, x = decays(64).requires_grad_(), normal(2, 128, 64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(prod(t.shape)), t)[1], lambda t: t):
        linear_scan(a, x, backend="numba")
    assert sum(kept) <= x.numel() + a.numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", [None, "recurrent"])
@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_a_broken_document_spoils_only_itself(backend, algorithm, wrong):
    a, x = decays(1, 40, 3), normal(1, 40, 3)
    a[0, 5], x[0, 7] = wrong, wrong
    seg = Segments.pack([[20, 20]])
    state = torch.full((1, 3), wrong)
    h, _ = linear_scan(a, x, state=state, seg=seg, algorithm=algorithm, backend=backend)
    want, _ = linear_scan(a[:, 20:], x[:, 20:], algorithm=algorithm, backend=backend)
    assert_agree(h[:, 20:], want, "h of the second document", 20)
    a.requires_grad_()
    h, last = linear_scan(a, x, state=state, seg=seg, algorithm=algorithm, backend=backend)
    (grad,) = torch.autograd.grad(h[:, 20:].sum() + last.sum(), a)
    assert bool(torch.isfinite(grad[:, 20:]).all())


def test_matrix_with_decays_of_zero():
    a = decays(1, 12, 3, dtype=torch.float64)
    a[0, [0, 4, 5]] = 0
    a.requires_grad_()
    x = normal(1, 12, 3, dtype=torch.float64)
    for reverse in (False, True):
        dense = linear_scan_matrix(a, reverse=reverse)
        h, _ = linear_scan(a, x, reverse=reverse)
        assert_agree(linear_scan_apply(dense, x), h, "matrix", 12)
        ours, theirs = (torch.autograd.grad(y.square().sum(), a)[0] for y in (linear_scan_apply(dense, x), h))
        assert_agree(ours, theirs, "gradient through the matrix", 12)


def test_matrix_in_reverse_with_documents():
    valid = torch.rand(2, 14, generator=torch.Generator().manual_seed(0)) < 0.7
    seg = Segments(torch.tensor([[*range(3, 8), *range(9)], [*range(14)]]), valid)
    a, x = decays(2, 14, 3, dtype=torch.float64), normal(2, 14, 3, dtype=torch.float64)
    dense = linear_scan_matrix(a, seg=seg, reverse=True)
    assert_agree(linear_scan_apply(dense, x), linear_scan(a, x, seg=seg, reverse=True)[0], "matrix", 14)


def test_matrix_and_its_length():
    assert linear_scan_matrix(decays(1, 1, 3), length=6).shape == (1, 3, 6, 6)
    assert linear_scan_matrix(decays(1, 1, 3), seg=Segments.continuing(2, 5)).shape == (2, 3, 5, 5)
    with pytest.raises(ValueError, match="length"):
        linear_scan_matrix(decays(1, 4, 3), length=6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_decay_of_a_real_input(backend):
    a = torch.polar(decays(2, 20, 3), normal(2, 20, 3))
    x = normal(2, 20, 3)
    h, state = linear_scan(a, x, backend=backend)
    assert h.dtype == state.dtype == torch.complex64
    want, _ = linear_scan(a.to(torch.complex128), x.double())
    plain, _ = linear_scan(a, x, backend="reference", algorithm="recurrent")
    assert_no_worse(h, plain, want, cases.FACTOR, "h")
    assert gradients(a, x, backend=backend)[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_not_computed_in(dtype):
    a, x = decays(2, 20, 3).to(dtype), normal(2, 20, 3).to(dtype)
    h, state = linear_scan(a, x)
    assert (h.dtype, state.dtype) == (dtype, torch.float32)
    want, want_state = linear_scan(a.float(), x.float())
    assert_agree(h, want.to(dtype), "h")
    assert_agree(state, want_state, "state")
    y, new = linear_scan_step(a[:, 0], x[:, 0], want_state)
    assert (y.dtype, new.dtype) == (dtype, torch.float32)


def test_strided_inputs():
    wide = normal(2, 12, 3, 20)
    views = [
        (wide[:, :, 0, ::2], wide[:, :, 1, ::2]),
        (wide[:, :, 0], wide[:, :, 1]),
        (wide[:, :, 0].transpose(1, 2)[:, :12, :], wide[:, :, 1].transpose(1, 2)[:, :12, :]),
        (wide[:, ::3, 2], wide[:, 1::3, 2]),
    ]
    for a, x in views:
        for got, want in zip(linear_scan(a, x), linear_scan(a.contiguous(), x.contiguous())):
            assert torch.equal(got, want)


@pytest.mark.usefixtures("split_small")
def test_from_many_threads_at_once():
    a, x = decays(3, 200, 300), normal(3, 200, 300)
    want = linear_scan(a, x)[0]
    with ThreadPoolExecutor(4) as pool:
        for h in pool.map(lambda _: linear_scan(a, x)[0], range(16)):
            assert torch.equal(h, want)


@pytest.mark.usefixtures("split_small")
def test_number_of_threads_changes_nothing():
    a, x = decays(1, 50, 1000), normal(1, 50, 1000)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append((*linear_scan(a, x), *gradients(a, x)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other))


@pytest.mark.parametrize("length", [1, 6])
def test_decode_without_gradients(length):
    """The short way for one token gives what the kernel gives."""
    a, x, state = decays(2, length, 3, 1), normal(2, length, 3, 4), normal(2, 3, 4, seed=5)
    with torch.no_grad():
        h, last = linear_scan(a, x, state=state)
    want, want_last = linear_scan(a, x, state=state, backend="numba")
    assert_agree(h, want, "h")
    assert_agree(last, want_last, "state")


def test_export_keeps_the_operator():
    class Scan(torch.nn.Module):
        def forward(self, a, x):
            return linear_scan(a, x)

    a, x = decays(2, 8, 3), normal(2, 8, 3)
    program = torch.export.export(
        Scan(), (a, x), dynamic_shapes=({1: torch.export.Dim("L")}, {1: torch.export.Dim("L")})
    )
    assert any("statewise" in str(node.target) for node in program.graph.nodes)
    longer = (decays(2, 11, 3), normal(2, 11, 3))
    assert torch.equal(program.module()(*longer)[0], linear_scan(*longer)[0])


@pytest.mark.parametrize(
    ("a", "x", "options", "error", "message"),
    [
        ((2, 4, 3), (2, 4), {}, ValueError, r"x: want \(B, L, \*channels\)"),
        ((2, 5, 3), (2, 4, 3), {}, ValueError, r"a: want a shape that broadcasts to x \(2, 4, 3\), got \(2, 5, 3\)"),
        ((1, 2, 4, 3), (2, 4, 3), {}, ValueError, "a: want a shape that broadcasts"),
        ((2, 4, 3), (2, 4, 3), {"algorithm": "fft"}, ValueError, "algorithm: want one of recurrent, chunk"),
        ((2, 4, 3), (2, 4, 3), {"state": torch.zeros(2, 4)}, ValueError, "state: want"),
        ((2, 4, 3), (2, 4, 3), {"seg": Segments.continuing(2, 5)}, ValueError, "seg: want shape"),
        ((2, 4, 3), (2, 4, 3), {"state": torch.zeros(2, 3).double()}, TypeError, "state is torch.float64"),
    ],
)
def test_bad_arguments(a, x, options, error, message):
    with pytest.raises(error, match=message):
        linear_scan(torch.ones(a), torch.ones(x), **options)


def test_explicit_numba_refuses_float64():
    with pytest.raises(BackendError, match="float32"):
        linear_scan(torch.ones(1, 2, 3).double(), torch.ones(1, 2, 3).double(), backend="numba")
