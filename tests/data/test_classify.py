from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from statewise.data.classify import MASK, ClassifyData, DenoisingData
from statewise.data.label_baselines import label_baselines
from statewise.data.steps import IGNORE, share
from statewise.testing import toys


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:2], b[:2])) and (
        a.seg is b.seg if a.seg is None else torch.equal(a.seg.valid, b.seg.valid)
    )


def _makers():
    for name, make in toys.SETS.items():
        yield pytest.param(lambda seed=0, make=make: ClassifyData(make(), 4, seed=seed), id=name)
        for objective in ("masked", "causal"):
            yield pytest.param(
                lambda seed=0, make=make, objective=objective: DenoisingData(
                    ClassifyData(make(), 4, seed=seed), objective, rate=0.4
                ),
                id=f"{name}-{objective}",
            )


@pytest.mark.parametrize("make", list(_makers()))
def test_a_batch_is_a_function_of_seed_and_step(make):
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    first.batch(30), first.batch(2)  # what was asked before makes no difference
    assert _same(first.batch(9), again.batch(9))
    assert not torch.equal(first.batch(9).tokens, first.batch(10).tokens)
    assert not torch.equal(first.batch(9).tokens, other.batch(9).tokens)
    assert all(_same(a, b) for a, b in zip(first.validation(), again.validation()))
    assert all(_same(a, b) for a, b in zip(first.validation(), other.validation()))  # runs are validated alike


@pytest.mark.parametrize("make", list(_makers()))
@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_all_processes_make_the_batch(make, world):
    for batch in [make().batch(0), *make().validation()]:
        shares = [share(batch, rank, world) for rank in range(world)]
        assert len({len(s.tokens) for s in shares}) == 1
        targets, tokens = torch.cat([s.targets for s in shares]), torch.cat([s.tokens for s in shares])
        assert torch.equal(targets[: len(batch.targets)], batch.targets)
        assert torch.equal(tokens[: len(batch.tokens)], batch.tokens)
        assert bool((targets[len(batch.targets) :] == IGNORE).all())


@pytest.mark.parametrize("limit", [None, 10])
def test_every_row_is_seen_once_an_epoch(limit):
    data = toys.tokens()
    data.train.labels[:] = np.arange(37) % 2
    made = ClassifyData(data, 4, seed=3, limit=limit)
    rows = limit or 37
    seen = Counter()
    original = made.gather
    made.gather = lambda split, chosen: seen.update(chosen.tolist()) or original(split, chosen)
    for step in range(rows):  # four epochs
        made.batch(step)
    assert len(seen) == rows
    assert set(seen.values()) == {4}
    assert not np.array_equal(made.epoch(0), made.epoch(1))


def test_a_limit_draws_the_same_rows_for_every_seed():
    kept = [set(ClassifyData(toys.tokens(), 4, seed=s, limit=9).rows.tolist()) for s in (0, 1)]
    assert kept[0] == kept[1]
    with pytest.raises(ValueError, match="limit_train: want 1 to 37 rows, which toy tokens has, got 38"):
        ClassifyData(toys.tokens(), 4, limit=38)


def test_values_are_normalised_and_rows_padded_on_the_right():
    data = toys.pixels()
    batch = ClassifyData(data).gather(data.test, np.array([2, 0]))
    assert batch.seg is None
    want = (data.test.inputs[[2, 0]].astype(np.float64) - 100) / 50
    assert batch.tokens.numpy() == pytest.approx(want, rel=1e-5)
    data = toys.tokens()
    batch = ClassifyData(data).gather(data.test, np.array([2, 0]))
    for i, row in enumerate((2, 0)):
        length = len(data.test.inputs[row])
        assert batch.seg.valid[i].tolist() == [True] * length + [False] * (batch.tokens.shape[1] - length)
        assert batch.tokens[i, :length].tolist() == data.test.inputs[row].tolist()


def test_pairs_are_rows_side_by_side():
    data = toys.pairs()
    batch = ClassifyData(data).gather(data.test, np.array([4, 1]))
    assert (batch.tokens.shape[0], batch.targets.shape) == (4, (2,))
    first, second = data.test.inputs
    for i, rows in enumerate((first[4], second[4], first[1], second[1])):
        assert batch.tokens[i, : len(rows)].tolist() == rows.tolist()


def test_what_is_hidden_is_scored_and_nothing_else():
    base = ClassifyData(toys.tokens((400, 5, 5)), 100)
    data = DenoisingData(base, "masked", rate=0.3)
    hidden = valid = 0
    for step in range(20):
        clean, batch = base.batch(step), data.batch(step)
        scored = batch.targets != IGNORE
        assert torch.equal(batch.tokens == MASK, scored | ~clean.seg.valid)
        assert torch.equal(batch.targets[scored], clean.tokens[scored])
        assert torch.equal(batch.tokens[~scored], clean.tokens[~scored])
        hidden, valid = hidden + int(scored.sum()), valid + int(clean.seg.valid.sum())
    # Four standard deviations of a mean of coin tosses.
    assert hidden / valid == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / valid) ** 0.5)
    assert data.n_outputs == toys.VOCAB


def test_the_same_row_is_hidden_differently_each_time():
    base = ClassifyData(toys.pixels((4, 2, 2)), 4)
    data = DenoisingData(base, "masked", rate=0.5)
    masks = [data.batch(step).tokens[..., -1][base.batch(step).targets.argsort(stable=True)] for step in range(3)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    whole = ClassifyData(toys.pixels((1, 2, 2)), 1, seed=5)  # one row only, so that the order says nothing
    other = DenoisingData(ClassifyData(toys.pixels((1, 2, 2)), 1, seed=6), "masked", rate=0.5)
    assert not torch.equal(DenoisingData(whole, "masked", rate=0.5).batch(0).tokens, other.batch(0).tokens)


def test_hidden_values_are_zero_and_named_in_a_channel():
    base = ClassifyData(toys.pixels(), 8)
    data = DenoisingData(base, "masked", rate=0.5)
    clean, batch = base.batch(0).tokens, data.batch(0)
    value, gone = batch.tokens.unbind(-1)
    assert torch.equal(value, clean[..., 0] * (1 - gone))
    assert torch.equal(batch.targets != IGNORE, gone.bool().unsqueeze(-1))
    assert torch.equal(batch.targets[gone.bool()], clean[gone.bool()])
    levels = DenoisingData(base, "masked", rate=0.5, levels=256).batch(0)
    raw = (clean * 50 + 100).round().long()[..., 0]
    assert torch.equal(levels.targets[gone.bool()], raw[gone.bool()])


def test_causal_targets_are_the_next_element():
    base = ClassifyData(toys.tokens(), 8)
    clean, batch = base.batch(0), DenoisingData(base, "causal").batch(0)
    assert torch.equal(batch.tokens, clean.tokens)
    for row, target, valid in zip(clean.tokens, batch.targets, clean.seg.valid):
        n = int(valid.sum())
        assert target[: n - 1].tolist() == row[1:n].tolist()
        assert bool((target[n - 1 :] == IGNORE).all())


def test_wrong_objectives_are_refused():
    base = ClassifyData(toys.tokens(), 4)
    with pytest.raises(ValueError, match="objective: want 'masked' or 'causal', got 'both'"):
        DenoisingData(base, "both")
    with pytest.raises(ValueError, match="rate: want a probability above 0 and below 1, got 0"):
        DenoisingData(base, rate=0)
    with pytest.raises(ValueError, match="levels: want a set with one value at each position"):
        DenoisingData(base, levels=256)


def test_baselines():
    found = label_baselines(toys.tokens((400, 5, 200)))
    assert set(found) == {"majority", "first token", "unigram"}
    assert all(0.3 < value < 0.8 for value in found.values())
    found = label_baselines(toys.pixels((400, 5, 200)))
    assert found["linear"] > 1.5 * found["majority"]
    # The first token of these rows is the label.
    data = toys.tokens((400, 5, 200))
    for split in (data.train, data.test):
        split.labels[:] = split.inputs.flat[split.inputs.offsets[:-1]] % 2
    assert label_baselines(data)["first token"] == 1.0
    assert label_baselines(replace(data, name="listops"))["root operator"] == 1.0
