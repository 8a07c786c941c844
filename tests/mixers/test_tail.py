"""The gated tail, in both of its orders, against its formula with the masks drawn again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statewise import mixers
from statewise.mixers.layers import GatedTail, Linear, gated_tail


@pytest.mark.parametrize("twice", [False, True])
def test_where_it_drops(twice):
    y, linear = torch.randn(3, 7, 6), Linear(6, 12)
    torch.manual_seed(2)
    masks = [F.dropout(torch.ones(3, 1, 6), 0.4) for _ in range(2)]
    assert all(0 < int((mask == 0).sum()) < mask.numel() for mask in masks)
    want = F.gelu(y * masks[0]) * masks[1] if twice else F.gelu(y) * masks[0]
    torch.manual_seed(2)
    got = gated_tail(y, "gelu", linear, 0.4, twice=twice)
    value, gate = linear(want).chunk(2, -1)
    assert torch.equal(got, value * torch.sigmoid(gate))


@pytest.mark.parametrize(("name", "share"), [("s4", 0.75), ("s4d", 0.75), ("lru", 0.5), ("dss", 0.5)])
def test_which_mixer_drops_how_often(name, share):
    """S4 and S4D drop before and after their activation, as their authors' code does; the others after it only."""
    mixer = mixers.create(name, 4096, d_state=2, dropout=0.5, activation="none", glu=False).train()
    dropped = (mixer(torch.randn(1, 2, 4096)) == 0).float().mean().item()
    assert abs(dropped - share) < 5 * (share * (1 - share) / 4096) ** 0.5  # five standard errors


def test_nothing_is_dropped_outside_of_training():
    tail, y = GatedTail(6, "none", glu=False, dropout=0.5).eval(), torch.randn(2, 5, 6)
    assert torch.equal(tail(y), y)
    assert not torch.equal(tail.train()(y), y)
