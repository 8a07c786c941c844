"""The hybrids beside transformers: random weights, a tiny configuration and an oddly sized one of each."""

from __future__ import annotations

from typing import Any

import pytest

import statewise
from statewise.testing.parity import Families

transformers = pytest.importorskip("transformers", reason="the parity tests need transformers (extra: hf)")

# Known to be wrong in transformers, so compared with separate runs only; a check fails when one is repaired.
BIAS = "padding is masked before the input projection, whose bias then fills it"
CLAMP = "the step size is clamped from below over whole rows, but not when one token goes on from a cache"


def zamba2(odd: bool) -> Any:
    config = transformers.Zamba2Config(
        vocab_size=101, hidden_size=36 if odd else 32, num_hidden_layers=4, intermediate_size=27 if odd else 48,
        layers_block_type=["linear_attention", "hybrid", "hybrid" if odd else "linear_attention", "hybrid"],
        mamba_d_state=5 if odd else 8, mamba_d_conv=3 if odd else 4, mamba_expand=3 if odd else 2,
        mamba_ngroups=3 if odd else 1, n_mamba_heads=6 if odd else 4, chunk_size=11 if odd else 16,
        num_attention_heads=9 if odd else 4, num_mem_blocks=2 if odd else 1, adapter_rank=5,
        use_shared_attention_adapter=odd, use_mem_rope=odd, add_bias_linear=odd,
        time_step_min=0.05, time_step_max=0.1, rms_norm_eps=0.3 if odd else 1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    return transformers.Zamba2ForCausalLM(config)


def falcon_h1(odd: bool) -> Any:
    config = transformers.FalconH1Config(
        vocab_size=101, hidden_size=30 if odd else 32, num_hidden_layers=2, intermediate_size=27 if odd else 48,
        mamba_d_ssm=42 if odd else None, mamba_n_heads=6 if odd else 4, mamba_d_state=5 if odd else 8,
        mamba_n_groups=3 if odd else 1, mamba_d_conv=3 if odd else 4, mamba_chunk_size=11 if odd else 16,
        mamba_rms_norm=odd, mamba_norm_before_gate=odd, mamba_proj_bias=odd, projectors_bias=odd, mlp_bias=odd,
        num_attention_heads=6 if odd else 4, num_key_value_heads=3 if odd else 2, head_dim=6 if odd else 8,
        attention_bias=odd, rms_norm_eps=1e-3 if odd else 1e-5, tie_word_embeddings=odd,
        time_step_limit=(0.05, 0.2) if odd else (0.0, float("inf")),
        rope_parameters={"rope_type": "default", "rope_theta": 1e11 if odd else 1e4},
        ssm_multipliers=[0.7, 1.2, 0.6, 1.4, 0.9], ssm_in_multiplier=1.3, ssm_out_multiplier=0.8,
        attention_in_multiplier=0.9, attention_out_multiplier=1.1, key_multiplier=0.37, mlp_multipliers=[0.6, 1.7],
        embedding_multiplier=5.6, lm_head_multiplier=0.04,
    )  # fmt: skip
    return transformers.FalconH1ForCausalLM(config)


class RecurrentGemma(transformers.RecurrentGemmaForCausalLM):
    """Hands its cache out, as every other model of transformers does, and lets go of states."""

    def forward(self, *args: Any, use_cache: bool | None = None, cache: Any = None, **kwargs: Any) -> Any:
        if use_cache and cache is None:
            cache = transformers.DynamicCache(config=self.config)
        out = super().forward(*args, use_cache=use_cache, cache=cache, **kwargs)
        out.cache = cache
        if not use_cache:
            for layer in self.model.layers:
                if hasattr(layer.temporal_block, "rg_lru"):
                    layer.temporal_block.rg_lru.recurrent_states = None  # it would keep the graph of the last call
        return out


def recurrent_gemma(odd: bool) -> Any:
    config = transformers.RecurrentGemmaConfig(
        vocab_size=101, hidden_size=40 if odd else 32, num_hidden_layers=4 if odd else 3,
        intermediate_size=54 if odd else 96, num_attention_heads=5 if odd else 4, num_key_value_heads=1,
        lru_width=35 if odd else None, attention_window_size=7 if odd else 11, conv1d_width=3 if odd else 4,
        logits_soft_cap=1.5 if odd else 30.0, rms_norm_eps=1e-3 if odd else 1e-6, attention_bias=odd,
        block_types=["attention", "recurrent"] if odd else ["recurrent", "recurrent", "attention"],
        tie_word_embeddings=not odd, rope_parameters={"rope_type": "default", "rope_theta": 500.0 if odd else 1e4},
    )  # fmt: skip
    return RecurrentGemma(config)


def nemotron_h(odd: bool) -> Any:
    config = transformers.NemotronHConfig(
        vocab_size=101, hidden_size=30 if odd else 32, intermediate_size=27 if odd else 48,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"][odd:],
        num_attention_heads=6 if odd else 4, num_key_value_heads=3 if odd else 2, head_dim=7 if odd else 8,
        ssm_state_size=5 if odd else 8, mamba_num_heads=6 if odd else 4, mamba_head_dim=7 if odd else 16,
        n_groups=3 if odd else 1, conv_kernel=3 if odd else 4, chunk_size=11 if odd else 16,
        n_routed_experts=6 if odd else 4, num_experts_per_tok=3 if odd else 2, moe_intermediate_size=13 if odd else 16,
        moe_shared_expert_intermediate_size=19 if odd else 24, moe_latent_size=11 if odd else None,
        n_group=3 if odd else 1, topk_group=2 if odd else 1, norm_topk_prob=not odd, routed_scaling_factor=2.5,
        use_bias=odd, use_conv_bias=not odd, mlp_bias=odd, layer_norm_epsilon=1e-3 if odd else 1e-5,
        tie_word_embeddings=False, time_step_min=0.05, time_step_max=0.1,
    )  # fmt: skip
    model = transformers.NemotronHForCausalLM(config)
    model.set_experts_implementation("eager")  # grouped products refuse widths that are no multiple of 16 bytes
    for name, correction in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            correction.normal_(std=0.2)
    return model


CLAMPS = {"wrong_chunks": CLAMP, "wrong_steps": CLAMP}
RESTART = "the recurrent layers start anew with every chunk of more than one token"
UNMASKED = "the recurrent layers do not look at the attention mask"

# Name -> how it is built, and what is wrong in transformers: always, and for the odd configuration.
FAMILIES = Families(
    {
        "recurrent_gemma": (recurrent_gemma, {"wrong_chunks": RESTART, "wrong_padding": UNMASKED}, {}),
        "falcon_h1": (falcon_h1, {}, CLAMPS | {"wrong_padding": BIAS}),
        "nemotron_h": (nemotron_h, CLAMPS, {"wrong_padding": BIAS}),
        "zamba2": (zamba2, CLAMPS, {"wrong_padding": BIAS}),
    },
    statewise.load,
)


@pytest.mark.parametrize("law", [pytest.param(law, id=name) for name, law in FAMILIES.laws().items()])
def test_parity(law):
    law.check()
