"""Mixers made of mixers: from both ends of every document, and side by side."""

from __future__ import annotations

import pytest
import torch

from statewise import Segments, mixers
from statewise.mixers import Bidirectional, Parallel
from statewise.testing.tolerance import assert_agree

F64 = torch.float64
VARIANTS = [
    {"mixer": "attention"},
    {"mixer": {"name": "attention", "n_heads": 2}, "merge": "concat"},
    {"mixer": "attention", "options": {"rope": False}, "tied": True},
    {"mixer": {"name": "mamba2", "head_dim": 8}, "options": {"d_state": 4}},
    {"mixer": "mamba", "merge": "concat", "tied": True},
]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))


def build(**options) -> Bidirectional:
    return Bidirectional(8, **options).double()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_both_ends(options):
    mixer, x = build(**options), normal(2, 7, 8)
    ahead, behind = mixer.forward_mixer, mixer.backward_mixer or mixer.forward_mixer
    parts = [ahead(x), behind(x.flip(1)).flip(1)]
    want = mixer.out_proj(torch.cat(parts, -1)) if options.get("merge") == "concat" else sum(parts)
    assert_agree(mixer(x), want, "y", 7)
    # The first output sees the last token.
    x.requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[:, 0].sum(), x)
    assert bool((grad[:, -1] != 0).any())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_documents_are_turned_around_one_by_one(options):
    """A flip of the whole row would carry padding and other documents into the backward run."""
    mixer, x = build(**options), normal(2, 12, 8)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, [3, 11]] = False
    valid[1, :2] = False
    seg = Segments(torch.tensor([[*range(5), *range(7)], [1, 1, *range(10)]]), valid)
    y = mixer(x.masked_fill(~valid[..., None], torch.nan), seg)
    for b in range(2):
        for d in range(1, 3):
            where = (valid[b] & (seg.document[b] == d)).nonzero()[:, 0]
            if len(where):
                assert_agree(y[b, where], mixer(x[b : b + 1, where])[0], f"row {b}, document {d}", 12)
    assert bool((y[~valid] == 0).all())


def test_tied_directions_share_their_parameters():
    tied, free = build(mixer="attention", tied=True), build(mixer="attention")
    assert 2 * sum(p.numel() for p in tied.parameters()) == sum(p.numel() for p in free.parameters())
    assert len(tied.state_dict()) == len({t.data_ptr() for t in tied.state_dict().values()})


def test_turned_around_input_with_tied_directions():
    """With one module for both, the mixer commutes with turning time around."""
    mixer, x = build(mixer="attention", tied=True), normal(2, 7, 8)
    assert_agree(mixer(x.flip(1)), mixer(x).flip(1), "y", 7)


def test_default_is_mamba2():
    mixer = mixers.create("bidirectional", 64)
    assert type(mixer.forward_mixer).__name__ == "Mamba2"
    assert mixer(torch.randn(1, 5, 64)).shape == (1, 5, 64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"merge": "mean"}, ValueError, "merge: want 'add' or 'concat', got 'mean'"),
        ({"mixer": "mamba22"}, ValueError, "unknown mixer 'mamba22'; did you mean"),
        ({"mixer": {"d_state": 4}}, TypeError, "mixer: want a name or a dict with a 'name'"),
        ({"mixer": "attention", "options": {"heads": 2}}, TypeError, "option of attention 'heads'"),
        (
            {"mixer": {"name": "mamba", "d_state": 4}, "options": {"d_state": 8}},
            ValueError,
            "d_state is given in mixer",
        ),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Bidirectional(8, **options)


def test_side_by_side():
    mixer = Parallel(8, ["mamba", {"name": "attention", "n_heads": 2}], in_scales=[3, 1], out_scales=[1, -0.5]).double()
    x = normal(2, 7, 8)
    mamba, attention = mixer.branches
    assert_agree(mixer(x), mamba(3 * x) - 0.5 * attention(x), "y", 7)
    _, state = mixer.extend(x, mixer.init_state(2, capacity=9, dtype=F64))
    assert state[1].k.shape[1] == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixers": []}, "mixers: want a list of at least one mixer"),
        ({"mixers": "mamba"}, "mixers: want a list of at least one mixer, got 'mamba'"),
        ({"mixers": ["mamba", "bidirectional"]}, "want causal mixers, and 'bidirectional' is not"),
        ({"mixers": ["mamba", "attention"], "in_scales": [1.0]}, "in_scales: want one factor for each of 2 mixers"),
    ],
)
def test_bad_branches(options, message):
    with pytest.raises(ValueError, match=message):
        Parallel(8, **options)
