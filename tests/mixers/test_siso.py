"""What S4 and S4D share: two directions against explicit sums, and other sampling rates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statewise.mixers import S4, S4D, BidirectionalS4, BidirectionalS4D
from statewise.segments import Segments
from statewise.testing import assert_agree

F64 = torch.float64
BARE = {"activation": "none", "glu": False}


def two_sided(x: Tensor, before: Tensor, after: Tensor, skip: Tensor) -> Tensor:
    L = x.shape[1]
    y = x * skip
    for t in range(L):
        for s in range(L):
            y[:, t] += (before[:, t - s] if s <= t else after[:, s - t - 1]) * x[:, s]
    return y


@pytest.mark.parametrize(("two", "one"), [(BidirectionalS4, S4), (BidirectionalS4D, S4D)])
def test_the_backward_kernel_begins_at_the_next_token(two, one):
    m = two(4, d_state=8, n_ssm=2, **BARE).double()
    alone = one(4, d_state=8, n_ssm=2, **BARE).double()
    kernels = []
    for C in m.C:
        state = {k: v for k, v in m.state_dict().items() if k != "C"} | {"C": C}
        alone.load_state_dict(state)
        kernels.append(alone.kernels(12).detach())
    assert_agree(m.kernels(12), torch.stack(kernels), "kernels", 12)
    x = torch.randn(2, 12, 4, dtype=F64)
    want = two_sided(x, *kernels, m.D.detach())
    assert_agree(m(x), want, "y", 12)
    seg = Segments.pack([[5, 7], [12]])
    packed = torch.cat([two_sided(x[:1, :5], *kernels, m.D.detach()), two_sided(x[:1, 5:], *kernels, m.D.detach())], 1)
    assert_agree(m(x, seg), torch.cat([packed, want[1:]]), "per document", 12)


# Input is held over a step, so for a smooth signal the error is in proportion to the step.
@pytest.mark.parametrize("cls", [S4, S4D])
def test_half_the_sampling_rate(cls):
    def error(steps: int) -> float:
        torch.manual_seed(3)
        m = cls(4, d_state=8, dt_min=4 / steps, dt_max=4 / steps, **BARE).double()
        t = torch.linspace(0, 6, steps + 1, dtype=F64)
        x = torch.sin(t).reshape(1, -1, 1).expand(1, -1, 4)
        fine = m(x)[:, ::2]
        m.rate = 2.0
        return ((m(x[:, ::2]) - fine).abs().max() / fine.abs().max()).item()

    assert error(2000) < 0.6 * error(1000) < 0.6 * 0.6 * error(500)
