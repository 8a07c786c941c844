"""Small models, and what they must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from statewise.interop.export import _folder, _graphs
from statewise.interop.export._graphs import Graph
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
def mixed() -> LanguageModel:
    """A complex state, and a cache that grows: what is hardest to export. The slow tests have the other layers."""
    return build("s4d", "attention")


@pytest.fixture(scope="session")
def traced(mixed) -> Callable[..., Graph]:
    """`build` for the mixed model. Tracing takes most of an export, and both formats begin with the same programs."""
    model = _folder.plain_copy(mixed)
    made = {kind: _graphs.build(model, kind) for kind in ("extend", "step")}

    def build_again(model: LanguageModel, kind: str, *, capacity: int | None = None, portable: bool = True) -> Graph:
        assert (capacity, portable, model.config) == (None, True, mixed.config)
        return made[kind]

    return build_again
