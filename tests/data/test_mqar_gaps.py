"""Associative recall with the power law of the papers."""

from __future__ import annotations

import numpy as np
import pytest

from statewise.data.probes import MQARData
from statewise.data.steps import IGNORE


@pytest.mark.parametrize("power", [0.01, 2.0])
def test_gaps_follow_the_power_law(power):
    """One pair a row: nothing is taken away by earlier draws, so the histogram is the law itself."""
    rows, places = 40_000, 31
    data = MQARData(rows, 64, 1, 256, power)
    _, targets = data.sample(rows, np.random.default_rng(0))
    at = (targets != IGNORE).argmax(1) - 2
    assert (at % 2 == 0).all()
    count = np.bincount(at // 2, minlength=places)
    weight = np.arange(1, places + 1) ** (power - 1)
    want = rows * weight / weight.sum()
    # Five standard deviations of a count; a law that is another one is far outside.
    assert (abs(count - want) <= 5 * np.sqrt(want) + 1).all()
    assert abs(count - rows / places).max() > 5 * np.sqrt(rows / places)


def test_each_key_is_asked_once_for_its_own_value():
    data = MQARData(200, 64, 16, 128, 0.01)
    tokens, targets = data.batch(0)[:2]
    for row, answers in zip(tokens.tolist(), targets.tolist()):
        told = dict(zip(row[0:32:2], row[1:32:2]))
        asked = {row[i]: answers[i] for i in range(32, 64) if answers[i] != IGNORE}
        assert asked == told
        assert len(told) == 16
        assert all(t == 0 for i, t in enumerate(row) if i >= 32 and answers[i] == IGNORE)


def test_there_must_be_room_for_the_gaps():
    with pytest.raises(ValueError, match="n_pairs: want 1 to length / 4 = 4, got 5"):
        MQARData(4, 16, 5, 64, 0.01)
