"""What several families share: tables of names below a mixer or a feed-forward part, and fields of their options.

The fields are those of hybrids in transformers, which write `mamba_` before everything of Mamba-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..family import Config, first, has
from ..fields import Fields, expansion
from ..rules import Insert, Joined, Rule, Swapped, same, within

MAMBA = [
    *same("in_proj.weight", "in_proj.bias", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"),
    *same("A_log", "D", "out_proj.weight", "out_proj.bias"),
    Rule("conv1d.weight", "conv1d.weight", Insert(1)),
]
# Jamba's names of the norms on dt, B and C.
MAMBA_NORMS = [
    Rule("norms.dt.weight", "dt_layernorm.weight"),
    Rule("norms.B.weight", "b_layernorm.weight"),
    Rule("norms.C.weight", "c_layernorm.weight"),
]
MAMBA2 = [
    *same("in_proj.weight", "in_proj.bias", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight"),
    *same("out_proj.weight", "out_proj.bias"),
    Rule("conv1d.weight", "conv1d.weight", Insert(1)),
]
ATTENTION = [
    *same("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"),
    Rule("out_proj.weight", "o_proj.weight"),
    Rule("out_proj.bias", "o_proj.bias"),
]
# Our fc1 is [y, gate]. Llama's names, one matrix each:
GATED = [
    Rule("fc1.weight", ("up_proj.weight", "gate_proj.weight"), Joined()),
    Rule("fc1.bias", ("up_proj.bias", "gate_proj.bias"), Joined()),
    Rule("fc2.weight", "down_proj.weight"),
    Rule("fc2.bias", "down_proj.bias"),
]
# Granite's names, one matrix [gate, y]:
GATED_IN_ONE = [Rule("fc1.weight", "input_linear.weight", Swapped()), Rule("fc2.weight", "output_linear.weight")]


def stack_of(mixer: list[Rule]) -> Callable[[Config], list[Rule]]:
    """Rules of a model of norms and mixers of one kind alone, as transformers names them."""

    def rules(config: Config) -> list[Rule]:
        table = [
            Rule("embedding.weight", "backbone.embeddings.weight"),
            Rule("norm_f.weight", "backbone.norm_f.weight"),
            *same("lm_head.weight"),
        ]
        for i in range(len(config["layers"])):
            table += within(f"layers.{i}", f"backbone.layers.{i}", same("norm.weight"))
            table += within(f"layers.{i}.mixer", f"backbone.layers.{i}.mixer", mixer)
        return table

    return rules


def of_two(ours: str, theirs: str, mixer: str | None, recurrent: list[Rule]) -> list[Rule]:
    """Rules of a layer's mixer, which is attention or, under another name, recurrent."""
    if mixer == "attention":
        return within(f"{ours}.mixer", f"{theirs}.self_attn", ATTENTION)
    return within(f"{ours}.mixer", f"{theirs}.mamba", recurrent)


# ---- fields ----------------------------------------------------------------------------------------------------------


def read_attention(fields: Fields, **options: Any) -> Config:
    """Softmax attention with grouped heads; `options` are those that the family has in words of its own."""
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", width // heads)
    return {
        "name": "attention",
        "n_heads": heads,
        "n_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        **options,
    }


def write_attention(config: Config) -> Config:
    if not has(config, "mixer", "attention"):
        return {"num_attention_heads": 1, "num_key_value_heads": 1}
    mixer = first(config, "mixer", "attention")
    return {"num_attention_heads": mixer["n_heads"], "num_key_value_heads": mixer["n_kv_heads"]}


def read_mamba2(fields: Fields) -> Config:
    width, heads = fields.integer("hidden_size"), fields.integer("mamba_n_heads", 128)
    # Falcon-H1 says the inner width itself.
    inner = fields.integer("mamba_d_ssm", int(fields.number("mamba_expand", 2, above=0) * width))
    head_dim = fields.get("mamba_d_head", "auto")
    head_dim = inner // heads if head_dim == "auto" else fields.integer("mamba_d_head")
    if heads * head_dim != inner:
        fields.fail("mamba_n_heads", f"mamba_expand * hidden_size / mamba_d_head = {inner} / {head_dim}")
    return {
        "name": "mamba2",
        "d_state": fields.integer("mamba_d_state", 256),
        "expand": expansion(inner, width),
        "head_dim": head_dim,
        "n_groups": fields.integer("mamba_n_groups", 1),
        "d_conv": fields.integer("mamba_d_conv", 4),
        "dt_limit": fields.time_step_limit(),
        "bias": fields.flag("mamba_proj_bias", False),
        "conv_bias": fields.flag("mamba_conv_bias", True),
    }


def write_mamba2(config: Config) -> Config:
    if not has(config, "mixer", "mamba2"):
        return {"mamba_n_heads": 1, "mamba_d_head": "auto"}
    mixer = first(config, "mixer", "mamba2")
    return {"mamba_expand": mixer["expand"], **mamba2_fields(mixer, config["d_model"])}


def mamba2_fields(mixer: Config, d_model: int) -> Config:
    """All but the expansion."""
    return {
        "mamba_d_state": mixer["d_state"],
        "mamba_d_head": mixer["head_dim"],
        "mamba_n_heads": int(mixer["expand"] * d_model) // mixer["head_dim"],
        "mamba_n_groups": mixer["n_groups"],
        "mamba_d_conv": mixer["d_conv"],
        **time_step_limit(mixer["dt_limit"]),
        "mamba_proj_bias": mixer["bias"],
        "mamba_conv_bias": mixer["conv_bias"],
    }


def time_step_limit(limit: tuple[float, float | None] | None) -> Config:
    """Our clamp of the step size as transformers writes it."""
    if limit is None:
        return {}
    return {"time_step_limit": [limit[0], math.inf if limit[1] is None else limit[1]]}


def write_common(config: Config) -> Config:
    """What every hybrid in transformers calls alike."""
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "num_hidden_layers": len(config["layers"]),
        "hidden_act": "silu",
        "rms_norm_eps": config["norm_eps"],
        "tie_word_embeddings": config["tie_embeddings"],
    }


def rope_parameters(attention: Config) -> Config:
    """Rotary positions as transformers 5 writes them."""
    part = attention["rope_dim"] / attention["head_dim"]
    return {"rope_type": "default", "rope_theta": attention["rope_theta"], "partial_rotary_factor": part}


def mixers_of(config: Config) -> list[str]:
    """The name of each layer's mixer, "" where there is none."""
    return [layer["mixer"]["name"] if layer["mixer"] else "" for layer in config["layers"]]
