"""transformers `falcon_h1`: attention and Mamba-2 side by side in every layer, with muP factors everywhere."""

from __future__ import annotations

import math
from typing import Any

from ..family import Config, Family, Inexpressible, first
from ..fields import Fields, expansion
from ..rules import Rule, same, within
from ._parts import ATTENTION, GATED, MAMBA2
from ._rope import read_rope, write_rope
from .mamba2 import time_step_limit


def rules(config: Config) -> list[Rule]:
    table = [
        Rule("embedding.weight", "model.embed_tokens.weight"),
        Rule("norm_f.weight", "model.final_layernorm.weight"),
        *same("lm_head.weight"),
    ]
    for i in range(len(config["layers"])):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table += within(f"{ours}.mixer.branches.0", f"{theirs}.mamba", MAMBA2)
        table += within(f"{ours}.mixer.branches.1", f"{theirs}.self_attn", ATTENTION)
        table += within(f"{ours}.mlp", f"{theirs}.feed_forward", GATED)
        table += [
            Rule(f"{ours}.norm.weight", f"{theirs}.input_layernorm.weight"),
            Rule(f"{ours}.norm2.weight", f"{theirs}.pre_ff_layernorm.weight"),
        ]
    return table


def read(fields: Fields) -> Config:
    fields.only("hidden_act", "silu", default="silu")
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", max(1, width // heads))
    eps = fields.number("rms_norm_eps", 1e-5, above=0)
    bias = fields.flag("mamba_proj_bias", False)
    if fields.flag("projectors_bias", False) != bias:
        fields.fail("projectors_bias", f"the value of mamba_proj_bias, {bias} (biases on both sides or on none)")
    gate_scale, down_scale = _factors(fields, "mlp_multipliers", 2)
    key = fields.number("key_multiplier", 1.0)
    attention: dict[str, Any] = {
        "name": "attention",
        "n_heads": heads,
        "n_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        **read_rope(fields, head_dim),
        # A factor on the keys is one on the scores.
        "scale": None if key == 1 else key * head_dim**-0.5,
        "bias": fields.flag("attention_bias", False),
    }
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": width,
        "n_layer": fields.layers("num_hidden_layers"),
        "mixer": {
            "name": "parallel",
            "mixers": [{**_mamba2(fields, width), "bias": bias, "norm_eps": eps}, attention],
            "in_scales": [fields.number(f"{m}_in_multiplier", 1.0) for m in ("ssm", "attention")],
            "out_scales": [fields.number(f"{m}_out_multiplier", 1.0) for m in ("ssm", "attention")],
        },
        "mlp": {
            "name": "gated",
            "hidden": fields.integer("intermediate_size"),
            "bias": fields.flag("mlp_bias", False),
            "multiple_of": 1,
            "gate_scale": gate_scale,
            "out_scale": down_scale,
        },
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "residual_in_fp32": False,
        "norm_eps": eps,
        "embedding_scale": fields.number("embedding_multiplier", 1.0),
        "logit_scale": fields.number("lm_head_multiplier", 1.0),
    }


def _mamba2(fields: Fields, width: int) -> dict[str, Any]:
    inner = fields.integer("mamba_d_ssm", int(fields.number("mamba_expand", 2, above=0) * width))
    heads = fields.integer("mamba_n_heads", 128)
    if inner % heads:
        fields.fail("mamba_n_heads", f"a divisor of mamba_d_ssm = {inner}")
    fields.only("mamba_d_head", "auto", inner // heads, default="auto")
    scales = _factors(fields, "ssm_multipliers", 5)
    return {
        "name": "mamba2",
        "d_state": fields.integer("mamba_d_state", 256),
        "expand": expansion(inner, width),
        "head_dim": inner // heads,
        "n_groups": fields.integer("mamba_n_groups", 1),
        "d_conv": fields.integer("mamba_d_conv", 4),
        "dt_limit": fields.time_step_limit(),
        "conv_bias": fields.flag("mamba_conv_bias", True),
        "rmsnorm": fields.flag("mamba_rms_norm", False),
        "norm_before_gate": fields.flag("mamba_norm_before_gate", True),
        "scales": None if scales == [1] * 5 else scales,
    }


def _factors(fields: Fields, name: str, count: int) -> list[float]:
    values = fields.get(name, [1.0] * count)
    good = isinstance(values, (list, tuple)) and len(values) == count
    if not good or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        fields.fail(name, f"{count} finite numbers")
    return [float(v) for v in values]


def write(config: Config) -> Config:
    mixer, mlp = first(config, "mixer", "parallel"), first(config, "mlp", "gated")
    if [branch["name"] for branch in mixer["mixers"]] != ["mamba2", "attention"]:
        raise Inexpressible("mixer: want mamba2 and attention in parallel, in this order")
    mamba2, attention = mixer["mixers"]
    inner = int(mamba2["expand"] * config["d_model"])
    return {
        "model_type": "falcon_h1",
        "architectures": ["FalconH1ForCausalLM"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "num_hidden_layers": len(config["layers"]),
        "mamba_d_ssm": inner,
        "mamba_n_heads": inner // mamba2["head_dim"],
        "mamba_d_head": mamba2["head_dim"],
        "mamba_d_state": mamba2["d_state"],
        "mamba_n_groups": mamba2["n_groups"],
        "mamba_d_conv": mamba2["d_conv"],
        "mamba_conv_bias": mamba2["conv_bias"],
        "mamba_proj_bias": mamba2["bias"],
        "projectors_bias": mamba2["bias"],
        "mamba_rms_norm": mamba2["rmsnorm"],
        "mamba_norm_before_gate": mamba2["norm_before_gate"],
        "time_step_limit": time_step_limit(mamba2["dt_limit"]),
        "ssm_multipliers": list(mamba2["scales"] or [1.0] * 5),
        "ssm_in_multiplier": mixer["in_scales"][0],
        "ssm_out_multiplier": mixer["out_scales"][0],
        "num_attention_heads": attention["n_heads"],
        "num_key_value_heads": attention["n_kv_heads"],
        "head_dim": attention["head_dim"],
        "rope_parameters": write_rope(attention),
        "attention_bias": attention["bias"],
        "attention_in_multiplier": mixer["in_scales"][1],
        "attention_out_multiplier": mixer["out_scales"][1],
        "key_multiplier": _key_multiplier(attention),
        "intermediate_size": mlp["hidden"],
        "mlp_bias": mlp["bias"],
        "mlp_multipliers": [mlp["gate_scale"], mlp["out_scale"]],
        "hidden_act": "silu",
        "embedding_multiplier": config["embedding_scale"],
        "lm_head_multiplier": config["logit_scale"],
        "rms_norm_eps": config["norm_eps"],
        "tie_word_embeddings": config["tie_embeddings"],
    }


def _key_multiplier(attention: Config) -> float:
    """The number that gives exactly the scale again, if there is one."""
    if attention["scale"] is None:
        return 1.0
    root = attention["head_dim"] ** -0.5
    near = attention["scale"] / root
    tries = (near, math.nextafter(near, 0), math.nextafter(near, math.inf))
    return next((k for k in tries if k * root == attention["scale"]), near)


FAMILY = Family("falcon_h1", "transformers", read, write, rules)
