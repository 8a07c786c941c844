"""Every family beside transformers: random weights, a tiny configuration and an oddly sized one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import statewise
from statewise.testing.parity import Families

transformers = pytest.importorskip("transformers", reason="the parity tests need transformers (extra: hf)")


def falcon_mamba(odd: bool) -> Any:
    config = transformers.FalconMambaConfig(
        vocab_size=101, hidden_size=37 if odd else 32, state_size=5 if odd else 8, num_hidden_layers=2,
        conv_kernel=3 if odd else 4, tie_word_embeddings=not odd, time_step_rank=7 if odd else "auto",
        expand=3 if odd else 2, mixer_rms_eps=1e-3 if odd else 1e-6,
    )  # fmt: skip
    return transformers.FalconMambaForCausalLM(config)


def mamba2(odd: bool) -> Any:
    config = transformers.Mamba2Config(
        vocab_size=101, hidden_size=36 if odd else 32, state_size=6 if odd else 8, num_hidden_layers=2,
        head_dim=9 if odd else 16, num_heads=12 if odd else 4, expand=3 if odd else 2, n_groups=3 if odd else 1,
        conv_kernel=3 if odd else 4, chunk_size=13 if odd else 16, tie_word_embeddings=odd, use_conv_bias=not odd,
        layer_norm_epsilon=1e-3 if odd else 1e-5, time_step_limit=(0.01, 0.9) if odd else (0.0, float("inf")),
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


def bamba(odd: bool) -> Any:
    config = transformers.BambaConfig(
        vocab_size=101, hidden_size=36 if odd else 32, intermediate_size=51 if odd else 48, num_hidden_layers=3,
        num_attention_heads=3 if odd else 4, num_key_value_heads=1 if odd else 2, attn_layer_indices=[1],
        mamba_n_heads=6 if odd else 4, mamba_d_state=5 if odd else 8, mamba_n_groups=3 if odd else 1,
        mamba_d_conv=3 if odd else 4, mamba_expand=3 if odd else 2, mamba_chunk_size=13 if odd else 16,
        attention_bias=odd, mlp_bias=odd, mamba_conv_bias=not odd, tie_word_embeddings=odd,
        rms_norm_eps=1e-3 if odd else 1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0 if odd else 10000.0},
    )  # fmt: skip
    return transformers.BambaForCausalLM(config)


def granitemoehybrid(odd: bool) -> Any:
    config = transformers.GraniteMoeHybridConfig(
        vocab_size=101, hidden_size=36 if odd else 32, intermediate_size=19 if odd else 16, num_hidden_layers=3,
        shared_intermediate_size=23 if odd else 24, num_attention_heads=3 if odd else 4,
        num_key_value_heads=3 if odd else 2, num_local_experts=5 if odd else 4, num_experts_per_tok=3 if odd else 2,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mamba_n_heads=6 if odd else 4, mamba_d_state=5 if odd else 8, mamba_n_groups=3 if odd else 1,
        mamba_d_conv=3 if odd else 4, mamba_expand=3 if odd else 2, mamba_chunk_size=13 if odd else 16,
        position_embedding_type="rope" if odd else "nope", tie_word_embeddings=not odd, attention_bias=odd,
        attention_multiplier=0.3 if odd else 0.25, embedding_multiplier=12.0, residual_multiplier=0.22,
        logits_scaling=6.0 if odd else 8.0, rms_norm_eps=1e-3 if odd else 1e-5,
    )  # fmt: skip
    return plainly(transformers.GraniteMoeHybridForCausalLM(config))


def granite_dense(odd: bool) -> Any:
    theirs = granitemoehybrid(odd).config
    theirs.num_local_experts = 0
    return transformers.GraniteMoeHybridForCausalLM(theirs)


def jamba(odd: bool) -> Any:
    config = transformers.JambaConfig(
        vocab_size=101, hidden_size=36 if odd else 32, intermediate_size=19 if odd else 16,
        num_hidden_layers=5 if odd else 4, num_attention_heads=3 if odd else 4, num_key_value_heads=1 if odd else 2,
        num_experts=5 if odd else 4, num_experts_per_tok=3 if odd else 2, attn_layer_period=3 if odd else 2,
        attn_layer_offset=2 if odd else 1, expert_layer_period=2, expert_layer_offset=0 if odd else 1,
        mamba_d_state=5 if odd else 8, mamba_d_conv=3 if odd else 4, mamba_expand=3 if odd else 2,
        mamba_dt_rank=7 if odd else "auto", mamba_conv_bias=not odd, tie_word_embeddings=odd,
        rms_norm_eps=1e-3 if odd else 1e-6,
    )  # fmt: skip
    return plainly(transformers.JambaForCausalLM(config))


# Known to be wrong in transformers, so compared with separate runs only; a check fails when one is repaired.
MAMBA_1 = "Mamba-1 continued by several tokens at once starts from a state of zeros"


def plainly(theirs: Any) -> Any:
    """Experts in a loop: their grouped products refuse widths that are no multiple of 16 bytes."""
    theirs.set_experts_implementation("eager")
    return theirs


def mamba(odd: bool) -> Any:
    config = transformers.MambaConfig(
        vocab_size=101, hidden_size=37 if odd else 32, state_size=5 if odd else 8, num_hidden_layers=2,
        conv_kernel=3 if odd else 4, tie_word_embeddings=not odd, time_step_rank=7 if odd else "auto",
        expand=3 if odd else 2, use_bias=odd, use_conv_bias=not odd, layer_norm_epsilon=1e-3 if odd else 1e-5,
    )  # fmt: skip
    return transformers.MambaForCausalLM(config)


BIAS = "padding is masked before the input projection, whose bias then fills it"

LIMIT = "a step of one token ignores time_step_limit"

# Name -> how it is built, and what is wrong in transformers: always, and for the odd configuration.
FAMILIES = Families(
    {
        "mamba": (mamba, {"wrong_chunks": MAMBA_1}, {"wrong_padding": BIAS}),
        "falcon_mamba": (falcon_mamba, {"wrong_chunks": MAMBA_1}, {}),
        "mamba2": (mamba2, {}, {"wrong_chunks": LIMIT, "wrong_steps": LIMIT}),
        "bamba": (bamba, {}, {}),
        "granitemoehybrid": (granitemoehybrid, {}, {}),
        "granite_dense": (granite_dense, {}, {}),
        "jamba": (jamba, {"wrong_chunks": MAMBA_1}, {}),
    },
    statewise.load,
)


@pytest.mark.parametrize("law", [pytest.param(law, id=name) for name, law in FAMILIES.laws().items()])
def test_parity(law):
    law.check()


def test_old_spellings(tmp_path):
    """Files from before version 5 of transformers: fields of rotary positions at the top, other words for layers."""
    tokens = torch.arange(9)[None]
    for name, changes in (
        ("bamba", {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": None}),
        ("granitemoehybrid", {"layer_types": ..., "layers_block_type": ["mamba", "attention", "mamba"]}),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention", "mamba"]}),
        ("falcon_mamba", {"expand": 16}),  # intermediate_size holds, as in the published file
    ):
        theirs, ours = FAMILIES.pair(name, False)
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
        assert torch.equal(statewise.load(tmp_path)(tokens), ours(tokens)), name


def test_scaled_rotary_positions_are_refused(tmp_path):
    theirs, _ = FAMILIES.pair("bamba", False)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for field in ("rope_parameters", "rope_scaling"):
        path.write_text(json.dumps(good | {field: {"rope_type": "yarn", "factor": 4.0}}))
        with pytest.raises(ValueError, match=rf"{field}: rope_type: want 'default' .*got 'yarn'"):
            statewise.load(tmp_path)
