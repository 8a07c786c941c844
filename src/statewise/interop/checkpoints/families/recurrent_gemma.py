"""transformers `recurrent_gemma`: Griffin, that is RG-LRU layers with local attention in between."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..family import Config, Family, Inexpressible, first, has, shortest
from ..fields import Fields
from ..rules import Insert, Rule, same, within
from ._parts import ATTENTION, GATED, mixers_of, read_attention, rope_parameters

RGLRU = [
    Rule("x_proj.weight", "linear_x.weight"),
    Rule("x_proj.bias", "linear_x.bias"),
    Rule("gate_proj.weight", "linear_y.weight"),
    Rule("gate_proj.bias", "linear_y.bias"),
    Rule("conv1d.weight", "conv_1d.weight", Insert(1)),
    Rule("conv1d.bias", "conv_1d.bias"),
    Rule("Lambda", "rg_lru.recurrent_param"),
    Rule("input_gate.weight", "rg_lru.input_gate_weight"),
    Rule("input_gate.bias", "rg_lru.input_gate_bias"),
    Rule("recurrence_gate.weight", "rg_lru.recurrent_gate_weight"),
    Rule("recurrence_gate.bias", "rg_lru.recurrent_gate_bias"),
    Rule("out_proj.weight", "linear_out.weight"),
    Rule("out_proj.bias", "linear_out.bias"),
]
NORMS = [Rule("norm.weight", "temporal_pre_norm.weight"), Rule("norm2.weight", "channel_pre_norm.weight")]
NAMES = {"rglru": "recurrent", "attention": "attention"}


def rules(config: Config) -> list[Rule]:
    table = [
        Rule("embedding.weight", "model.embed_tokens.weight"),
        Rule("norm_f.weight", "model.final_norm.weight"),
        *same("lm_head.weight"),
    ]
    for i, mixer in enumerate(mixers_of(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table += within(ours, theirs, NORMS)
        table += within(f"{ours}.mixer", f"{theirs}.temporal_block", RGLRU if mixer == "rglru" else ATTENTION)
        table += within(f"{ours}.mlp", f"{theirs}.mlp_block", GATED)
    return table


def read(fields: Fields) -> Config:
    fields.only("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    fields.only("embeddings_scale_by_sqrt_dim", True, default=True)
    width, hidden = fields.integer("hidden_size"), fields.integer("intermediate_size")
    if hidden < 2:
        fields.fail("intermediate_size", "at least 2: it counts the gates and the values of the MLP")
    theta, part = fields.rope(fields.number("partial_rotary_factor", 0.5, above=0))
    attention = read_attention(
        fields,
        window=fields.integer("attention_window_size", 2048),
        rope_theta=theta,
        bias=fields.flag("attention_bias", False),
        out_bias=True,
    )
    attention["rope_dim"] = int(attention["head_dim"] * part)
    recurrent: dict[str, Any] = {
        "name": "rglru",
        "d_rnn": fields.integer("lru_width", width),
        "n_blocks": attention["n_heads"],
        "d_conv": fields.integer("conv1d_width", 4),
    }
    n_layer, kinds = fields.layers("num_hidden_layers"), {"recurrent": recurrent, "attention": attention}
    pattern = fields.get("block_types", ["recurrent", "recurrent", "attention"])
    if not isinstance(pattern, list) or not pattern or not all(kind in kinds for kind in pattern):
        fields.fail("block_types", "a list of 'recurrent' and 'attention'")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": width,
        "n_layer": n_layer,
        "mixer": shortest([kinds[pattern[i % len(pattern)]] for i in range(n_layer)] or [recurrent]),
        "mlp": {"name": "gated", "hidden": hidden // 2, "bias": True, "multiple_of": 1, "activation": "gelu_tanh"},
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
        "residual_in_fp32": False,
        "norm_eps": fields.number("rms_norm_eps", 1e-6, above=0),
        "norm_offset": 1.0,
        # The published model was trained with the factor in bfloat16.
        "embedding_scale": float(torch.tensor(math.sqrt(width), dtype=torch.bfloat16)),
        "logit_cap": fields.number("logits_soft_cap", 30.0, above=0),
    }


def write(config: Config) -> Config:
    mlp, kinds = first(config, "mlp", "gated"), mixers_of(config)
    if not set(kinds) <= set(NAMES):
        raise Inexpressible(f"mixer: want {' or '.join(NAMES)} in every layer, got {', '.join(sorted(set(kinds)))}")
    own: Config = {}
    if has(config, "mixer", "rglru"):
        mixer = first(config, "mixer", "rglru")
        own |= {
            "lru_width": mixer["d_rnn"],
            "conv1d_width": mixer["d_conv"],
            "num_attention_heads": mixer["n_blocks"],
            "num_key_value_heads": mixer["n_blocks"],
        }
    if has(config, "mixer", "attention"):
        mixer = first(config, "mixer", "attention")
        own |= {
            "num_attention_heads": mixer["n_heads"],
            "num_key_value_heads": mixer["n_kv_heads"],
            "attention_window_size": mixer["window"],
            "attention_bias": mixer["bias"],
            "rope_parameters": rope_parameters(mixer),
        }
    return {
        "model_type": "recurrent_gemma",
        "architectures": ["RecurrentGemmaForCausalLM"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "num_hidden_layers": len(kinds),
        "block_types": shortest([NAMES[kind] for kind in kinds]),
        **own,
        "intermediate_size": 2 * mlp["hidden"],
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": config["norm_eps"],
        "logits_soft_cap": config["logit_cap"],
        "tie_word_embeddings": config["tie_embeddings"],
    }


FAMILY = Family("recurrent_gemma", "transformers", read, write, rules)
