"""Segments: builders agree, reversal is an involution that keeps to documents, errors name what is wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise import Segments
from statewise.segments import CONTINUE, INVALID, RESET, reverse

packings = st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=4)


@st.composite
def any_segments(draw) -> Segments:
    """Random documents and padding, also padding in the middle of a document and documents under way."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(0, 9))
    rows = st.lists(st.integers(-1, 3), min_size=length, max_size=length)
    tokens = torch.tensor([draw(rows) for _ in range(batch)], dtype=torch.long).reshape(batch, length)
    at = torch.arange(length).expand(batch, length)
    start = torch.where(tokens == 3, at, -1).cummax(1).values if length else at
    position = torch.where(start >= 0, at - start, at + draw(st.integers(0, 2)))
    return Segments(position, None if draw(st.booleans()) else tokens >= 0)


def values(seg: Segments) -> torch.Tensor:
    """A different number at every position."""
    return torch.arange(seg.position.numel(), dtype=torch.float32).reshape(*seg.shape, 1)


# ---- builders --------------------------------------------------------------------------------------------------------


@given(packings)
def test_pack_counts_and_starts(rows):
    seg = Segments.pack(rows)
    assert seg.shape == (len(rows), max(map(sum, rows)))
    valid = torch.ones(seg.shape, dtype=torch.bool) if seg.valid is None else seg.valid
    for b, row in enumerate(rows):
        assert valid[b].sum() == sum(row)
        assert seg.resets[b].sum() == sum(n > 0 for n in row)
        assert seg.position[b, : sum(row)].tolist() == [t for n in row for t in range(n)]


@given(packings)
def test_pack_agrees_with_from_documents(rows):
    seg = Segments.pack(rows)
    document = torch.full(seg.shape, -1)
    for b, row in enumerate(rows):
        ids = [d for d, n in enumerate(row) for _ in range(n)]
        document[b, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    assert torch.equal(Segments.from_documents(document).marks, seg.marks)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.integers(0, 3))
def test_from_lengths_agrees_with_from_valid(lengths, side, extra):
    total = max(lengths) + extra
    seg = Segments.from_lengths(lengths, total, side=side)
    at = torch.arange(total)[None]
    n = torch.tensor(lengths)[:, None]
    valid = at < n if side == "right" else at >= total - n
    assert torch.equal(seg.valid, valid)
    assert torch.equal(seg.marks, Segments.from_valid(valid).marks)
    assert torch.equal(seg.position[valid], Segments.from_valid(valid).position[valid])
    if side == "right":
        assert torch.equal(seg.marks, Segments.pack([[k] for k in lengths], total=total).marks)


def test_from_lengths_takes_a_tensor_and_no_rows():
    assert Segments.from_lengths(torch.tensor([2, 3])).shape == (2, 3)
    assert Segments.from_lengths([]).shape == (0, 0)


def test_from_valid_continues():
    valid = torch.tensor([[False, True, True], [True, False, True]])
    seg = Segments.from_valid(valid, start=torch.tensor([0, 5]))
    assert seg.resets.tolist() == [[False, True, False], [False, False, False]]
    assert seg.position[valid].tolist() == [0, 1, 5, 6]
    assert torch.equal(Segments.from_valid(valid.long()).marks, Segments.from_valid(valid).marks)


def test_continuing():
    assert not Segments.continuing(2, 4).resets.any()
    assert Segments.continuing(2, 4, start=0).resets.tolist() == [[True, False, False, False]] * 2


@given(packings)
def test_a_full_packing_needs_no_mask(rows):
    total = max(map(sum, rows))
    full = [[*row, total - sum(row)] for row in rows]
    assert Segments.pack(full).valid is None


# ---- what ops read ---------------------------------------------------------------------------------------------------


@given(any_segments())
def test_marks_say_the_same_as_resets_and_valid(seg):
    valid = torch.ones(seg.shape, dtype=torch.bool) if seg.valid is None else seg.valid
    assert torch.equal(seg.marks == INVALID, ~valid)
    assert torch.equal(seg.marks == RESET, valid & (seg.position == 0))
    assert torch.equal(seg.marks == CONTINUE, valid & (seg.position != 0))
    assert torch.equal(seg.document, (seg.marks == RESET).long().cumsum(1))
    assert torch.equal(Segments.from_marks(seg.marks).marks, seg.marks)


@given(any_segments())
def test_mask_hides_nan_and_its_gradient(seg):
    x = values(seg)
    if seg.valid is not None:
        x = x.masked_fill(~seg.valid[..., None], torch.nan)
    x.requires_grad_()
    y = seg.mask(x)
    y.sum().backward()
    kept = torch.ones(seg.shape) if seg.valid is None else seg.valid.float()
    assert torch.equal(x.grad[..., 0], kept)
    assert torch.equal(y.detach()[..., 0], values(seg)[..., 0] * kept)


@given(any_segments(), st.integers(0, 9), st.integers(0, 9))
def test_slices_keep_their_marks(seg, a, b):
    assert torch.equal(seg[:, a:b].marks, seg.marks[:, a:b])
    assert torch.equal(seg[:1].marks, seg.marks[:1])
    rows = torch.arange(seg.shape[0]).flip(0)
    assert torch.equal(seg[rows].marks, seg.marks[rows])


# ---- reversal --------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(any_segments())
def test_reversal_is_an_involution(seg):
    x = values(seg)
    assert torch.equal(seg.reverse(seg.reverse(x)), x)
    index = seg.reversal()
    assert torch.equal(index.sort(1).values, torch.arange(seg.shape[1]).expand(seg.shape))


@settings(max_examples=300)
@given(any_segments())
def test_reversal_turns_each_document_around_and_leaves_padding(seg):
    x, y = values(seg)[..., 0], seg.reverse(values(seg))[..., 0]
    valid = seg.marks != INVALID
    assert torch.equal(y[~valid], x[~valid])
    for b in range(seg.shape[0]):
        for d in seg.document[b].unique():
            inside = valid[b] & (seg.document[b] == d)
            assert y[b, inside].tolist() == x[b, inside].tolist()[::-1]


def test_reverse_without_segments_is_a_flip():
    x = torch.arange(6.0).reshape(1, 3, 2)
    assert torch.equal(reverse(x, None), x.flip(1))
    one = Segments.continuing(1, 3, start=0)
    assert torch.equal(reverse(x, one), x.flip(1))


# ---- errors ----------------------------------------------------------------------------------------------------------

POSITION = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segments(POSITION.float()), "position: want an integer"),
        (lambda: Segments(POSITION.bool()), "position: want an integer"),
        (lambda: Segments(POSITION[0]), "position: want an integer"),
        (lambda: Segments(POSITION, POSITION), "valid: want a bool"),
        (lambda: Segments(POSITION, torch.ones(2, 4, dtype=torch.bool)), "valid: want a bool"),
        (lambda: Segments(POSITION, torch.ones(2, 3, dtype=torch.bool, device="meta")), "valid is on meta"),
        (lambda: Segments.pack([[3, 4]], total=6), "total"),
        (lambda: Segments.pack([[3, -1]]), "lengths: want non-negative"),
        (lambda: Segments.from_lengths([5], 4), "total"),
        (lambda: Segments.from_lengths([-1, 2]), "lengths: want non-negative"),
        (lambda: Segments.from_lengths([5], side="middle"), "side: want 'left' or 'right'"),
        (lambda: Segments(POSITION).check(2, 4, torch.device("cpu")), "seg: want shape"),
        (lambda: Segments(POSITION).check(2, 3, torch.device("meta")), "seg: is on cpu"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_to_device():
    seg = Segments(POSITION, torch.ones(2, 3, dtype=torch.bool)).to("meta")
    assert seg.position.device.type == seg.valid.device.type == "meta"


def test_forget_clears_what_a_first_document_must_not_see():
    """Rows: a new document, one after left padding, one that goes on and resets later, padding only."""
    seg = Segments(
        torch.tensor([[0, 1, 2], [0, 0, 1], [4, 0, 1], [0, 0, 0]]),
        torch.tensor([[True, True, True], [False, True, True], [True, True, True], [False, False, False]]),
    )
    state = torch.full((4, 2, 3), torch.nan)
    kept = seg.forget(state).isnan().flatten(1).all(1)
    assert kept.tolist() == [False, False, True, True]
    assert not seg.forget(state)[:2].any()
    assert Segments(seg.position[:3]).forget(state[:3]).isnan().flatten(1).all(1).tolist() == [False, False, True]
    assert Segments(seg.position[:, :0]).forget(state).isnan().all()


def test_right_padded():
    assert Segments.from_lengths([3, 0, 5], 6).right_padded
    assert Segments.continuing(2, 4, start=0).right_padded
    assert not Segments.from_lengths([3, 5], 6, side="left").right_padded
    assert not Segments.pack([[2, 3]]).right_padded
    assert not Segments.continuing(2, 4).right_padded
    assert not Segments.from_valid(torch.tensor([[1, 0, 1, 0]])).right_padded
    assert Segments(torch.tensor([[0, 1, 7]]), torch.tensor([[True, True, False]])).right_padded


def test_mask_of_rows_that_are_shared():
    seg = Segments.from_lengths([2, 3], 4)
    x = torch.ones(2, 4, 3)
    assert seg[:1].mask(x)[:, 2:].sum() == 0
    assert torch.equal(seg.mask(x[:1]), seg.mask(x))


def test_mask_under_vmap():
    seg, x = Segments.from_lengths([2, 3], 4), torch.randn(2, 4, 3)
    each = torch.func.vmap(lambda y, p, v: Segments(p[None], v[None]).mask(y[None])[0])(x, seg.position, seg.valid)
    assert torch.equal(each, seg.mask(x))
