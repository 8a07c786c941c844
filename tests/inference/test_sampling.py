import math

import pytest
import torch

from statewise import deterministic
from statewise.inference import Sampling, min_p, repetition_penalty, sample, temperature, top_k, top_p
from statewise.inference._sampling import Uniforms, draw, row_seeds

LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
NOTHING = torch.zeros(1, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (top_k(2), [True, True, False, False]),
        (top_k(9), [True] * 4),
        (top_p(0.4), [True, False, False, False]),
        (top_p(0.7), [True, True, False, False]),
        (top_p(0.8), [True, True, True, False]),
        (top_p(1e-9), [True, False, False, False]),
        (top_p(1.0), [True] * 4),
        (min_p(0.4), [True, True, False, False]),
        (min_p(0.0), [True] * 4),
        (min_p(1.0), [True, False, False, False]),
    ],
)
def test_what_a_rule_keeps(rule, kept):
    logits = rule(LOGITS, NOTHING)
    assert torch.isfinite(logits)[0].tolist() == kept
    assert torch.equal(logits[torch.isfinite(logits)], LOGITS[torch.isfinite(logits)])


def test_the_penalty_and_the_temperature_by_hand():
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert repetition_penalty(4.0)(logits, seen).tolist() == [[0.5, -8.0, 2.0, -2.0]]
    assert temperature(0.5)(logits, seen).tolist() == [[4.0, -4.0, 4.0, -4.0]]


def test_rules_compose_in_the_order_that_is_promised():
    """Own rules first, and the filters after the temperature: a high one lets the nucleus grow."""

    def forbid_first(logits, seen):
        return logits.index_fill(1, torch.tensor([0]), -math.inf)

    assert Sampling(rules=[forbid_first], top_k=1).probabilities(LOGITS, NOTHING).tolist() == [[0, 1, 0, 0]]
    cold = Sampling(top_p=0.7).probabilities(LOGITS, NOTHING)
    warm = Sampling(top_p=0.7, temperature=5.0).probabilities(LOGITS, NOTHING)
    assert (cold > 0).sum() == 2
    assert (warm > 0).sum() == 3


def test_greedy_takes_the_likeliest_that_rules_leave():
    seen = torch.tensor([[True, False, False, False]])
    assert Sampling(temperature=0).pick(LOGITS, seen, None).tolist() == [0]
    assert Sampling(temperature=0, repetition_penalty=9.0).pick(LOGITS, seen, None).tolist() == [1]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    share = sample(logits, generator=generator).bincount(minlength=3) / 20_000
    # Four standard deviations of a binomial share.
    assert all(abs(float(s) - p) < 4 * math.sqrt(p * (1 - p) / 20_000) for s, p in zip(share, (0.6, 0.3, 0.1)))
    assert set(sample(logits, temperature=0, generator=generator).tolist()) == {0}


def test_a_draw_inverts_the_distribution_function():
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(6, 5)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-53, 1.0], dtype=torch.float64)
    assert draw(weights, uniform).tolist() == [1, 1, 3, 3, 3, 3]  # never a token without weight
    assert draw(3 * weights, uniform).tolist() == [1, 1, 3, 3, 3, 3]


def test_numbers_of_a_row_depend_on_its_seed_only():
    alone, among = Uniforms([7]), Uniforms([3, 7])
    among.take([0, 1])
    alone.one(0)
    assert among.take([1, 0])[0] == alone.take([0])[0]
    assert row_seeds(5, 3) == [5, 6, 7]
    assert row_seeds([4, 4], 2) == [4, 4]
    torch.manual_seed(1)
    first = row_seeds(None, 2)
    torch.manual_seed(1)
    assert row_seeds(None, 2) == first
    assert first[0] != first[1]


def test_everything_serves_inside_deterministic():
    how = Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.3)
    with deterministic():
        assert int(how.pick(LOGITS, NOTHING, torch.tensor([0.0], dtype=torch.float64))) == 0


@pytest.mark.parametrize(
    ("rule", "value", "name"),
    [(temperature, 0, "temperature"), (top_k, 0, "top_k"), (top_p, 0, "top_p"), (top_p, 1.1, "top_p"),
     (min_p, -1, "min_p"), (repetition_penalty, 0, "repetition_penalty"), (top_p, math.nan, "top_p")],
)  # fmt: skip
def test_bad_values_are_named(rule, value, name):
    with pytest.raises(ValueError, match=name):
        rule(value)
