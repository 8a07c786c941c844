"""Experts scored by sigmoid against the definition written out, and the plain MLP."""

from __future__ import annotations

import pytest
import torch

from statewise import blocks
from statewise.blocks import MLP, SigmoidMoE
from statewise.testing import assert_agree

F64 = torch.float64


def by_definition(moe: SigmoidMoE, x: torch.Tensor) -> torch.Tensor:
    """One position x (D,)."""
    score = 1 / (1 + torch.exp(-(moe.router.weight @ x)))
    corrected, size = score + moe.correction, moe.n_experts // moe.groups
    best = [sum(sorted(corrected[g * size : (g + 1) * size].tolist())[-2:]) for g in range(moe.groups)]
    open_to = sorted(range(moe.groups), key=lambda g: -best[g])[: moe.top_groups]
    allowed = [e for e in range(moe.n_experts) if e // size in open_to]
    chosen = sorted(allowed, key=lambda e: -float(corrected[e]))[: moe.top_k]
    weight = {e: score[e] / (sum(score[c] for c in chosen) if moe.renormalise else 1) for e in chosen}
    inside = x if moe.down is None else moe.down(x)
    y = sum(weight[e] * moe.scale * (moe.fc2[e] @ torch.relu(moe.fc1[e] @ inside) ** 2) for e in chosen)
    y = y if moe.up is None else moe.up(y)
    return y if moe.shared is None else y + moe.shared.fc2(torch.relu(moe.shared.fc1(x)) ** 2)


@pytest.mark.parametrize(
    "options",
    [
        {"n_experts": 5, "top_k": 2},
        {"n_experts": 6, "top_k": 3, "groups": 3, "top_groups": 2, "renormalise": False, "scale": 2.5},
        {"n_experts": 4, "top_k": 4, "latent": 3, "shared_hidden": 6, "bias": True},
        {"n_experts": 1, "top_k": 1},
    ],
    ids=str,
)
def test_it_is_the_definition(options):
    moe = SigmoidMoE(7, 5, **options).double()
    moe.correction.normal_()
    x = torch.randn(2, 9, 7, dtype=F64)
    want = torch.stack([torch.stack([by_definition(moe, t) for t in row]) for row in x])
    assert_agree(moe(x), want, "y")
    compiled = torch.compile(moe, backend="eager", fullgraph=True)
    assert_agree(compiled(x), want, "compiled")
    assert moe(x[:, :0]).shape == (2, 0, 7)


def test_the_correction_chooses_and_has_no_gradient():
    moe = SigmoidMoE(4, 3, n_experts=3, top_k=1, renormalise=False).double()
    x = torch.randn(1, 1, 4, dtype=F64)
    for e in range(3):
        moe.correction.zero_()[e] = 10
        expert, weight = moe.route(x[0])
        assert expert.item() == e
        assert_agree(weight, torch.sigmoid(x[0] @ moe.router.weight[e])[:, None], "its own score, uncorrected")
    assert "correction" in moe.state_dict()
    moe(x).sum().backward()
    assert bool((moe.router.weight.grad[2] != 0).any())


def test_a_router_in_float32_serves_half_precision():
    moe = SigmoidMoE(8, 4, n_experts=4, top_k=2).bfloat16()
    moe.router.float()
    y = moe(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_plain_mlp():
    mlp, x = MLP(4, 6, bias=True, activation="silu").double(), torch.randn(2, 4, dtype=F64)
    h = mlp.fc1(x)
    assert_agree(mlp(x), (h / (1 + torch.exp(-h))) @ mlp.fc2.weight.T + mlp.fc2.bias, "y")
    assert isinstance(blocks.create("mlp", 4, hidden=6), MLP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 4, "top_k": 5}, "top_k: want 1 to n_experts = 4, got 5"),
        ({"n_experts": 4, "top_k": 1, "groups": 3}, "groups: want 1, or a divisor of n_experts = 4"),
        ({"n_experts": 4, "top_k": 1, "groups": 4}, "leaves two or more in a group, got 4"),
        ({"n_experts": 4, "top_k": 3, "groups": 2}, "top_groups: want 1 to groups = 2, with top_k = 3 experts in them"),
        ({"n_experts": 4, "top_k": 1, "activation": "relu2"}, "unknown activation 'relu2'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SigmoidMoE(4, 3, **options)
