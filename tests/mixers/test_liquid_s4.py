"""Liquid-S4 against the liquid recurrence that it expands, term by term."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from statewise.mixers import S4D, LiquidS4
from statewise.segments import Segments
from statewise.testing import assert_agree

F64 = torch.float64
BARE = {"activation": "none", "glu": False}


def system(m: LiquidS4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A_bar, B_bar, C (D, N/2) and the skip weight, with gradients cut."""
    with torch.no_grad():
        log_a, b, c, skip = m.ssm.discrete()
        return log_a.exp(), b, c, skip


def liquid(m: LiquidS4, x: Tensor) -> Tensor:
    """The liquid recurrence itself: x_t = (A + B u_t) x_{t-1} + B u_t."""
    a, b, c, skip = system(m)
    h, out = torch.zeros(len(x), *a.shape, dtype=a.dtype), []
    for u in x.unbind(1):
        h = (a + b * u[..., None]) * h + b * u[..., None]
        out.append(2 * (c * h).sum(-1).real + skip * u)
    return torch.stack(out, 1)


def terms(m: LiquidS4, x: Tensor, kept) -> Tensor:
    """The liquid recurrence multiplied out: the sum, over sets of times s_1 < ... < s_p <= t for which `kept`, of
    C A^(t - s_1 + 1 - p) B^p u_(s_1) ... u_(s_p)."""
    a, b, c, skip = system(m)
    y = skip * x
    for t in range(x.shape[1]):
        for p in range(1, t + 2):
            for times in combinations(range(t + 1), p):
                if kept(times):
                    weight = 2 * (c * a ** (t - times[0] + 1 - p) * b**p).sum(-1).real
                    y[:, t] += weight * x[:, list(times)].prod(1)
    return y


def consecutive(times: tuple[int, ...]) -> bool:
    return times[-1] - times[0] == len(times) - 1


@pytest.mark.parametrize("degree", [2, 3, 5])
def test_kb_keeps_the_terms_of_neighbours(degree):
    m = LiquidS4(2, d_state=4, degree=degree, kernel="kb", dt_min=0.1, dt_max=1.0, **BARE).double()
    x = torch.randn(2, 8, 2, dtype=F64)
    # All terms together are the liquid recurrence, which checks the expansion itself.
    assert_agree(terms(m, x, lambda times: True), liquid(m, x), "expansion", 8)
    want = terms(m, x, lambda times: len(times) <= degree and consecutive(times))
    assert_agree(m(x), want, "kb", 8)


def test_kb_is_the_liquid_recurrence_where_nothing_else_is_remembered():
    m = LiquidS4(3, d_state=4, degree=8, kernel="kb", discretization="zoh", dt_min=0.3, dt_max=0.3, **BARE).double()
    with torch.no_grad():
        m.ssm.A_real.fill_(8.0)  # A_bar = exp(-0.3 exp(8)) = 0
        m.ssm.B.mul_(1000.0)  # and B_bar = B / exp(8)
    x = torch.randn(2, 8, 3, dtype=F64)
    assert_agree(m(x), liquid(m, x), "y", 8)


@pytest.mark.parametrize("degree", [2, 4])
def test_pb_adds_products_at_once(degree):
    m = LiquidS4(3, d_state=4, degree=degree, dt_min=0.1, dt_max=1.0, **BARE).double()
    x = torch.randn(2, 30, 3, dtype=F64)
    _, b, c, _ = system(m)
    want = m.ssm(x)
    for p in range(2, degree + 1):
        for t in range(p - 1, 30):
            want[:, t] = want[:, t] + 2 * (c * b**p).sum(-1).real * x[:, t - p + 1 : t + 1].prod(1)
    assert_agree(m(x), want, "pb", 30)
    # What sets "kb" apart is that products are remembered.
    other = LiquidS4(3, d_state=4, degree=degree, kernel="kb", **BARE).double()
    other.load_state_dict(m.state_dict())
    assert_agree(other(x)[:, :2], m(x)[:, :2], "before there is anything to remember", 2)
    assert not torch.allclose(other(x), m(x))


@pytest.mark.parametrize("kernel", ["kb", "pb"])
def test_without_neighbours_it_is_s4d(kernel):
    m = LiquidS4(3, d_state=4, degree=2, kernel=kernel, dt_min=0.1, dt_max=1.0, **BARE).double()
    x = torch.randn(2, 30, 3, dtype=F64)
    x[:, ::2] = 0
    assert_agree(m(x), m.ssm(x), "every second input is zero", 30)
    assert isinstance(m.ssm, S4D)
    assert m.ssm.discretization == "bilinear"


@pytest.mark.parametrize("kernel", ["kb", "pb"])
def test_products_end_where_documents_end(kernel):
    m = LiquidS4(3, d_state=4, degree=4, kernel=kernel, dt_min=0.5, dt_max=1.0).double()
    x = torch.randn(1, 12, 3, dtype=F64)
    alone = torch.cat([m(x[:, :5]), m(x[:, 5:7]), m(x[:, 7:])], 1)
    assert_agree(m(x, Segments.pack([[5, 2, 5]])), alone, "packed", 12)
    padded = torch.full((1, 15, 3), torch.nan, dtype=F64)
    where = torch.tensor([0, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14])
    padded[:, where] = x
    valid = torch.zeros(1, 15, dtype=torch.bool)
    valid[:, where] = True
    # Neighbours are neighbours among the valid inputs.
    assert_agree(m(padded, Segments.from_valid(valid))[:, where], m(x), "padding inside", 15)


def test_state_holds_the_last_inputs():
    m = LiquidS4(3, d_state=4, degree=4)
    x = torch.randn(2, 9, 3)
    _, state = m.extend(x, m.init_state(2))
    assert torch.equal(state.inputs, x[:, -3:])
    assert state.ssm.shape == (2, 3, 2)
    _, early = m.extend(x[:, :2], None)
    assert torch.equal(early.inputs, torch.cat([torch.zeros(2, 1, 3), x[:, :2]], 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "bp"}, "did you mean 'pb'"),
        ({"degree": 1}, "degree: want 2 to 8, got 1"),
        ({"degree": 9}, "degree: want 2 to 8, got 9"),
        ({"d_state": 5}, "even number"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LiquidS4(4, **options)
