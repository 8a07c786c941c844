"""Tiny models of every kind of state, wrapped for transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="these tests need transformers (extra: hf)")

MIXERS = {
    "mamba": {"name": "mamba", "d_state": 4},
    "mamba2": {"name": "mamba2", "d_state": 8, "head_dim": 16},
    "hybrid": [{"name": "mamba2", "d_state": 8, "head_dim": 16}, {"name": "attention", "n_heads": 2}],
    "s5": {"name": "s5", "d_state": 8},  # its state is complex
}


@pytest.fixture
def build():
    """build("mamba", ...) -> StatewiseForCausalLM in eval mode."""
    import torch

    from statewise.hf import StatewiseConfig, StatewiseForCausalLM

    def make(kind: str = "hybrid", seed: int = 0, **options):
        torch.manual_seed(seed)
        given = {"vocab_size": 61, "d_model": 32, "n_layer": 2, "d_intermediate": 0, "mixer": MIXERS[kind], **options}
        model = StatewiseForCausalLM(StatewiseConfig(**given)).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                # At first most of an output is the last few inputs, passed by. Here it has to come from the state.
                if name.endswith(".D"):
                    p.zero_()
                elif name.endswith(("dt_bias", "dt_proj.bias", "log_step")):
                    p.add_(1.5)
        return model

    return make


@pytest.fixture(params=list(MIXERS))
def model(request, build):
    return build(request.param)
