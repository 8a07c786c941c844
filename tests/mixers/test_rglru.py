"""RG-LRU against its formula written out, against the block of transformers, and its initial values."""

from __future__ import annotations

import math

import pytest
import torch

from statewise import Segments
from statewise.mixers import RGLRU
from statewise.mixers.rglru import MAX_SLOPE, sqrt_bounded
from statewise.testing import assert_agree

F64 = torch.float64


def by_formula(m: RGLRU, x: torch.Tensor) -> torch.Tensor:
    """One document x (L, D), token by token and channel by channel."""
    u, K = m.x_proj(x), m.conv1d.width
    past = torch.cat([torch.zeros(K - 1, m.d_rnn, dtype=F64), u])
    v = torch.stack([(past[t : t + K] * m.conv1d.weight.T).sum(0) + m.conv1d.bias for t in range(len(x))])
    H, W = m.input_gate.bias.shape
    gate = {}
    for name in ("input_gate", "recurrence_gate"):
        module = getattr(m, name)
        columns = [v[:, h * W : (h + 1) * W] @ module.weight[h] + module.bias[h] for h in range(H)]
        gate[name] = 1 / (1 + torch.exp(-torch.cat(columns, -1)))
    h, out = torch.zeros(m.d_rnn, dtype=F64), []
    for t in range(len(x)):
        a = torch.exp(-8 * torch.log1p(m.Lambda.exp()) * gate["recurrence_gate"][t])
        scale = torch.ones_like(a) if t == 0 else torch.sqrt(1 - a**2)
        h = a * h + scale * gate["input_gate"][t] * v[t]
        out.append(h)
    z = m.gate_proj(x)
    gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return m.out_proj(torch.stack(out) * gelu)


@pytest.mark.parametrize("options", [{}, {"d_rnn": 18, "n_blocks": 3, "d_conv": 2}])
def test_it_is_the_formula(options):
    m = RGLRU(12, **options).double()
    torch.nn.init.normal_(m.input_gate.bias)
    x = torch.randn(2, 29, 12, dtype=F64)
    y = m(x)
    for b in range(2):
        assert_agree(y[b], by_formula(m, x[b]), "y", 29)


def test_each_document_begins_unscaled():
    """In a packed row, behind padding, and in a new state; but not where a document goes on."""
    m = RGLRU(6).double()
    x = torch.randn(1, 9, 6, dtype=F64)
    with torch.no_grad():
        want = torch.cat([by_formula(m, x[0, :4]), by_formula(m, x[0, 4:])])
        assert_agree(m(x, Segments.pack([[4, 5]]))[0], want, "packed", 9)
        # A row whose first token is in the middle of a document of which nothing was seen.
        assert_agree(m(x[:, 4:], Segments.continuing(1, 5, start=7))[0], want[4:], "no state to go on from", 9)
        _, state = m.extend(x[:, :4], m.init_state(1, dtype=F64))
        assert state.begun.tolist() == [True]
        y, _ = m.extend(x[:, 4:], state, Segments.continuing(1, 5, start=4))
        assert_agree(y[0], by_formula(m, x[0])[4:], "gone on", 9)
        nothing = Segments(torch.ones(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool))
        assert m.extend(x[:, :2], m.init_state(1, dtype=F64), nothing)[1].begun.tolist() == [False]


@pytest.mark.parametrize(("heads", "width"), [(4, 32), (5, 35)])
def test_transformers_block(heads, width):
    family = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = pytest.importorskip("transformers").RecurrentGemmaConfig(
        hidden_size=width, lru_width=width, num_attention_heads=heads, num_hidden_layers=1
    )
    theirs, ours = family.RecurrentGemmaRecurrentBlock(config, 0), RGLRU(width, n_blocks=heads)
    lru = theirs.rg_lru
    pairs = [
        (ours.x_proj.weight, theirs.linear_x.weight), (ours.x_proj.bias, theirs.linear_x.bias),
        (ours.gate_proj.weight, theirs.linear_y.weight), (ours.gate_proj.bias, theirs.linear_y.bias),
        (ours.conv1d.weight, theirs.conv_1d.weight), (ours.conv1d.bias, theirs.conv_1d.bias),
        (ours.input_gate.weight, lru.input_gate_weight), (ours.input_gate.bias, lru.input_gate_bias),
        (ours.recurrence_gate.weight, lru.recurrent_gate_weight), (ours.recurrence_gate.bias, lru.recurrent_gate_bias),
        (ours.Lambda, lru.recurrent_param),
        (ours.out_proj.weight, theirs.linear_out.weight), (ours.out_proj.bias, theirs.linear_out.bias),
    ]  # fmt: skip
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.reshape(other.shape))
    assert len(pairs) == len(list(theirs.parameters())) == len(list(ours.parameters()))
    x, direction = torch.randn(2, 33, width), torch.randn(2, 33, width)
    want, _ = theirs(x, torch.arange(33)[None], None, use_cache=False)
    got = ours(x)
    (want * direction).sum().backward()
    (got * direction).sum().backward()
    # Theirs loses digits in 1 - a^2 when a is near 1; so nothing tighter than the promised figure.
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    for mine, other in pairs:
        assert (mine.grad.reshape(other.shape) - other.grad).abs().max() <= 1e-4 * other.grad.abs().max()


def test_initial_decays():
    m = RGLRU(4096, a_range=(0.8, 0.95))
    radius = torch.exp(-torch.nn.functional.softplus(m.Lambda.double()))
    assert 0.8 < radius.min() < 0.802
    assert 0.949 < radius.max() < 0.95
    # The square is uniform.
    middle = (radius.square().median() - 0.8**2) / (0.95**2 - 0.8**2)
    assert abs(middle - 0.5) < 0.05


def test_the_root_has_a_bounded_slope():
    x = torch.tensor([0.0, 1e-12, 1e-7, 1e-3, 0.5], dtype=F64, requires_grad=True)
    y = sqrt_bounded(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert_agree(y, x.detach().sqrt(), "values")
    assert_agree(slope, torch.tensor([1000, 1000, 1000, 0.5 / 1e-3**0.5, 0.5 / 0.5**0.5], dtype=F64), "slopes")
    assert MAX_SLOPE == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_blocks": 5}, "n_blocks: want a divisor of d_rnn = 12, got 5"),
        ({"a_range": (0.9, 1.0)}, "a_range: want 0 < low <= high < 1"),
        ({"d_conv": 9}, "d_conv: want a width from 1 to 8"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RGLRU(12, **options)
