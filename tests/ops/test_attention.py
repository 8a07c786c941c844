"""What is particular to attention: the cache and its capacity, windows, documents, positions, both directions."""

from __future__ import annotations

import pytest
import torch

from statewise import Segments, deterministic, state
from statewise.ops import (
    KVBuffer,
    KVState,
    attention,
    attention_apply,
    attention_cache,
    attention_matrix,
    attention_positions,
    attention_step,
)
from statewise.ops.attention import reference
from statewise.testing.tolerance import assert_agree, assert_zero

F64 = torch.float64


def normal(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def qkv(batch: int, length: int, heads: int = 4, kv_heads: int = 2, size: int = 6):
    return tuple(normal(batch, length, h, size, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))


def by_hand(q, k, v, *, causal=True, window=None, block=None, scale=None):
    """One row, one document, all tokens valid; one query and one head at a time."""
    out = torch.zeros_like(q)
    per = q.shape[1] // k.shape[1]
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        last = t + 1 if causal else len(q)
        if block is not None:
            first, last = max(0, t // block - 1) * block, (t // block + 2) * block
        for h in range(q.shape[1]):
            score = k[first:last, h // per] @ q[t, h] * (q.shape[2] ** -0.5 if scale is None else scale)
            out[t, h] = score.exp() / score.exp().sum() @ v[first:last, h // per]
    return out


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"window": 1}, {"window": 3}, {"window": 50}, {"scale": 0.3}, {"causal": False}),
        *({"causal": False, "block": 1}, {"causal": False, "block": 4}, {"causal": False, "block": 50}),
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_by_hand(options, heads):
    q, k, v = qkv(2, 11, *heads)
    y, _ = attention(q, k, v, **options)
    for b in range(2):
        assert_agree(y[b], by_hand(q[b], k[b], v[b], **options), "y", 11)
    assert_agree(attention_apply(attention_matrix(q, k, **options), v), y, "matrix times v", 11)


LOCAL = [{"window": 3}, *({"causal": False, "block": block} for block in (1, 2, 3, 5))]


@pytest.fixture
def short_stretches(monkeypatch):
    """As if rows were so long that they are attended with piece by piece."""
    monkeypatch.setattr(reference, "QUERIES", 1)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("window", [21, 22, 23, 24, 50])
def test_a_window_about_as_long_as_the_row(window):
    q, k, v = qkv(1, 23)
    y, _ = attention(q, k, v, window=window)
    assert_agree(y[0], by_hand(q[0], k[0], v[0], window=window), "y", 23)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("options", LOCAL, ids=str)
def test_piece_by_piece(options):
    q, k, v = qkv(2, 23)
    assert len(reference.stretches(_sight(**options), 0, 23, packed=False)) > 4
    y, _ = attention(q, k, v, **options)
    for b in range(2):
        assert_agree(y[b], by_hand(q[b], k[b], v[b], **options), "y", 23)
    assert_agree(attention_apply(attention_matrix(q, k, **options), v), y, "matrix times v", 23)
    with deterministic():
        single = attention(*(t.float() for t in (q, k, v)), **options)[0]
    assert_agree(single, y.float(), "in a fixed order", 23)
    if "window" in options:
        first, kept = attention(q[:, :9], k[:, :9], v[:, :9], **options)
        second, _ = attention(q[:, 9:], k[:, 9:], v[:, 9:], state=kept, **options)
        assert_agree(torch.cat([first, second], 1), y, "in two chunks", 23)


def _sight(causal=True, window=None, block=None):
    return reference.Sight(causal, window, block)


def test_blocks_that_hold_the_row_see_all_of_it():
    q, k, v = qkv(2, 300)
    full, _ = attention(q, k, v, causal=False)
    for block in (150, 299, 300, 1000):
        assert_agree(attention(q, k, v, causal=False, block=block)[0], full, f"block {block}", 300)
    assert not torch.allclose(attention(q, k, v, causal=False, block=100)[0], full)


@pytest.mark.parametrize("options", [{"window": 256}, {"causal": False, "block": 256}], ids=str)
def test_memory_is_linear_in_the_length(options):
    """Scores that are ever computed: each stretch of queries with the keys in its sight."""

    def scores(length: int) -> int:
        found = reference.stretches(_sight(**options), 0, length, packed=False)
        assert [lo for (lo, _), _ in found[1:]] == [hi for (_, hi), _ in found[:-1]]
        assert (found[0][0][0], found[-1][0][1]) == (0, length)
        return sum((hi - lo) * (last - first) for (lo, hi), (first, last) in found)

    assert scores(2**16) <= 2.1 * scores(2**15)
    assert max(hi - lo for (lo, hi), _ in reference.stretches(_sight(**options), 0, 2**16, packed=True)) == 256


@pytest.mark.parametrize("stretches", ["whole", "pieces"])
@pytest.mark.parametrize("options", [{}, {"causal": False}, *LOCAL], ids=str)
def test_documents_and_padding(options, stretches, request):
    if stretches == "pieces":
        request.getfixturevalue("short_stretches")
    position = torch.tensor([[4, 5, 6, 0, 1, 2, 3, 4, 0, 1], [*range(10)], [0] * 10])
    valid = torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 1, 1, 0], [0] * 10]).bool()
    seg = Segments(position, valid)
    q, k, v = (t.masked_fill(~valid[..., None, None], torch.nan).requires_grad_() for t in qkv(3, 10))
    y, end = attention(q, k, v, seg=seg, **options)
    for b in range(2):
        for d in range(3):
            where = (valid[b] & (seg.document[b] == d)).nonzero()[:, 0]
            alone = by_hand(q[b, where], k[b, where], v[b, where], **options)
            assert_agree(y[b, where], alone, f"row {b}, document {d}", 10)
    assert_zero(y[~valid], "y at padding")
    assert_zero(attention_matrix(q, k, seg=seg, **options).movedim(1, -1)[~valid], "rows of padding")
    for g in torch.autograd.grad(y.square().sum() + end.k.sum() + end.v.square().sum(), (q, k, v)):
        assert_zero(g[~valid], "gradient at padding")
        assert bool(torch.isfinite(g).all())
    if options.get("causal", True):
        assert end.live.sum(1).tolist() == [2, min(6, options.get("window", 99) - 1), 0]
        assert bool((end.live.long().diff(dim=1) >= 0).all()), "unused slots stand on the left"
        assert end.position.tolist() == [2, 6, 0]


def test_growing_cache():
    q, k, v = qkv(2, 12)
    whole, end = attention(q, k, v)
    assert isinstance(end, KVState)
    assert torch.equal(end.k, k)
    kept, ys = None, []
    for lo, hi in ((0, 0), (0, 5), (5, 6), (6, 12)):
        y, kept = attention(q[:, lo:hi], k[:, lo:hi], v[:, lo:hi], state=kept)
        assert kept.k.shape[1] == hi
        ys.append(y)
    assert_agree(torch.cat(ys, 1), whole, "y", 12)
    assert torch.equal(kept.k, k)
    assert kept.position.tolist() == [12, 12]


def test_window_bounds_the_cache():
    q, k, v = qkv(2, 12)
    whole, _ = attention(q, k, v, window=4)
    for start in (None, attention_cache(2, 2, 6, dtype=F64), attention_cache(2, 2, 6, capacity=3, dtype=F64)):
        kept, ys = start, []
        for t in range(12):
            y, kept = attention_step(q[:, t], k[:, t], v[:, t], state=kept, window=4)
            assert kept.k.shape[1] == (3 if isinstance(start, KVBuffer) else min(t + 1, 3))
            ys.append(y)
        assert_agree(torch.stack(ys, 1), whole, "y", 12)
    _, none = attention(q, k, v, window=1)
    assert none.k.shape[1] == 0


def test_buffer_keeps_its_size_and_refuses_to_forget():
    q, k, v = qkv(2, 6)
    whole, _ = attention(q, k, v)
    kept, ys = attention_cache(2, 2, 6, capacity=6, dtype=F64), []
    for lo, hi in ((0, 4), (4, 5), (5, 6)):
        y, kept = attention(q[:, lo:hi], k[:, lo:hi], v[:, lo:hi], state=kept)
        assert isinstance(kept, KVBuffer)
        assert kept.k.shape[1] == 6
        ys.append(y)
    assert_agree(torch.cat(ys, 1), whole, "y", 6)
    assert kept.live.all()
    with pytest.raises(ValueError, match="capacity 6 is full"):
        attention(q[:, :1], k[:, :1], v[:, :1], state=kept)
    with pytest.raises(ValueError, match="capacity 3 is full"):
        attention(q, k, v, state=attention_cache(2, 2, 6, capacity=3, dtype=F64), window=5)
    # A new document needs none of the old keys, and padding takes no slot.
    attention(q[:, :1], k[:, :1], v[:, :1], state=kept, seg=Segments.continuing(2, 1, start=0))
    nothing = Segments.from_valid(torch.zeros(2, 6, dtype=torch.bool), start=6)
    _, same = attention(q, k, v, state=kept, seg=nothing)
    assert torch.equal(same.k, kept.k)
    assert same.position.tolist() == [6, 6]


def test_rows_of_different_lengths_share_a_cache():
    """Prefill with left padding, then decode: every row goes on as if it were alone."""
    q, k, v = qkv(3, 9)
    lengths = [5, 2, 0]
    seg = Segments.from_lengths(lengths, 5, side="left")
    _, kept = attention(q[:, :5], k[:, :5], v[:, :5], seg=seg)
    assert kept.position.tolist() == lengths
    y, kept = attention(q[:, 5:], k[:, 5:], v[:, 5:], state=kept)
    for b, n in enumerate(lengths):
        own = slice(5 - n, 9)
        assert_agree(y[b, :], by_hand(q[b, own], k[b, own], v[b, own])[n:], f"row {b}", 9)


def test_state_functions_hold():
    """The cache is a batch-first tree: rows of different lengths merge, fork and go on alone."""
    q, k, v = qkv(2, 7)
    _, long = attention(q[:1, :6], k[:1, :6], v[:1, :6])
    _, short = attention(q[1:, :2], k[1:, :2], v[1:, :2])
    both = state.expand(state.merge([long, short]), 2)
    now = [t[[0, 0, 1, 1], 6:] for t in (q, k, v)]
    y, _ = attention(*now, state=both)
    for b, kept in ((0, long), (1, short)):
        want, _ = attention(q[b : b + 1, 6:], k[b : b + 1, 6:], v[b : b + 1, 6:], state=kept)
        assert_agree(y[2 * b : 2 * b + 2], want.expand(2, -1, -1, -1), f"row {b}", 7)


def test_positions_count_valid_tokens():
    seg = Segments(
        torch.tensor([[3, 4, 5, 0, 1, 2], [0, 1, 2, 3, 4, 5]]),
        torch.tensor([[True, False, True, True, True, True], [False, False, True, True, False, True]]),
    )
    at = attention_positions(None, seg, 2, 6, "cpu")
    assert at[0, [0, 2, 3, 4, 5]].tolist() == [0, 1, 0, 1, 2]
    assert at[1, [2, 3, 5]].tolist() == [0, 1, 2]
    kept = attention_cache(2, 1, 2)._replace(position=torch.tensor([7, 9]))
    at = attention_positions(kept, seg, 2, 6, "cpu")
    assert at[0, [0, 2, 3, 4, 5]].tolist() == [7, 8, 0, 1, 2]
    assert at[1, [2, 3, 5]].tolist() == [9, 10, 11]
    assert attention_positions(kept, None, 2, 3, "cpu").tolist() == [[7, 8, 9], [9, 10, 11]]


def test_half_precision_keeps_the_dtype_of_the_cache():
    q, k, v = (t.bfloat16() for t in qkv(2, 6))
    y, end = attention(q, k, v)
    assert (y.dtype, end.k.dtype) == (torch.bfloat16, torch.bfloat16)
    y, end = attention(q, k, v, state=attention_cache(2, 2, 6, dtype=torch.float32))
    assert (y.dtype, end.k.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("capacity", [None, 8])
def test_compiled_with_a_cache(capacity):
    """No graph break, and a full buffer is still noticed."""
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q, k, v = qkv(2, 8)
    start = attention_cache(2, 2, 6, capacity=capacity, dtype=F64)
    y, kept = compiled(q[:, :6], k[:, :6], v[:, :6], state=start)
    z, kept = compiled(q[:, 6:], k[:, 6:], v[:, 6:], state=kept)
    assert_agree(torch.cat([y, z], 1), attention(q, k, v)[0], "y", 8)
    if capacity is not None:
        with pytest.raises(RuntimeError, match="capacity 8 is full"):
            compiled(q[:, 6:], k[:, 6:], v[:, 6:], state=kept)


def test_export():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)[0]

    given = qkv(2, 8)
    length = torch.export.Dim("L", min=2)
    program = torch.export.export(Attend(), given, dynamic_shapes=({1: length}, {1: length}, {1: length}))
    longer = qkv(2, 11)
    assert_agree(program.module()(*longer), attention(*longer)[0], "y", 11)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"q": torch.ones(2, 5, 12)}, ValueError, r"q: want shape \(B, L, H, P\)"),
        ({"q": torch.ones(2, 5, 3, 6)}, ValueError, "multiple of the 2 key heads, got 3"),
        ({"v": torch.ones(2, 5, 2, 7)}, ValueError, "v: want shape"),
        ({"q": torch.ones(2, 5, 4, 6).double()}, TypeError, "q is torch.float64"),
        ({"window": 0}, ValueError, "window: want at least 1 token, got 0"),
        ({"causal": False, "window": 3}, ValueError, "causal: want True with a state or a window"),
        ({"causal": False, "block": 0}, ValueError, "block: want at least 1 token, got 0"),
        ({"block": 3}, ValueError, "block: want causal=False with it, or a window instead"),
        ({"causal": False, "state": attention_cache(2, 2, 6)}, ValueError, "causal: want True"),
        ({"state": attention_cache(2, 1, 6)}, ValueError, "state.k: want shape"),
        ({"state": torch.zeros(2)}, TypeError, "state: want a KVState, a KVBuffer or None, got Tensor"),
        ({"seg": Segments.continuing(2, 4)}, ValueError, "seg: want shape"),
    ],
)
def test_bad_arguments(options, error, message):
    given = {"q": torch.ones(2, 5, 4, 6), "k": torch.ones(2, 5, 2, 6), "v": torch.ones(2, 5, 2, 6)}
    with pytest.raises(error, match=message):
        attention(**{**given, **options})


def test_capacity_of_nothing():
    with pytest.raises(ValueError, match="capacity: want at least 1"):
        attention_cache(2, 2, 6, capacity=0)
