"""transformers `falcon_h1`: attention and Mamba-2 side by side in every layer, with muP factors everywhere."""

from __future__ import annotations

import math

from ..family import Config, Family, Inexpressible, first
from ..fields import Fields
from ..rules import Rule, within
from ._parts import (
    ATTENTION,
    GATED,
    MAMBA2,
    mamba2_fields,
    read_attention,
    read_mamba2,
    rope_parameters,
    write_common,
)
from .bamba import MODEL, NORMS


def rules(config: Config) -> list[Rule]:
    table = list(MODEL)
    for i in range(len(config["layers"])):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table += within(ours, theirs, NORMS)
        table += within(f"{ours}.mixer.branches.0", f"{theirs}.mamba", MAMBA2)
        table += within(f"{ours}.mixer.branches.1", f"{theirs}.self_attn", ATTENTION)
        table += within(f"{ours}.mlp", f"{theirs}.feed_forward", GATED)
    return table


def read(fields: Fields) -> Config:
    fields.only("hidden_act", "silu", default="silu")
    eps, bias = fields.number("rms_norm_eps", 1e-5, above=0), fields.flag("mamba_proj_bias", False)
    if fields.flag("projectors_bias", False) != bias:
        fields.fail("projectors_bias", f"the value of mamba_proj_bias, {bias} (a bias on both sides or on none)")
    scales = _factors(fields, "ssm_multipliers", 5)
    mamba2 = {
        **read_mamba2(fields),
        "norm_eps": eps,
        "rmsnorm": fields.flag("mamba_rms_norm", False),
        "norm_before_gate": fields.flag("mamba_norm_before_gate", True),
        "scales": None if scales == [1] * 5 else scales,
    }
    theta, part = fields.rope()
    attention = read_attention(fields, rope_theta=theta, bias=fields.flag("attention_bias", False))
    attention["rope_dim"] = int(attention["head_dim"] * part)
    key = fields.number("key_multiplier", 1.0)
    # A factor on the keys is one on the scores.
    attention["scale"] = None if key == 1 else key * attention["head_dim"] ** -0.5
    gate_scale, down_scale = _factors(fields, "mlp_multipliers", 2)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": fields.integer("hidden_size"),
        "n_layer": fields.layers("num_hidden_layers"),
        "mixer": {
            "name": "parallel",
            "mixers": [mamba2, attention],
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
    return {
        "model_type": "falcon_h1",
        "architectures": ["FalconH1ForCausalLM"],
        **write_common(config),
        **mamba2_fields(mamba2, config["d_model"]),
        "mamba_d_ssm": int(mamba2["expand"] * config["d_model"]),
        "projectors_bias": mamba2["bias"],
        "mamba_rms_norm": mamba2["rmsnorm"],
        "mamba_norm_before_gate": mamba2["norm_before_gate"],
        "ssm_multipliers": list(mamba2["scales"] or [1.0] * 5),
        "ssm_in_multiplier": mixer["in_scales"][0],
        "ssm_out_multiplier": mixer["out_scales"][0],
        "num_attention_heads": attention["n_heads"],
        "num_key_value_heads": attention["n_kv_heads"],
        "head_dim": attention["head_dim"],
        "rope_parameters": rope_parameters(attention),
        "attention_bias": attention["bias"],
        "attention_in_multiplier": mixer["in_scales"][1],
        "attention_out_multiplier": mixer["out_scales"][1],
        "key_multiplier": _key_multiplier(attention),
        "intermediate_size": mlp["hidden"],
        "mlp_bias": mlp["bias"],
        "mlp_multipliers": [mlp["gate_scale"], mlp["out_scale"]],
        "embedding_multiplier": config["embedding_scale"],
        "lm_head_multiplier": config["logit_scale"],
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
