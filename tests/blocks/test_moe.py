"""The mixture of experts against its definition, position by position."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

import statewise
from statewise import blocks
from statewise.blocks import MoE
from statewise.testing import assert_agree


def by_definition(moe: MoE, x: torch.Tensor, top_k: int, renormalise: bool) -> torch.Tensor:
    p = torch.softmax(x @ moe.router.weight.T, -1)
    chosen = p.sort(-1, descending=True).indices[:top_k]
    total = p[chosen].sum() if renormalise else 1
    y = torch.zeros_like(x)
    for e in chosen.tolist():
        value, gate = (moe.fc1[e] @ x).chunk(2)
        y = y + p[e] / total * (moe.fc2[e] @ (value * silu(gate)))
    return y if moe.shared is None else y + moe.shared(x)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1, "renormalise": False}, {"top_k": 3, "shared_hidden": 4}, {"top_k": 2, "renormalise": False}],
)
def test_definition(options):
    moe = MoE(6, 5, n_experts=7, **options).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    y = moe(x)
    rows = [by_definition(moe, row, options["top_k"], options.get("renormalise", True)) for row in x.flatten(0, 1)]
    want = torch.stack(rows).view_as(y)
    assert_agree(y, want, "y")
    direction = torch.randn_like(y)
    inputs = [x, *moe.parameters()]
    got = torch.autograd.grad((y * direction).sum(), inputs)
    for (name, _), a, b in zip(
        [("x", x), *moe.named_parameters()], got, torch.autograd.grad((want * direction).sum(), inputs)
    ):
        assert_agree(a, b, f"gradient of {name}")


def test_experts_without_positions_and_positions_without_number():
    moe = MoE(4, 3, n_experts=5, top_k=2)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[3:, 0] = 100
    x = torch.rand(1, 6, 4) + 0.1  # all go to experts 3 and 4
    assert set(moe.route(x)[0].flatten().tolist()) == {3, 4}
    moe(x).sum().backward()
    assert not moe.fc1.grad[:3].any()
    assert moe.fc1.grad[3:].any()
    assert moe(x[:, :0]).shape == (1, 0, 4)


def test_compiled_is_eager():
    moe = MoE(8, 6, n_experts=4, top_k=2).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert_agree(torch.compile(moe, fullgraph=True, backend="eager")(x), moe(x), "compiled")


def test_deterministic_whatever_else_is_in_the_batch():
    moe = MoE(8, 6, n_experts=4, top_k=2, shared_hidden=3)
    x = torch.randn(3, 7, 8)
    with torch.no_grad(), statewise.deterministic():
        whole = moe(x)
        assert torch.equal(moe(x[1:2, 3:4]), whole[1:2, 3:4])


def test_bad_options():
    assert blocks.names() == ["gated", "mlp", "moe", "sigmoid_moe"]
    for change, message in (
        ({"top_k": 6}, "MoE: top_k: want 1 to n_experts = 5, got 6"),
        ({"n_experts": 0}, "MoE: n_experts: want at least 1, got 0"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
    ):
        with pytest.raises(ValueError, match=message):
            blocks.create("moe", 4, **{"hidden": 3, "n_experts": 5, "top_k": 2, **change})
    with pytest.raises(ValueError, match="unknown feed-forward part 'moes'; did you mean 'moe'"):
        blocks.create("moes", 4)
    with pytest.raises(TypeError, match="unknown option of gated 'hiden'; did you mean 'hidden'"):
        blocks.create("gated", 4, hiden=3)
