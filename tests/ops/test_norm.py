"""The norms' kernels against their definition, in float64 and in the dtype itself."""

from __future__ import annotations

import pytest
import torch

from statewise.ops import norm
from statewise.ops.norm import gated_rms_norm, rms_norm
from statewise.testing import assert_agree, assert_no_worse


def draw(shape, gate, weight, dtype):
    x, z = torch.randn(*shape).to(dtype), torch.randn(*shape[:-1], 2 * shape[-1])[..., : shape[-1]].to(dtype)
    return [x, z if gate else None, torch.randn(shape[-1]) if weight else None]


def run(given, dy, groups, dtype, backend):
    given = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in given]
    x, z, weight = given
    if z is None:
        y = rms_norm(x, weight, groups=groups, backend=backend)
    else:
        y = gated_rms_norm(x, z, weight, groups=groups, backend=backend)
    return y, *torch.autograd.grad(y, [t for t in given if t is not None], dy.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "groups", "gate", "weight"),
    [
        ((2, 7, 48), 1, True, True),
        ((5, 36), 3, False, True),
        ((3, 20), 1, True, False),
        ((2, 3, 4, 5), 1, False, False),
    ],
)
def test_kernels_are_no_worse_than_the_definition(shape, groups, gate, weight, dtype):
    given, dy = draw(shape, gate, weight, dtype), torch.randn(*shape).to(dtype)
    fast, plain = (run(given, dy, groups, None, backend) for backend in ("numba", "reference"))
    exact = run(given, dy, groups, torch.float64, "reference")
    for name, *results in zip(("y", "dx", "dz", "dweight"), fast, plain, exact):
        assert_no_worse(*results, 3.0, name)


@pytest.mark.parametrize("given", [(True, True), (False, False)])
def test_kernels_are_operators(given):
    x, z, weight = draw((2, 3, 8), *given, torch.float32)
    tensors = [None if t is None else t.requires_grad_() for t in (x, z, weight)]
    torch.library.opcheck(torch.ops.statewise.rms_norm_numba.default, (*tensors, 1e-5, 2))


def test_the_formula():
    x, z = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    h = x * z * torch.sigmoid(z)
    assert_agree(gated_rms_norm(x, z, eps=0.1), h / (h.pow(2).mean(-1, keepdim=True) + 0.1).sqrt(), "gated", 8)


def test_what_broadcasts_is_left_to_the_definition():
    x, z = torch.randn(2, 3, 8), torch.randn(1, 1, 8)
    assert "do not broadcast" in norm.reasons(x, z, None, 1)["numba"]
    assert gated_rms_norm(x, z).shape == x.shape


def test_groups_must_divide():
    with pytest.raises(ValueError, match="divisor of the width 8, got 3"):
        rms_norm(torch.randn(2, 8), groups=3)
