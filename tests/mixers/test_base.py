"""What the contract says to callers who get it wrong."""

from __future__ import annotations

import pytest
import torch

from statewise import mixers


@pytest.mark.parametrize("name", ["s4d", "mamba", "attention"])
@pytest.mark.parametrize("shape", [(2, 10, 16), (2, 15), (16,)])
def test_a_step_says_that_it_wants_one_position(name, shape):
    mixer = mixers.create(name, 16).eval()
    with pytest.raises(ValueError, match=r"\.step: x_t: want \(B, D\) with D = 16 \(extend takes \(B, L, D\)\), got"):
        mixer.step(torch.zeros(shape), mixer.init_state(2))
