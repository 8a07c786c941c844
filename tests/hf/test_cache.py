"""The cache: rows, forks, and positions that are taken back exactly."""

from __future__ import annotations

import copy

import pytest
import torch

from statewise import state as trees
from statewise.hf import StatewiseCache
from statewise.testing import assert_agree


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 61, shape)


def test_rows(model):
    x, more = tokens(3, 6), tokens(3, 4)
    whole = model(torch.cat([x, more], 1)).logits[:, 6:]
    for rows, change in [
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([False, True, False]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    ]:
        cache = model(x, use_cache=True).cache
        change(cache)
        assert cache.batch_size == len(rows)
        assert_agree(model(more[rows], cache=cache).logits, whole[rows], str(rows), 10)


def test_forks_go_their_own_way(model):
    x, ways = tokens(1, 6), [tokens(1, 3), tokens(1, 3)]
    cache = model(x, use_cache=True).cache
    for fork, way in [(cache.fork(), ways[0]), (copy.deepcopy(cache), ways[1]), (cache, ways[0])]:
        want = model(torch.cat([x, way], 1)).logits[:, 6:]
        assert_agree(model(way, cache=fork).logits, want, "fork", 9)


@pytest.mark.parametrize("chunks", [(9,), (1,) * 6, (5, 1, 3), (80, 4), (2, 70)])
@pytest.mark.parametrize("back", [1, 3, 5])
def test_positions_are_taken_back(model, chunks, back):
    x = tokens(2, sum(chunks))
    cache = StatewiseCache()
    cache.activate_past_recording()
    at, whole = 0, model(x).logits
    for n in chunks:
        assert_agree(model(x[:, at : at + n], cache=cache).logits, whole[:, at : at + n], "while recording", at + n)
        at += n
    cache.crop(-back)
    assert cache.get_seq_length() == at - back
    more = tokens(2, 4)
    truth = model(torch.cat([x[:, : at - back], more], 1)).logits[:, -4:]
    assert_agree(model(more, cache=cache.fork()).logits, truth, "after crop", at)
    # Again from there: further back, and rows change places between.
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0]))
    truth = model(torch.cat([x[:, : at - back - 1], more.flip(0)], 1)).logits[:, -4:].flip(0)
    assert_agree(model(more, cache=cache).logits, truth, "after crop, crop and reorder", at)


@pytest.mark.parametrize("accepted", [True, False])
def test_padded_rows_are_taken_back_and_change_places(model, accepted):
    x, guess, more = tokens(3, 6), tokens(3, 5), tokens(3, 2)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    cache, order = StatewiseCache(), torch.tensor([2, 0, 1])
    cache.activate_past_recording()
    model(x, attention_mask=mask, cache=cache)
    if accepted:
        cache.crop(0)  # from here a state is kept, not only inputs
    model(guess, cache=cache)
    cache.reorder_cache(order)  # what crop goes back to changes places too
    cache.crop(-3)
    got = model(more, cache=cache).logits
    for row, source in enumerate(order.tolist()):
        text = torch.cat([x[source][mask[source] > 0], guess[source, :2], more[row]])[None]
        assert_agree(got[row : row + 1], model(text).logits[:, -2:], f"row {row}", 13)
    if accepted:
        return
    cache.crop(-5)  # into the padded prompt
    got = model(more, cache=cache).logits
    for row, source in enumerate(order.tolist()):
        text = torch.cat([x[source, :5][mask[source, :5] > 0], more[row]])[None]
        assert_agree(got[row : row + 1], model(text).logits[:, -2:], f"row {row}, in the prompt", 13)


def test_a_state_that_is_consumed_is_kept_as_a_copy():
    def add(x, state, seg):
        return [x], (x.sum(1) if state is None else state.add_(x.sum(1)))

    cache = StatewiseCache(torch.zeros(1, 1))
    cache.activate_past_recording()
    for value in (1.0, 2.0, 3.0):
        cache.advance(add, torch.full((1, 1, 1), value))
    cache.crop(-2)
    cache.advance(add, torch.full((1, 1, 1), 4.0))
    cache.crop(-1)
    cache.advance(add, torch.full((1, 1, 1), 5.0))
    assert cache.state.item() == 6


def test_rounds_of_guessing(model):
    """Many rounds of: run five positions, keep some. What was kept is run again a little later, not again and again."""
    kept, cache, ran = tokens(1, 3), StatewiseCache(), []
    cache.activate_past_recording()
    model(kept, cache=cache)
    trunk = model.model._trunk
    model.model._trunk = lambda x, *args, **kwargs: (ran.append(x.shape[1]), trunk(x, *args, **kwargs))[1]
    for accepted in (1, 5, 2, 3, 0, 4, 2, 2, 3, 1, 4, 4, 5, 1, 3):
        guess = tokens(1, 5)
        ran.clear()
        logits = model(guess, cache=cache).logits
        assert sum(ran) <= 25  # five, and what waits: up to fifteen and four more
        want = model(torch.cat([kept, guess], 1)).logits[:, -5:]
        assert_agree(logits, want, "guess", 60)
        cache.crop(accepted - 5)
        kept = torch.cat([kept, guess[:, :accepted]], 1)
        assert cache.get_seq_length() == kept.shape[1]
    state, whole = model.settle(cache).state, model(kept, use_cache=True).cache.state
    for (name, got), (_, want) in zip(trees.leaves(state), trees.leaves(whole)):
        if got.dtype == torch.bool:
            assert torch.equal(got, want)
        else:
            assert_agree(got, want, name, 60)


def test_accepting_frees_what_was_kept(model):
    cache = StatewiseCache()
    cache.activate_past_recording()
    model(tokens(1, 8), cache=cache)
    cache.crop(0)
    assert cache._kept is None
    assert not cache._since
    with pytest.raises(ValueError, match="the inputs of the last 0 positions are kept, got -1"):
        cache.crop(-1)


def test_what_cannot_be_done(build):
    model = build("mamba")
    cache = model(tokens(1, 8), use_cache=True).cache
    with pytest.raises(RuntimeError, match="call activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="tokens_to_remove: want 0, or -n"):
        cache.crop(3)
    cache.activate_past_recording()
    model(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="the last 4 positions are kept, got -5"):
        cache.crop(-5)
    cache.crop(-2)
    with pytest.raises(RuntimeError, match="2 positions wait to be run again"):
        _ = cache.state
    assert trees.batch_size(model.settle(cache).state) == 1
    cache.reset()
    assert (cache.get_seq_length(), cache.state, cache.batch_size) == (0, None, -1)
