import math

import pytest
import torch
from torch import nn

from statewise.data.steps import IGNORE, Batch
from statewise.tasks import CausalLM, NonFinite, Recall


class Table(nn.Module):
    """Logits that depend on the token alone, two more than the vocabulary has."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.logits = nn.Embedding(vocab_size, vocab_size + 2)

    def forward(self, tokens, seg=None):
        return self.logits(tokens)


def test_loss_is_nats_over_scored_positions_without_the_padding_of_the_vocabulary():
    task = CausalLM(Table(5), 5)
    nn.init.zeros_(task.model.logits.weight)
    with torch.no_grad():
        task.model.logits.weight[:, 5:] = 50.0  # would swallow all probability
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    targets = torch.tensor([[1, 2, IGNORE], [IGNORE, IGNORE, IGNORE]])
    values, count = task.measure(Batch(tokens, targets))
    assert int(count) == 2
    assert float(values["loss"].detach()) == pytest.approx(math.log(5))
    assert float(values["bits_per_byte"]) == pytest.approx(math.log2(5))


def test_bits_per_byte_of_longer_tokens():
    task = CausalLM(Table(5), 5, bytes_per_token=4.0)
    values, _ = task.measure(Batch(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)))
    assert float(values["bits_per_byte"]) == pytest.approx(float(values["loss"].detach()) / math.log(2) / 4)


def test_nothing_scored_is_zero_and_has_a_finite_gradient():
    task = CausalLM(Table(5), 5)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    values, count = task.measure(Batch(tokens, torch.full_like(tokens, IGNORE)))
    values["loss"].backward()
    assert int(count) == 0
    assert float(values["loss"].detach()) == 0
    assert bool((task.model.logits.weight.grad == 0).all())


def test_accuracy_counts_answers_only():
    task = Recall(Table(3), 3)
    with torch.no_grad():
        task.model.logits.weight.copy_(torch.eye(3, 5))  # says the token itself
    tokens = torch.tensor([[0, 1, 2, 2]])
    values, _ = task.measure(Batch(tokens, torch.tensor([[0, IGNORE, 2, 1]])))
    assert float(values["accuracy"]) == pytest.approx(2 / 3)


def _clip(task, gradient):
    optimizer = torch.optim.SGD([{"params": list(task.model.parameters()), "name": "weights"}], lr=1.0)
    weight = task.model.logits.weight
    weight.grad = torch.full_like(weight, gradient)
    task.configure_gradient_clipping(optimizer)
    return weight.grad


def test_gradients_are_clipped_to_the_norm_and_not_below():
    task = CausalLM(Table(3), 3, clip=1.0)
    assert float(_clip(task, 10.0).norm()) == pytest.approx(1)
    assert task.gradient_norm == pytest.approx(10 * math.sqrt(15))
    assert bool((_clip(task, 0.01) == 0.01).all())
    task.clip = 0.0
    assert bool((_clip(task, 10.0) == 10).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_step_and_group(value):
    with pytest.raises(NonFinite, match=r"step 1.*parameter group 'weights' \(logits\.weight\)"):
        _clip(CausalLM(Table(3), 3), value)


def test_a_loss_that_is_not_finite_stops_too():
    task = CausalLM(Table(3), 3)
    task._loss = torch.tensor(math.inf)
    with pytest.raises(NonFinite, match="the loss is inf"):
        _clip(task, 0.0)


def test_training_without_an_optimizer_says_what_is_missing():
    with pytest.raises(ValueError, match="optimize"):
        CausalLM(Table(3), 3).configure_optimizers()
