"""The kernels of the Vandermonde product against the definition."""

from __future__ import annotations

import pytest
import torch

from statewise import ops
from statewise.ops.lti import vandermonde
from statewise.testing import assert_no_worse

F32, F64 = torch.float32, torch.float64


def sample(D: int, N: int, lead: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    rate = 10 ** (-4 + 5 * torch.rand(D, N, generator=g))
    log_a = torch.complex(-rate, 6 * torch.rand(D, N, generator=g) - 3)
    return log_a, torch.randn(*lead, D, N, dtype=torch.complex64, generator=g)


@pytest.mark.parametrize(
    ("size", "lead", "length"),
    [((3, 5), (), 1), ((3, 5), (2,), 63), ((2, 1), (), 64), ((2, 4), (2, 2), 1025), ((3, 2), (), 5000)],
)
def test_kernels_are_as_good_as_the_closed_form(size, lead, length):
    log_a, coeff = sample(*size, lead)
    dk = torch.randn(*lead, size[0], length, generator=torch.Generator().manual_seed(2))

    def run(backend, wide):
        given = [t.to(torch.complex128) if wide else t for t in (log_a, coeff)]
        given = [t.clone().requires_grad_() for t in given]
        k = ops.diagonal_kernel(*given, length, backend=backend)
        return k, *torch.autograd.grad(k, given, dk.to(k.dtype))

    fast, plain, exact = run("numba", False), run("reference", False), run("reference", True)
    for name, *results in zip(("kernel", "gradient of log_a", "gradient of coeff"), fast, plain, exact):
        # Sixteen turns by a power that is rounded once.
        assert_no_worse(*results, 8.0, name)


def test_they_are_operators():
    log_a, coeff = sample(2, 3, ())
    args = []

    def record(*given):
        args.extend(given)
        return vandermonde._forward(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vandermonde, "_forward", record)
        ops.diagonal_kernel(log_a, coeff, 100, backend="numba")
    args = [t.requires_grad_() if isinstance(t, torch.Tensor) and i < 3 else t for i, t in enumerate(args)]
    torch.library.opcheck(torch.ops.statewise.vandermonde_numba.default, tuple(args))


def test_who_serves():
    log_a, coeff = sample(2, 3, ())
    assert vandermonde.reasons(log_a, coeff)["numba"] is None
    assert "float64" in vandermonde.reasons(log_a.to(torch.complex128), coeff)["numba"]
    assert "real ones" in vandermonde.reasons(log_a.real, coeff)["numba"]
    with pytest.raises(ops.BackendError, match="complex modes"):
        ops.diagonal_kernel(log_a.real, coeff.real, 9, backend="numba")
