"""Configurations of the hybrids: old spellings, values that cannot be served, and models that have no words in them."""

from __future__ import annotations

import pytest

from statewise.interop.checkpoints.converting import express
from statewise.interop.checkpoints.describe import complete
from statewise.interop.checkpoints.families import family
from statewise.interop.checkpoints.fields import Fields
from statewise.models.language import LanguageModel, Zamba2

GEMMA = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 24, "num_attention_heads": 2}
FALCON = {**GEMMA, "mamba_d_ssm": 24, "mamba_n_heads": 4, "mamba_d_state": 4}
NEMOTRON = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
ZAMBA = {**GEMMA, "n_mamba_heads": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
CONFIGS = {"recurrent_gemma": GEMMA, "falcon_h1": FALCON, "nemotron_h": NEMOTRON, "zamba2": ZAMBA}


def read(name: str, **changes: object) -> dict:
    return family(name).read(Fields({**CONFIGS[name], **changes}, "config.json"))


def test_old_spellings():
    pattern = read("nemotron_h", hybrid_override_pattern="M*-E", n_routed_experts=4)
    words = ["mamba", "attention", "mlp", "moe"]
    assert pattern == read("nemotron_h", layers_block_type=words, n_routed_experts=4)
    assert pattern == read("nemotron_h", layer_types=["linear_attention", "full_attention", "mlp", "moe"],
                           n_routed_experts=4)  # fmt: skip
    assert [mixer and mixer["name"] for mixer in pattern["mixer"]] == ["mamba2", "attention", None, None]
    assert read("zamba2") == read("zamba2", layers_block_type=["linear_attention", "hybrid"] * 2)
    old = read("recurrent_gemma", rope_theta=50.0, partial_rotary_factor=0.25)
    assert old == read("recurrent_gemma", rope_parameters={"rope_theta": 50.0, "partial_rotary_factor": 0.25})
    assert (old["mixer"][2]["rope_dim"], old["mixer"][2]["rope_theta"]) == (2, 50.0)
    assert [mixer["name"] for mixer in old["mixer"]] == ["rglru", "rglru", "attention", "rglru"]


def test_the_embedding_scale_is_rounded_as_it_was_trained():
    assert read("recurrent_gemma", hidden_size=2560, num_attention_heads=10)["embedding_scale"] == 50.5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("recurrent_gemma", {"hidden_activation": "silu"}, "hidden_activation: want 'gelu_pytorch_tanh'"),
        ("recurrent_gemma", {"block_types": ["mamba"]}, "block_types: want a list of 'recurrent' and 'attention'"),
        ("recurrent_gemma", {"rope_scaling": {"type": "linear"}}, "rope_scaling: type: want 'default'"),
        ("falcon_h1", {"projectors_bias": True}, "projectors_bias: want the value of mamba_proj_bias, False"),
        ("falcon_h1", {"ssm_multipliers": [1, 2]}, "ssm_multipliers: want 5 finite numbers"),
        ("falcon_h1", {"mlp_multipliers": [1, float("nan")]}, "mlp_multipliers: want 2 finite numbers"),
        ("falcon_h1", {"mamba_n_heads": 5}, "mamba_n_heads: want"),
        ("nemotron_h", {}, "hybrid_override_pattern"),
        ("nemotron_h", {"hybrid_override_pattern": "MX"}, "up to 10000 of the letters M\\*-E"),
        ("nemotron_h", {"layer_types": ["mamba", "rwkv"]}, "layer_types: want up to 10000 of 'linear_attention'"),
        ("nemotron_h", {"layer_types": ["mlp"], "mlp_hidden_act": "tanh"}, "mlp_hidden_act: want 'relu2'"),
        ("nemotron_h", {"layer_types": ["mlp"], "num_nextn_predict_layers": 1}, "num_nextn_predict_layers: want 0"),
        ("zamba2", {"n_mamba_heads": 5}, "n_mamba_heads: want a divisor of mamba_expand \\* hidden_size = 32"),
        ("zamba2", {"use_long_context": True}, "use_long_context: want False"),
        ("zamba2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "a partial_rotary_factor of 1"),
        ("zamba2", {"layers_block_type": ["mamba"]}, "layers_block_type: want 4 of"),
    ],
)
def test_values_that_cannot_be_served(name, changes, message):
    with pytest.raises(ValueError, match=message):
        read(name, **changes)


MAMBA2 = {"name": "mamba2", "d_state": 4, "head_dim": 4}
LIMIT = {**MAMBA2, "dt_limit": [0.1, None]}


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("nemotron_h", lambda: LanguageModel(11, 8, 1, mixer=LIMIT, d_intermediate=8), "want one of mamba2, attention"),
        ("nemotron_h", lambda: LanguageModel(11, 8, 1, mixer=MAMBA2), "dt_limit: transformers clamps"),
        ("recurrent_gemma", lambda: LanguageModel(11, 8, 1, mixer=MAMBA2, d_intermediate=8), "want rglru or attention"),
        ("falcon_h1", lambda: LanguageModel(11, 8, 1, mixer={"name": "parallel", "mixers": [MAMBA2]}, d_intermediate=8),
         "want mamba2 and attention in parallel"),
        ("zamba2", lambda: zamba(tie_embeddings=False), "shares blocks only where it ties the embeddings"),
        ("zamba2", lambda: zamba(mixer=MAMBA2), "want mamba2 with a dt_limit"),
        ("zamba2", lambda: zamba(rank=2, attention_rank=3), "rank: want at least 1, and attention_rank 0 or the same"),
    ],
)  # fmt: skip
def test_models_without_words(name, model, message):
    with pytest.raises(ValueError, match=message):
        express(model(), "transformers", name, others=False)


def zamba(**options) -> Zamba2:
    given = {"shared_at": [0, 1], "mixer": LIMIT, "n_heads": 4, "d_intermediate": 6, "rank": 2}
    return Zamba2(11, 8, 2, **{**given, **options})


@pytest.mark.parametrize("key", [0.37, 1.0, 0.39062499999999994, 3.3])
@pytest.mark.parametrize("head_dim", [6, 64, 80])
def test_the_factor_on_keys_comes_back(key, head_dim):
    config = {**FALCON, "num_hidden_layers": 1, "key_multiplier": key, "head_dim": head_dim}
    model = LanguageModel(**family("falcon_h1").read(Fields(config, "config.json")))
    said = family("falcon_h1").write(complete(model))["key_multiplier"]
    again = LanguageModel(**family("falcon_h1").read(Fields({**config, "key_multiplier": said}, "config.json")))
    assert complete(again) == complete(model)
