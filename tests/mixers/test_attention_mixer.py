"""What is particular to the attention mixer: rotary positions, grouped heads, the size of its state."""

from __future__ import annotations

import pytest
import torch

from statewise import Segments, state
from statewise.mixers import Attention, create
from statewise.mixers.attention import rotate
from statewise.ops import KVBuffer, KVState
from statewise.testing.tolerance import assert_agree

F64 = torch.float64
OPTIONS = [
    {},
    {"n_heads": 4, "n_kv_heads": 2},
    {"n_heads": 4, "n_kv_heads": 1, "head_dim": 6, "bias": True},
    {"window": 3},
    {"rope": False},
    {"n_heads": 2, "rope_dim": 4, "scale": 0.9},
]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))


def build(**options) -> Attention:
    return Attention(16, **options).double()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("capacity", [None, 9])
def test_every_way_of_running(options, capacity):
    mixer, x = build(**options), normal(2, 9, 16)
    whole = mixer(x)
    kept, ys = mixer.init_state(2, capacity=capacity, dtype=F64), []
    for t in range(4):
        y, kept = mixer.step(x[:, t], kept)
        ys.append(y[:, None])
    y, kept = mixer.extend(x[:, 4:], kept)
    assert_agree(torch.cat([*ys, y], 1), whole, "steps, then extend", 9)
    mixing = mixer.mixing(x)
    assert_agree(mixing.emit(mixing.apply()), whole, "matrix", 9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_and_padded_rows(options):
    """Documents in one row, wherever padding stands, give what each gives alone; so does the matrix."""
    mixer, x = build(**options), normal(2, 12, 16)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, [2, 5, 11]] = False
    valid[1, :3] = False
    seg = Segments(torch.tensor([[*range(5), *range(7)], [*range(12)]]), valid)
    seg = Segments(seg.position.masked_fill(~valid & (seg.position == 0), 1), valid)
    y = mixer(x.masked_fill(~valid[..., None], torch.nan), seg)
    for b in range(2):
        for d in range(3):
            where = (valid[b] & (seg.document[b] == d)).nonzero()[:, 0]
            assert_agree(y[b, where], mixer(x[b : b + 1, where])[0], f"row {b}, document {d}", 12)
    assert bool((y[~valid] == 0).all())
    mixing = mixer.mixing(x, seg)
    assert_agree(mixing.emit(mixing.apply()), y, "matrix", 12)


def test_rotary_scores_depend_on_distance_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8).flip(-1)

    def score(at: int, other: int) -> torch.Tensor:
        left, right = (rotate(t, torch.tensor([[p]]), 10000.0) for t, p in ((q, at), (k, other)))
        return (left * right).sum()

    # Angles are float32, so their own rounding, one part in 2^24 of a position, is what may differ.
    assert torch.isclose(score(7, 3), score(107, 103), rtol=200 * torch.finfo(torch.float32).eps)
    assert not torch.isclose(score(7, 3), score(7, 4), rtol=1e-3)
    assert torch.equal(rotate(q, torch.tensor([[0]]), 10000.0), q)


def test_partial_rotary_turns_the_first_channels_only():
    x, position = normal(2, 5, 3, 8), torch.arange(5).expand(2, 5)
    y = rotate(x, position, 100.0, 4)
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[..., :4], rotate(x[..., :4], position, 100.0))
    assert torch.equal(rotate(x, position, 100.0, 8), rotate(x, position, 100.0))


def test_rotary_agrees_with_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
    )
    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8)
    position = torch.arange(3, 9).expand(2, 6)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, position)
    want = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for ours, theirs in zip((rotate(q, position, 5000.0), rotate(k, position, 5000.0)), want):
        assert_agree(ours, theirs.transpose(1, 2), "rotated", 6)


def test_rotary_positions_go_on_from_the_state():
    """With positions counted from 0 in each chunk, the second half would differ."""
    mixer, x = build(), normal(1, 8, 16)
    _, kept = mixer.extend(x[:, :4], mixer.init_state(1, dtype=F64))
    assert kept.position.tolist() == [4]
    late, _ = mixer.extend(x[:, 4:], kept)
    assert_agree(late, mixer(x)[:, 4:], "second half", 8)
    wrong, _ = mixer.extend(x[:, 4:], kept._replace(position=torch.zeros(1, dtype=torch.int64)))
    assert not torch.allclose(wrong, late)


def test_size_of_the_state():
    mixer = Attention(128, n_kv_heads=1)
    assert isinstance(mixer.init_state(3), KVState)
    buffer = mixer.init_state(3, capacity=10, dtype=torch.bfloat16)
    assert isinstance(buffer, KVBuffer)
    assert buffer.k.shape == (3, 10, 1, 64)
    assert buffer.k.dtype == torch.bfloat16
    assert state.batch_size(buffer) == 3
    assert Attention(128, window=5).init_state(3, capacity=10).k.shape[1] == 4
    full = mixer.init_state(1, capacity=2)
    with pytest.raises(ValueError, match="larger capacity"):
        mixer.extend(torch.zeros(1, 3, 128), full)


@pytest.mark.parametrize(
    ("d_model", "heads", "size"), [(16, 1, 16), (64, 1, 64), (768, 12, 64), (130, 1, 130), (200, 2, 100)]
)
def test_default_heads(d_model, heads, size):
    mixer = create("attention", d_model)
    assert (mixer.n_heads, mixer.head_dim) == (heads, size)
    assert mixer(torch.zeros(1, 2, d_model)).shape == (1, 2, d_model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 3}, "n_heads: want a divisor of d_model = 16"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads: want a divisor of n_heads = 4, got 3"),
        ({"head_dim": 5}, "head_dim: want an even number"),
        ({"window": 0}, "window: want at least 1"),
        ({"rope_theta": 0.0}, "rope_theta: want a positive base"),
        ({"n_heads": 2, "rope_dim": 3}, "rope_dim: want an even number up to head_dim = 8, got 3"),
        ({"n_heads": 2, "rope_dim": 10}, "rope_dim: want an even number up to head_dim = 8, got 10"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(16, **options)


def test_compiles_without_a_graph_break():
    mixer, x = Attention(16, n_heads=2), torch.randn(2, 9, 16)
    seg = Segments.pack([[4, 5], [9]])
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    assert_agree(compiled(x, seg), mixer(x, seg), "compiled", 9)
