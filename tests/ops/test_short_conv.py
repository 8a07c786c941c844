"""What is particular to the short convolution: torch's conv1d, the window's edges, and folding shards."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import conv1d, pad, silu

from statewise import Segments
from statewise.ops import (
    BackendError,
    ConvSummary,
    short_conv,
    short_conv_apply,
    short_conv_combine,
    short_conv_matrix,
    short_conv_step,
    short_conv_summary,
)
from statewise.ops.short_conv import cases
from statewise.testing.tolerance import assert_agree, assert_no_worse, assert_zero

BACKENDS = ("numba", "reference")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", range(1, 9))
def test_against_conv1d(backend, activation, taps):
    x, weight, bias = normal(2, 33, 50), normal(50, taps, seed=1), normal(50, seed=2)

    def torch_conv(x, weight, bias):
        line = pad(x.mT, (taps - 1, 0))
        y = conv1d(line, weight[:, None], bias, groups=x.shape[2]).mT
        return silu(y) if activation else y

    def truth(x, weight, bias):
        # torch's own grouped convolution takes seconds in float64.
        y = torch.einsum("bldk,dk->bld", pad(x, (0, 0, taps - 1, 0)).unfold(1, taps, 1), weight) + bias
        return silu(y) if activation else y

    def ours(x, weight, bias):
        return short_conv(x, weight, bias, activation, backend=backend)[0]

    results = []
    for function, dtype in ((ours, torch.float32), (torch_conv, torch.float32), (truth, torch.float64)):
        given = [t.to(dtype).requires_grad_() for t in (x.clone(), weight.clone(), bias.clone())]
        y = function(*given)
        grads = torch.autograd.grad((y * normal(*y.shape, seed=3).to(dtype)).sum(), given)
        results.append((y, *grads))
    for name, got, plain, want in zip(("y", "dx", "dweight", "dbias"), *results):
        assert_no_worse(got, plain, want, cases.FACTOR, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_by_hand(backend):
    """Padding in the middle is skipped, documents do not see each other, the state is what the window still holds."""
    x = torch.tensor([[1.0, torch.nan, 2.0, 4.0, 8.0, torch.inf, 16.0]])[..., None]
    position = torch.tensor([[5, 6, 7, 0, 1, 2, 2]])
    valid = torch.tensor([[True, False, True, True, True, False, True]])
    weight = torch.tensor([[100.0, 10.0, 1.0]])
    state = torch.tensor([[[0.25], [0.5]]])
    y, new = short_conv(x, weight, state=state, seg=Segments(position, valid), backend=backend)
    # 1 + 10 * 0.5 + 100 * 0.25; 2 + 10 * 1 + 100 * 0.5; then a document: 4; 8 + 10 * 4; 16 + 10 * 8 + 100 * 4.
    assert y[0, :, 0].tolist() == [31.0, 0.0, 62.0, 4.0, 48.0, 0.0, 496.0]
    assert new[0, :, 0].tolist() == [8.0, 16.0]
    _, young = short_conv(x[:, :4], weight, state=state, seg=Segments(position, valid)[:, :4], backend=backend)
    assert young[0, :, 0].tolist() == [0.0, 4.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_document_spoils_only_itself(backend):
    x, weight = normal(1, 12, 3), normal(3, 4, seed=1)
    x[0, 4] = torch.nan
    x.requires_grad_()
    seg = Segments.pack([[6, 6]])
    y, state = short_conv(x, weight, state=torch.full((1, 3, 3), torch.inf), seg=seg, backend=backend)
    want, want_state = short_conv(x[:, 6:], weight, backend=backend)
    assert_agree(y[:, 6:], want, "y of the second document", 6)
    assert_agree(state, want_state, "state", 6)
    (grad,) = torch.autograd.grad(y[:, 6:].sum(), x)
    assert_zero(grad[:, :6], "gradient of the first document")
    assert bool(torch.isfinite(grad[:, 6:]).all())


@pytest.mark.parametrize("taps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["none", "packed", "holes"])
def test_folding_shards(taps, kind):
    """Each shard, started from the fold of the summaries before it, gives its part of the whole."""
    batch, length = 3, 23
    x, weight = normal(batch, length, 5, dtype=torch.float64), normal(5, taps, dtype=torch.float64, seed=1)
    state = normal(batch, taps - 1, 5, dtype=torch.float64, seed=2)
    seg = None
    if kind == "packed":
        seg = Segments.pack([[3, 9, 11], [1, 1, 21], [23]])
    if kind == "holes":
        valid = torch.rand(batch, length, generator=torch.Generator().manual_seed(4)) < 0.4
        position = torch.arange(length).expand(batch, length) % 9 + torch.tensor([[1], [0], [0]])
        seg = Segments(position, valid)
    whole, end = short_conv(x, weight, state=state, seg=seg)
    bounds = [0, 0, 2, 3, 10, 16, 23]
    start = ConvSummary(state, torch.full((batch,), taps - 1))
    shards, folds = [], [start]
    for lo, hi in itertools.pairwise(bounds):
        part = None if seg is None else seg[:, lo:hi]
        y, _ = short_conv(x[:, lo:hi], weight, state=folds[-1].state, seg=part)
        shards.append(y)
        folds.append(short_conv_combine(folds[-1], short_conv_summary(x[:, lo:hi], taps, seg=part)))
    assert_agree(torch.cat(shards, 1), whole, "y", length)
    assert_agree(folds[-1].state, end, "state", length)
    # Folding from the other side gives the same: the operation is associative.
    parts = [
        short_conv_summary(x[:, lo:hi], taps, seg=None if seg is None else seg[:, lo:hi])
        for lo, hi in itertools.pairwise(bounds)
    ]
    fold = parts[-1]
    for part in reversed(parts[:-1]):
        fold = short_conv_combine(part, fold)
    fold = short_conv_combine(start, fold)
    assert_agree(fold.state, end, "state folded from the right", length)
    assert torch.equal(fold.taken, folds[-1].taken)


@pytest.mark.parametrize("kind", ["none", "packed", "holes"])
def test_matrix(kind):
    x, weight = normal(2, 15, 4, dtype=torch.float64), normal(4, 3, dtype=torch.float64, seed=1)
    seg = None
    if kind == "packed":
        seg = Segments.pack([[4, 11], [15]])
    if kind == "holes":
        seg = Segments.from_valid(torch.rand(2, 15, generator=torch.Generator().manual_seed(4)) < 0.6)
    dense = short_conv_matrix(weight, length=15, seg=seg)
    y, _ = short_conv(x, weight, seg=seg)
    assert_agree(short_conv_apply(dense, x), y, "matrix times x", 15)
    # Column by column: the matrix is the op applied to units.
    units = torch.eye(15, dtype=torch.float64)[:, None, :, None].expand(15, 2, 15, 4).reshape(30, 15, 4)
    rows = None if seg is None else seg[torch.arange(2).repeat(15)]
    columns = short_conv(units, weight, seg=rows)[0].reshape(15, 2, 15, 4).permute(1, 3, 2, 0)
    assert_agree(dense.expand_as(columns), columns, "matrix", 15)


def test_step_and_decode_without_gradients():
    x, weight, bias = normal(2, 5, 6), normal(6, 4, seed=1), normal(6, seed=2)
    state = normal(2, 3, 6, seed=3)
    want, end = short_conv(x, weight, bias, "silu", state=state, backend="reference")
    ys, stepped, decoded = [], state, state
    with torch.no_grad():
        for t in range(5):
            y, decoded = short_conv(x[:, t : t + 1], weight, bias, "silu", state=decoded)
            y_t, stepped = short_conv_step(x[:, t], weight, bias, "silu", state=stepped)
            assert torch.equal(y[:, 0], y_t)
            ys.append(y_t)
    assert_agree(torch.stack(ys, 1), want, "y", 5)
    assert torch.equal(stepped, end)
    assert torch.equal(decoded, end)


def test_half_precision_is_stored_not_computed_in():
    x, weight = normal(2, 9, 6).bfloat16(), normal(6, 4, seed=1)
    y, state = short_conv(x, weight, activation="silu")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_agree(y, short_conv(x.float(), weight, activation="silu")[0].bfloat16(), "y")


def test_strided_inputs_and_many_channels():
    wide = normal(2, 40, 3000)
    weight = normal(1000, 4, seed=1)
    for x in (wide[..., 1000:2000], wide[..., ::3], wide[:, ::2, :1000]):
        got, want = short_conv(x, weight), short_conv(x.contiguous(), weight, backend="reference")
        for p, q in zip(got, want):
            assert_agree(p, q, "strided", 40)


def test_gradient_at_padding_is_zero_in_the_kernel():
    valid = torch.rand(3, 20, generator=torch.Generator().manual_seed(4)) < 0.5
    x = normal(3, 20, 5).masked_fill(~valid[..., None], torch.nan).requires_grad_()
    y, state = short_conv(x, normal(5, 3, seed=1), activation="silu", seg=Segments.from_valid(valid), backend="numba")
    (grad,) = torch.autograd.grad(y.sum() + state.sum(), x)
    assert_zero(grad[~valid], "gradient at padding")
    assert bool((grad[valid] != 0).all())


def test_export_keeps_the_operator():
    class Conv(torch.nn.Module):
        def forward(self, x, weight):
            return short_conv(x, weight, activation="silu")

    given = (normal(2, 8, 3), normal(3, 4, seed=1))
    program = torch.export.export(Conv(), given, dynamic_shapes=({1: torch.export.Dim("L", min=2)}, None))
    assert any("statewise" in str(node.target) for node in program.graph.nodes)
    longer = (normal(2, 11, 3), given[1])
    assert torch.equal(program.module()(*longer)[0], short_conv(*longer, activation="silu")[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.ones(2, 4)}, ValueError, r"x: want shape \(B, L, D\)"),
        ({"weight": torch.ones(4, 4)}, ValueError, "weight: want shape"),
        ({"weight": torch.ones(3, 9)}, ValueError, "K from 1 to 8"),
        ({"weight": torch.ones(3, 4).to(torch.complex64)}, TypeError, "weight: want a real floating tensor"),
        ({"bias": torch.ones(4)}, ValueError, "bias: want shape"),
        ({"activation": "relu"}, ValueError, "activation: want None or 'silu', got 'relu'"),
        ({"state": torch.ones(2, 4, 3)}, ValueError, "state: want shape"),
        ({"weight": torch.ones(3, 4).double()}, TypeError, "weight is torch.float64"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        short_conv(**{"x": torch.ones(2, 4, 3), "weight": torch.ones(3, 4), **options})


def test_matrix_holds_the_linear_part_only():
    with pytest.raises(ValueError, match="bias, activation: want None"):
        short_conv_matrix(torch.ones(3, 4), torch.ones(3), length=5)
    with pytest.raises(ValueError, match="length: want L"):
        short_conv_matrix(torch.ones(3, 4))


def test_explicit_numba_refuses_float64():
    with pytest.raises(BackendError, match="float32"):
        short_conv(torch.ones(2, 4, 3).double(), torch.ones(3, 4).double(), backend="numba")
