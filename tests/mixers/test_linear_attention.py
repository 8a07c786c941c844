"""Linear and normalised attention against their quadratic definitions, written out here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statewise import mixers
from statewise.testing import assert_agree

L = 33


def heads(t, n):
    return t.unflatten(-1, (n, -1)).transpose(1, 2)  # (B, H, L, P)


def definition(mixer, x, scores):
    """out(scores(q, k) v) with scores (B, H, L, L), as in the papers."""
    n = mixer.n_heads
    q, k, v = heads(mixer.q_proj(x), n), heads(mixer.k_proj(x), n), heads(mixer.v_proj(x), n)
    y = scores(q, k) @ v
    return mixer.out_proj(y.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_linear_attention():
    torch.manual_seed(0)
    mixer = mixers.LinearAttention(12, n_heads=2, key_dim=5).double()
    x = torch.randn(2, L, 12, dtype=torch.float64)

    def scores(q, k):
        weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
        return weights / weights.sum(-1, keepdim=True)

    assert_agree(mixer(x), definition(mixer, x, scores), "linear attention", L)


@torch.no_grad()
def test_second_order_attention():
    torch.manual_seed(0)
    mixer = mixers.LinearAttention(12, n_heads=2, key_dim=4, feature_map="taylor").double()
    x = torch.randn(2, L, 12, dtype=torch.float64)

    def scores(q, k):
        dot = q @ k.mT / 2  # the root of key_dim
        weights = (1 + dot + dot**2 / 2).tril()
        return weights / weights.sum(-1, keepdim=True)

    assert mixer.n_features == 15
    assert_agree(mixer(x), definition(mixer, x, scores), "second-order attention", L)


@torch.no_grad()
def test_normalised_attention():
    torch.manual_seed(0)
    mixer = mixers.NormalizedAttention(12, n_heads=3).double()
    x = torch.randn(2, L, 12, dtype=torch.float64)
    n = mixer.n_proj(x).transpose(1, 2)
    want = definition(mixer, x, lambda q, k: (q @ k.mT).tril() / n.exp()[..., None])
    assert_agree(mixer(x), want, "normalised attention", L)
    # No score is made positive, and no row sums to one.
    dense = mixer.matrix(x)
    assert (dense < 0).any()
    assert not torch.allclose(dense.sum(-1), torch.ones(()).double())


def test_state_is_as_large_as_the_expansion_says():
    mixer = mixers.LinearAttention(12, n_heads=2, key_dim=4, head_dim=3, feature_map="taylor")
    assert mixer.init_state(5).kv.shape == (5, 2, 3 + 1, 15)
    assert mixers.NormalizedAttention(12, n_heads=2, key_dim=4, head_dim=3).init_state(5).kv.shape == (5, 2, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "n_heads: want a divisor of d_model = 12, or key_dim and head_dim, got 5"),
        ({"n_heads": 5, "key_dim": 3}, "n_heads: want a divisor"),
        ({"key_dim": 0}, "key_dim: want a positive width, got 0"),
        ({"feature_map": "elo"}, "unknown feature_map 'elo'; did you mean 'elu'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        mixers.LinearAttention(12, **options)
