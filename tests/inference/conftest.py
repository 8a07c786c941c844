"""Small models whose texts do not repeat themselves at once."""

import pytest
import torch

from statewise.models.language.stack import LanguageModel

V = 40


def make_model(mixer="mamba2", width=32, seed=0):
    torch.manual_seed(seed)
    options = {"name": mixer, **({"head_dim": 16, "d_state": 16} if mixer == "mamba2" else {})}
    # A tied head would make an untrained model repeat its last token.
    model = LanguageModel(V, width, 2, mixer=options if mixer != "hybrid" else HYBRID, tie_embeddings=False)
    with torch.no_grad():
        model.embedding.weight.mul_(30)  # so that logits differ by more than rounding
    return model.eval()


HYBRID = [{"name": "mamba2", "head_dim": 16, "d_state": 16}, {"name": "attention", "window": 7}]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def build():
    return make_model


def rows_of(steps):
    return torch.stack(list(steps), 1).tolist()


@pytest.fixture
def rows():
    return rows_of
