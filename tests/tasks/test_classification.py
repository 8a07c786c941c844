import pytest
import torch
from torch import nn

from statewise.data.classify import ClassifyData, DenoisingData
from statewise.data.steps import IGNORE, Batch
from statewise.models.classification import SequenceClassifier
from statewise.tasks import Classification, Recall, Restoration
from statewise.testing import toys


class Fixed(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x, seg=None):
        return self.outputs


def test_one_label_a_row():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 9.0, 0.0]])
    labels = torch.tensor([0, 1, IGNORE])  # the last is a row that fills up a batch
    values, count = Classification(Fixed(logits), 3).measure(Batch(torch.zeros(3, 4, 1), labels))
    assert int(count) == 2
    assert float(values["accuracy"]) == 0.5
    want = nn.functional.cross_entropy(logits[:2], labels[:2])
    assert float(values["loss"].detach()) == pytest.approx(float(want))


def test_restoration_scores_what_is_hidden_only():
    targets = torch.tensor([[[0.5], [float(IGNORE)], [-1.0]]])
    outputs = torch.tensor([[[1.0], [7.0], [1.0]]])
    values, count = Restoration(Fixed(outputs), 1).measure(Batch(torch.zeros(1, 3, 2), targets))
    assert int(count) == 2
    assert float(values["loss"].detach()) == pytest.approx((0.5 + 2.0) / 2)
    other = outputs.clone()
    other[0, 1] = -50
    again, _ = Restoration(Fixed(other), 1).measure(Batch(torch.zeros(1, 3, 2), targets))
    assert torch.equal(again["loss"], values["loss"])


@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("kind", ["tokens", "pixels", "levels"])
def test_every_objective_has_a_loss_that_falls(objective, kind):
    torch.manual_seed(0)
    base = ClassifyData(toys.SETS["tokens" if kind == "tokens" else "pixels"](), 8)
    data = DenoisingData(base, objective, rate=0.4, levels=256 if kind == "levels" else None)
    inputs = {"vocab_size": toys.VOCAB} if kind == "tokens" else {"channels": 1 + data.added_channels}
    model = SequenceClassifier(data.n_outputs, 16, 1, **inputs, mixer={"name": "s4d", "d_state": 8}, pool="none")
    task = (Restoration if kind == "pixels" else Recall)(model, data.n_outputs)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(30):
        loss = task.measure(data.batch(step))[0]["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
