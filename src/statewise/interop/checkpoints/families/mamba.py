"""transformers `mamba`."""

from __future__ import annotations

from typing import Any

from ..family import Config, Family, first
from ..fields import Fields, expansion
from ._parts import MAMBA, stack_of


def read(fields: Fields) -> Config:
    fields.only("hidden_act", "silu", default="silu")
    width = fields.integer("hidden_size")
    expand = fields.number("expand", 2, above=0)
    inner = fields.integer("intermediate_size", int(expand * width))
    rank = fields.get("time_step_rank", "auto")
    mixer: dict[str, Any] = {
        "name": "mamba",
        "d_state": fields.integer("state_size", 16),
        # Some published files have an `expand` that their own `intermediate_size` overrides.
        "expand": expansion(inner, width),
        "d_conv": fields.integer("conv_kernel", 4),
        "dt_rank": None if rank == "auto" else fields.integer("time_step_rank"),
        "bias": fields.flag("use_bias", False),
        "conv_bias": fields.flag("use_conv_bias", True),
    }
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": width,
        "n_layer": fields.layers("num_hidden_layers"),
        "mixer": mixer,
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
        "residual_in_fp32": fields.flag("residual_in_fp32", True),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5, above=0),
    }


def write(config: Config) -> Config:
    mixer = first(config, "mixer", "mamba")
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "num_hidden_layers": len(config["layers"]),
        "state_size": mixer["d_state"],
        "expand": mixer["expand"],
        "intermediate_size": int(mixer["expand"] * config["d_model"]),
        "conv_kernel": mixer["d_conv"],
        "time_step_rank": mixer["dt_rank"],
        "use_bias": mixer["bias"],
        "use_conv_bias": mixer["conv_bias"],
        "hidden_act": "silu",
        "layer_norm_epsilon": config["norm_eps"],
        "residual_in_fp32": config["residual_in_fp32"],
        "tie_word_embeddings": config["tie_embeddings"],
    }


FAMILY = Family(
    "mamba",
    "transformers",
    read,
    write,
    stack_of(MAMBA),
    head=("lm_head.weight", "backbone.embeddings.weight"),
)
