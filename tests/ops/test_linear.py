"""`linear` for a few rows: the kernel against float64, and when it stands back."""

import pytest
import torch
import torch.utils.flop_counter
from torch import nn

from statewise.mixers.layers import Linear
from statewise.ops import linear as package
from statewise.ops import use_backend
from statewise.ops.linear import ROWS, linear
from statewise.testing import assert_agree, assert_no_worse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "depth"), [(1, 1), (3, 15), (16, 16), (17, 31), (37, 100), (64, 33), (5, 512)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, ROWS])
def test_no_worse_than_pytorch(rows, outputs, depth, dtype):
    generator = torch.Generator().manual_seed(rows * depth)
    x, w, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((rows, depth), (outputs, depth), (outputs,)))
    with torch.no_grad():
        for bias in (b, None):
            exact = nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
            assert_no_worse(linear(x, w, bias), nn.functional.linear(x, w, bias), exact, 3.0, "y")


@pytest.fixture
def served(monkeypatch):
    """How often the kernel was taken."""
    from statewise.ops.linear import numba

    calls = []

    def product(*args):
        calls.append(args)
        return numba.product(*args)

    monkeypatch.setattr(package, "_few_rows", lambda: product)
    return calls


@pytest.mark.parametrize("native", [False, True])
def test_many_rows_of_bfloat16(native, monkeypatch):
    monkeypatch.setattr(package, "_multiplies_bfloat16", lambda: native)
    x, layer = torch.randn(ROWS + 1, 40).bfloat16(), Linear(40, 24).bfloat16()
    with torch.no_grad():
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        y, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert y.dtype is torch.bfloat16
    assert_no_worse(y, plain, exact, 2.0, "y")


def test_a_build_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert not package._multiplies_bfloat16.__wrapped__()


def test_leading_axes_and_views(served):
    layer, x = Linear(24, 10), torch.randn(2, 24, 3)
    with torch.no_grad():
        y = layer(x.mT)
        assert_agree(y, nn.functional.linear(x.mT, layer.weight, layer.bias), "y", 24)
    assert len(served) == 1


def test_stands_back_where_it_must(served):
    layer, x = Linear(8, 4), torch.randn(2, 8)
    assert layer(x).requires_grad  # a gradient is wanted
    with torch.no_grad():
        layer(torch.randn(ROWS + 1, 8))
        Linear(8, 4).double()(x.double())
        layer(torch.randn(0, 8))
        with use_backend("reference"):
            layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
        with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
            layer(x)
        assert flops.get_total_flops() == 2 * 2 * 8 * 4
        torch.vmap(layer)(x[None])
        torch.compile(layer, fullgraph=True, backend="eager")(x)
        linear(x, torch.randn(8, 4).T)  # rows of the weight are not dense
        linear(x, torch.randn(8))  # a vector, not a matrix
        linear(x, layer.weight, torch.randn(1))  # broadcast
        assert not served
        layer(x)
    assert len(served) == 1


def test_wrong_shapes_are_pytorchs_errors():
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            linear(torch.randn(2, 8), torch.randn(4, 7))
        with pytest.raises(RuntimeError, match="expand"):
            linear(torch.randn(2, 8), torch.randn(4, 8), torch.randn(3))
