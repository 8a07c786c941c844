"""Tiny models of every kind of state, wrapped for transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="these tests need transformers (extra: hf)")

SMALL = {"name": "mamba2", "d_state": 8, "head_dim": 16}
KINDS: dict[str, dict] = {
    "mamba": {"mixer": {"name": "mamba", "d_state": 4}},
    "mamba2": {"mixer": SMALL},
    "hybrid": {"mixer": [SMALL, {"name": "attention", "n_heads": 2}]},
    "s5": {"mixer": {"name": "s5", "d_state": 8}},  # its state is complex
    # Heads side by side, experts, factors everywhere.
    "parallel": {
        "mixer": {"name": "parallel", "mixers": [SMALL, {"name": "attention", "n_heads": 2, "window": 6}]},
        "mlp": {"name": "moe", "hidden": 16, "n_experts": 4, "top_k": 2},
        "embedding_scale": 3.0, "logit_scale": 0.5, "logit_cap": 4.0, "residual_scale": 0.7,
    },
    "rglru": {"mixer": "rglru"},
    "zamba2": {
        "architecture": "zamba2", "mixer": SMALL, "shared_at": [1], "n_heads": 2, "d_intermediate": 16, "rank": 4,
    },
}  # fmt: skip


@pytest.fixture
def build():
    """build("mamba", ...) -> StatewiseForCausalLM in eval mode."""
    import torch

    from statewise.hf import StatewiseConfig, StatewiseForCausalLM

    def make(kind: str = "hybrid", seed: int = 0, **options):
        torch.manual_seed(seed)
        given = {"vocab_size": 61, "d_model": 32, "n_layer": 2, **KINDS[kind], **options}
        model = StatewiseForCausalLM(StatewiseConfig(**given)).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                # At first most of an output is the last few inputs, passed by. Here it has to come from the state.
                if name.endswith(".D"):
                    p.zero_()
                elif name.endswith(("dt_bias", "dt_proj.bias", "log_step")):
                    p.add_(1.5)
                elif not p.any():
                    p.normal_(std=0.1)
        return model

    return make


@pytest.fixture(params=["mamba", "hybrid", "s5", "parallel", "zamba2"])
def model(request, build):
    return build(request.param)
