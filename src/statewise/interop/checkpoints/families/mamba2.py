"""transformers `mamba2`."""

from __future__ import annotations

from typing import Any

from ..family import Config, Family, first
from ..fields import Fields, expansion
from ._parts import MAMBA2, stack_of, time_step_limit


def read(fields: Fields) -> Config:
    fields.only("hidden_act", "silu", default="silu")
    width, heads = fields.integer("hidden_size"), fields.integer("num_heads")
    head_dim, eps = fields.integer("head_dim", 64), fields.number("layer_norm_epsilon", 1e-5, above=0)
    inner = int(fields.number("expand", 2, above=0) * width)
    if heads * head_dim != inner:
        fields.fail("num_heads", f"expand * hidden_size / head_dim = {inner} / {head_dim}")
    mixer: dict[str, Any] = {
        "name": "mamba2",
        "d_state": fields.integer("state_size", 128),
        "expand": expansion(inner, width),
        "head_dim": head_dim,
        "n_groups": fields.integer("n_groups", 8),
        "d_conv": fields.integer("conv_kernel", 4),
        "dt_limit": fields.time_step_limit(),
        "bias": fields.flag("use_bias", False),
        "conv_bias": fields.flag("use_conv_bias", True),
        "norm_eps": eps,
    }
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": width,
        "n_layer": fields.layers("num_hidden_layers"),
        "mixer": mixer,
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "residual_in_fp32": fields.flag("residual_in_fp32", True),
        "norm_eps": eps,
    }


def write(config: Config) -> Config:
    mixer = first(config, "mixer", "mamba2")
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "num_hidden_layers": len(config["layers"]),
        "state_size": mixer["d_state"],
        "expand": mixer["expand"],
        "head_dim": mixer["head_dim"],
        "num_heads": int(mixer["expand"] * config["d_model"]) // mixer["head_dim"],
        "n_groups": mixer["n_groups"],
        "conv_kernel": mixer["d_conv"],
        **time_step_limit(mixer["dt_limit"]),
        "use_bias": mixer["bias"],
        "use_conv_bias": mixer["conv_bias"],
        "hidden_act": "silu",
        "layer_norm_epsilon": config["norm_eps"],
        "residual_in_fp32": config["residual_in_fp32"],
        "tie_word_embeddings": config["tie_embeddings"],
    }


FAMILY = Family(
    "mamba2",
    "transformers",
    read,
    write,
    stack_of(MAMBA2),
    head=("lm_head.weight", "backbone.embeddings.weight"),
)
