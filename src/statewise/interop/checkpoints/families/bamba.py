"""transformers `bamba`: Mamba-2 and, in some layers, attention of which half a head turns; gated MLPs."""

from __future__ import annotations

from ..family import Config, Family, first, has, shortest
from ..fields import Fields
from ..rules import Rule, same, within
from ._parts import (
    GATED,
    MAMBA2,
    mixers_of,
    of_two,
    read_attention,
    read_mamba2,
    write_attention,
    write_common,
    write_mamba2,
)

NORMS = [Rule("norm.weight", "input_layernorm.weight"), Rule("norm2.weight", "pre_ff_layernorm.weight")]
MODEL = [
    Rule("embedding.weight", "model.embed_tokens.weight"),
    Rule("norm_f.weight", "model.final_layernorm.weight"),
    *same("lm_head.weight"),
]


def rules(config: Config) -> list[Rule]:
    table = list(MODEL)
    for i, mixer in enumerate(mixers_of(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table += within(ours, theirs, NORMS)
        table += within(f"{ours}.mlp", f"{theirs}.feed_forward", GATED)
        table += of_two(ours, theirs, mixer, MAMBA2)
    return table


def read(fields: Fields) -> Config:
    fields.only("hidden_act", "silu", default="silu")
    n_layer, eps = fields.layers("num_hidden_layers"), fields.number("rms_norm_eps", 1e-5, above=0)
    theta, fraction = fields.rope(0.5)
    attention = read_attention(fields, rope_theta=theta, bias=fields.flag("attention_bias", False))
    attention["rope_dim"] = int(attention["head_dim"] * fraction)
    mamba = read_mamba2(fields) | {"norm_eps": eps}
    where = set(fields.integers("attn_layer_indices", [], most=n_layer - 1))
    mlp = {
        "name": "gated",
        "hidden": fields.integer("intermediate_size"),
        "multiple_of": 1,
        "bias": fields.flag("mlp_bias", False),
    }
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": fields.integer("hidden_size"),
        "n_layer": n_layer,
        "mixer": shortest([attention if i in where else mamba for i in range(n_layer)] or [mamba]),
        "mlp": mlp,
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "residual_in_fp32": False,
        "norm_eps": eps,
    }


def write(config: Config) -> Config:
    mlp = first(config, "mlp", "gated")
    rope: Config = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if has(config, "mixer", "attention"):
        mixer = first(config, "mixer", "attention")
        rope |= {
            "rope_theta": mixer["rope_theta"],
            "partial_rotary_factor": mixer["rope_dim"] / mixer["head_dim"],
        }
    return {
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        **write_common(config),
        **write_attention(config),
        **write_mamba2(config),
        "attn_layer_indices": [i for i, name in enumerate(mixers_of(config)) if name == "attention"],
        "attention_bias": has(config, "mixer", "attention") and first(config, "mixer", "attention")["bias"],
        "rope_parameters": rope,
        "intermediate_size": mlp["hidden"],
        "mlp_bias": mlp["bias"],
    }


FAMILY = Family("bamba", "transformers", read, write, rules, ignored=("rotary_emb.inv_freq",))
