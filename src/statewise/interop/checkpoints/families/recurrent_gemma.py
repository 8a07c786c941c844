"""transformers `recurrent_gemma`: Griffin, that is RG-LRU layers with local attention in between."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..family import Config, Family, Inexpressible, first
from ..fields import Fields
from ..rules import Insert, Rule, same, within
from ._parts import ATTENTION, GATED
from ._rope import read_rope, write_rope

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
NAMES = {"rglru": "recurrent", "attention": "attention"}


def rules(config: Config) -> list[Rule]:
    table = [
        Rule("embedding.weight", "model.embed_tokens.weight"),
        Rule("norm_f.weight", "model.final_norm.weight"),
        *same("lm_head.weight"),
    ]
    for i, layer in enumerate(config["layers"]):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        mixer = RGLRU if layer["mixer"]["name"] == "rglru" else ATTENTION
        table += within(f"{ours}.mixer", f"{theirs}.temporal_block", mixer)
        table += within(f"{ours}.mlp", f"{theirs}.mlp_block", GATED)
        table += [
            Rule(f"{ours}.norm.weight", f"{theirs}.temporal_pre_norm.weight"),
            Rule(f"{ours}.norm2.weight", f"{theirs}.channel_pre_norm.weight"),
        ]
    return table


def read(fields: Fields) -> Config:
    fields.only("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    fields.only("embeddings_scale_by_sqrt_dim", True, default=True)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    hidden = fields.integer("intermediate_size")
    if width % heads:
        fields.fail("num_attention_heads", f"a divisor of hidden_size = {width}")
    if hidden < 2:
        fields.fail("intermediate_size", "at least 2: it counts the MLP's gates and values together")
    recurrent = {
        "name": "rglru",
        "d_rnn": fields.integer("lru_width", width),
        "n_blocks": heads,
        "d_conv": fields.integer("conv1d_width", 4),
    }
    attention: dict[str, Any] = {
        "name": "attention",
        "n_heads": heads,
        "n_kv_heads": fields.integer("num_key_value_heads", heads),
        "window": fields.integer("attention_window_size", 2048),
        **read_rope(fields, width // heads, part=0.5),
        "bias": fields.flag("attention_bias", False),
        "out_bias": True,
    }
    layers = fields.layers("num_hidden_layers")
    pattern = fields.get("block_types", ["recurrent", "recurrent", "attention"])
    if not isinstance(pattern, list) or not pattern or not set(pattern) <= set(NAMES.values()):
        fields.fail("block_types", "a list of 'recurrent' and 'attention'")
    kinds = {"recurrent": recurrent, "attention": attention}
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": width,
        "n_layer": layers,
        "mixer": [kinds[pattern[i % len(pattern)]] for i in range(layers)],
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
    mlp = config["layers"][0]["mlp"] if config["layers"] else None
    if mlp is None or config["logit_cap"] is None:
        raise Inexpressible("want a gated MLP in every layer, and a logit_cap")
    if any(layer["mixer"]["name"] not in NAMES for layer in config["layers"]):
        raise Inexpressible(f"mixer: want {' or '.join(NAMES)} in every layer")
    recurrent, attention = first(config, "mixer", "rglru"), first(config, "mixer", "attention")
    return {
        "model_type": "recurrent_gemma",
        "architectures": ["RecurrentGemmaForCausalLM"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "num_hidden_layers": len(config["layers"]),
        "block_types": [NAMES[layer["mixer"]["name"]] for layer in config["layers"]],
        "intermediate_size": 2 * mlp["hidden"],
        "hidden_activation": "gelu_pytorch_tanh",
        "lru_width": recurrent["d_rnn"],
        "conv1d_width": recurrent["d_conv"],
        "num_attention_heads": attention["n_heads"],
        "num_key_value_heads": attention["n_kv_heads"],
        "attention_window_size": attention["window"],
        "attention_bias": attention["bias"],
        "rope_parameters": write_rope(attention),
        "rms_norm_eps": config["norm_eps"],
        "logits_soft_cap": config["logit_cap"],
        "tie_word_embeddings": config["tie_embeddings"],
    }


FAMILY = Family("recurrent_gemma", "transformers", read, write, rules)
