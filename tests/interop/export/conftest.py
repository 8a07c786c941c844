"""One small model with every kind of layer, and what it must give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statewise.models.language import LanguageModel

VOCAB, WIDTH = 40, 16
MAMBA = {"name": "mamba", "d_state": 4}
MAMBA2 = {"name": "mamba2", "d_state": 8, "head_dim": 8, "n_groups": 2}
LAYERS: dict[str, Any] = {
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "s4d": {"name": "s4d", "d_state": 8},
    "s5": {"name": "s5", "d_state": 8},
    "attention": {"name": "attention", "n_heads": 2, "n_kv_heads": 1},
    "window": {"name": "attention", "n_heads": 2, "window": 5},
}
# Around the chunks of every recurrence, and one token.
LENGTHS = (1, 2, 4, 15, 16, 17, 31, 32, 33, 75)


def build(*layers: str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    mixer = [LAYERS[name] for name in layers]
    return LanguageModel(VOCAB, WIDTH, len(mixer), mixer=mixer, **options).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length))


def greedy(model: LanguageModel, prompt: torch.Tensor, count: int) -> list[int]:
    """The likeliest continuation of one row."""
    with torch.no_grad():
        logits, state = model.extend(prompt, None)
        made = [int(logits[0, -1].argmax())]
        while len(made) < count:
            step, state = model.step(torch.tensor(made[-1:]), state)
            made.append(int(step[0].argmax()))
    return made


@pytest.fixture(scope="session")
def everything() -> LanguageModel:
    return build(*LAYERS)
