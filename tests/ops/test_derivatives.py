"""Derivatives of higher order, and transforms of torch.func, of what kernels compute (ops with laws: there too)."""

from functools import partial

import pytest
import torch

from statewise import ops
from statewise.ops.lti.moments import moments
from statewise.testing import assert_agree, assert_no_worse
from statewise.testing.cases import generator_for
from statewise.testing.tolerance import double


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=generator_for(shape))


def poles(*shape):
    return torch.complex(-0.1 - normal(*shape).abs(), normal(*shape) * 2)


def cplx(*shape):
    return normal(*shape, dtype=torch.complex64)


def through(backend, function, *inputs):
    with ops.use_backend(backend):
        return function(*inputs)


CALLS = {
    "diagonal_kernel": (partial(ops.diagonal_kernel, length=30), lambda: (poles(4, 3), cplx(2, 4, 3))),
    "moments": (
        lambda u, log_a, backend: through(backend, moments, u, log_a),
        lambda: (normal(2, 30, 4), poles(4, 3)),
    ),
    "cauchy": (partial(ops.cauchy, length=16), lambda: (cplx(2, 4, 3), poles(4, 3))),
    "rms_norm": (ops.rms_norm, lambda: (normal(2, 5, 8), normal(8))),
    "gated_rms_norm": (ops.gated_rms_norm, lambda: (normal(2, 5, 8), normal(5, 2, 8).transpose(0, 1), normal(8))),
    "lti_conv": (
        lambda u, kernel, future, backend: ops.lti_conv(u, kernel, future=future, backend=backend),
        lambda: (normal(2, 20, 4), normal(4, 20), normal(4, 5)),
    ),
}


def real(t):
    return torch.view_as_real(t) if t.is_complex() else t


def tower(function, inputs, order):
    """Derivatives up to `order`, each of a sum of squares of those before."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    found = [function(*inputs)]
    for n in range(order):
        total = sum(real(t).square().sum() for t in found)
        found = list(torch.autograd.grad(total, inputs, create_graph=n + 1 < order))
    return found


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", CALLS)
def test_as_plain_pytorch(name, order):
    function, make = CALLS[name]
    inputs = make()
    kernel, plain = (tower(partial(function, backend=b), inputs, order) for b in ("numba", "reference"))
    truth = tower(partial(function, backend="reference"), [double(t) for t in inputs], order)
    for i, parts in enumerate(zip(kernel, plain, truth)):
        assert (parts[2] != 0).any()
        assert_no_worse(*parts, 4.0, f"{name}: derivative {order} in input {i}")


def dependent(x):
    """All inputs of the scan are made from one, which must not be counted twice."""
    dt = 0.1 + 0.3 * x.square()
    return ops.selective_scan(x, dt, -torch.ones(4, 3, dtype=x.dtype), x[..., :3], x[..., 1:].sin())[0].sin().sum()


def test_hessian_of_one_input_in_many_places():
    x = normal(1, 9, 4)
    kernel = torch.autograd.functional.hessian(dependent, x)
    with ops.use_backend("reference"):
        plain, truth = (torch.autograd.functional.hessian(dependent, t) for t in (x, double(x)))
    assert_no_worse(kernel, plain, truth, 4.0, "hessian")


def test_transforms_of_torch_func():
    x, v = normal(1, 9, 4), normal(9, 1, 4).transpose(0, 1)
    want = torch.autograd.functional.hessian(dependent, x)
    assert_agree(torch.func.hessian(dependent)(x), want, "hessian", 9)
    assert_agree(torch.func.jacrev(torch.func.grad(dependent))(x), want, "jacrev of grad", 9)
    slope = torch.autograd.functional.jacobian(dependent, x)
    assert_agree(torch.func.jvp(dependent, (x,), (v,))[1], (slope * v).sum(), "jvp", 9)
    with torch.autograd.forward_ad.dual_level():
        y = dependent(torch.autograd.forward_ad.make_dual(x, v))
        assert_agree(torch.autograd.forward_ad.unpack_dual(y).tangent, (slope * v).sum(), "forward differentiation", 9)
    a, xs = normal(1, 9, 4).sigmoid(), normal(5, 1, 9, 4)
    want = torch.stack([ops.linear_scan(a, x)[0] for x in xs])
    assert_agree(torch.func.vmap(lambda x: ops.linear_scan(a, x)[0])(xs), want, "vmap", 9)


def test_a_kernel_that_is_asked_for_says_why_it_does_not_serve():
    with pytest.raises(ops.BackendError, match=r"transform of torch\.func"):
        torch.func.grad(lambda x: ops.linear_scan(torch.tensor([0.5]), x, backend="numba")[0].sum())(normal(1, 9, 1))
