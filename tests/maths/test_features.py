import math

import pytest
import torch

from statewise.maths.features import elu_features, taylor_features, taylor_width
from statewise.testing import assert_agree


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_inner_products_are_the_series(order):
    generator = torch.Generator().manual_seed(order)
    q, k = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    phi, psi = taylor_features(q, order), taylor_features(k, order)
    assert phi.shape[-1] == taylor_width(4, order) == math.comb(4 + order, order)
    dot = (q * k).sum(-1)
    assert_agree((phi * psi).sum(-1), sum(dot**j / math.factorial(j) for j in range(order + 1)), "series")


def test_an_order_below_zero_is_refused():
    with pytest.raises(ValueError, match="order: want 0 or more, got -1"):
        taylor_features(torch.zeros(1, 2), -1)


def test_elu_features_keep_their_digits_far_below_zero():
    x = torch.tensor([-80.0, -3.0, 0.0, 2.0])
    want = torch.tensor([math.exp(-80), math.exp(-3), 1.0, 3.0])
    assert_agree(elu_features(x) / want, torch.ones(4), "elu + 1, relative")
    x.requires_grad_()
    (g,) = torch.autograd.grad(elu_features(x).sum(), x)
    assert_agree(g, torch.tensor([math.exp(-80), math.exp(-3), 1.0, 1.0]), "slope")
