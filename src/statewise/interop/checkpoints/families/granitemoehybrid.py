"""transformers `granitemoehybrid` (Granite 4): Mamba-2 and attention, experts beside a shared MLP, four multipliers."""

from __future__ import annotations

from typing import Any

from ..family import Config, Family, first, has, shortest
from ..fields import MAX_LAYERS, Fields
from ..rules import Rule, Swapped, same, within
from ._parts import (
    GATED_IN_ONE,
    MAMBA2,
    mixers_of,
    of_two,
    read_attention,
    read_mamba2,
    write_attention,
    write_common,
    write_mamba2,
)

MODEL = [
    Rule("embedding.weight", "model.embed_tokens.weight"),
    Rule("norm_f.weight", "model.norm.weight"),
    *same("lm_head.weight"),
]
NORMS = [Rule("norm.weight", "input_layernorm.weight"), Rule("norm2.weight", "post_attention_layernorm.weight")]
EXPERTS = [
    Rule("router.weight", "router.layer.weight"),
    Rule("fc1", "input_linear.weight", Swapped(1)),
    Rule("fc2", "output_linear.weight"),
]
# Of a layer's mixer: transformers had other words for it before version 5.
KINDS = {"linear_attention": "mamba2", "mamba": "mamba2", "full_attention": "attention", "attention": "attention"}


def rules(config: Config) -> list[Rule]:
    table = list(MODEL)
    for i, mixer in enumerate(mixers_of(config)):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table += within(ours, theirs, NORMS)
        if config["layers"][i]["mlp"]["name"] == "moe":
            table += within(f"{ours}.mlp", f"{theirs}.block_sparse_moe", EXPERTS)
            table += within(f"{ours}.mlp.shared", f"{theirs}.shared_mlp", GATED_IN_ONE)
        else:
            table += within(f"{ours}.mlp", f"{theirs}.shared_mlp", GATED_IN_ONE)
        table += of_two(ours, theirs, mixer, MAMBA2)
    return table


def read(fields: Fields) -> Config:
    fields.only("hidden_act", "silu", default="silu")
    n_layer, eps = fields.layers("num_hidden_layers"), fields.number("rms_norm_eps", 1e-6, above=0)
    attention = read_attention(
        fields,
        rope=fields.get("position_embedding_type", "none") == "rope",
        bias=fields.flag("attention_bias", False),
        scale=fields.number("attention_multiplier", 1.0, above=0),
    )
    if attention["rope"]:
        attention["rope_theta"], fraction = fields.rope()
        if fraction != 1:
            fields.below("rope_parameters").fail("partial_rotary_factor", "1")
    mixers = {"attention": attention, "mamba2": read_mamba2(fields) | {"norm_eps": eps}}
    name = "layer_types" if "layer_types" in fields else "layers_block_type"
    kinds = fields.choices(name, list(KINDS), n_layer, ["linear_attention"] * n_layer)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": fields.integer("hidden_size"),
        "n_layer": n_layer,
        "mixer": shortest([mixers[KINDS[kind]] for kind in kinds] or [attention]),
        "mlp": _read_mlp(fields),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "residual_in_fp32": False,
        "norm_eps": eps,
        "embedding_scale": fields.number("embedding_multiplier", 1.0, above=0),
        "residual_scale": fields.number("residual_multiplier", 1.0, above=0),
        "logit_scale": 1 / fields.number("logits_scaling", 1.0, above=0),
    }


def _read_mlp(fields: Fields) -> dict[str, Any]:
    shared = fields.integer("shared_intermediate_size", 1024)
    experts = fields.integer("num_local_experts", 8, least=0, most=MAX_LAYERS)
    if experts == 0:
        return {"name": "gated", "hidden": shared, "multiple_of": 1}
    return {
        "name": "moe",
        "hidden": fields.integer("intermediate_size"),
        "n_experts": experts,
        "top_k": fields.integer("num_experts_per_tok", 2, most=experts),
        "shared_hidden": shared,
    }


def write(config: Config) -> Config:
    attention = first(config, "mixer", "attention") if has(config, "mixer", "attention") else None
    kinds = {"attention": "full_attention"}
    if has(config, "mlp", "moe"):
        mlp = first(config, "mlp", "moe")
        sizes = {
            "num_local_experts": mlp["n_experts"],
            "num_experts_per_tok": mlp["top_k"],
            "intermediate_size": mlp["hidden"],
            "shared_intermediate_size": mlp["shared_hidden"],
        }
    else:
        hidden = first(config, "mlp", "gated")["hidden"]
        sizes = {"num_local_experts": 0, "intermediate_size": hidden, "shared_intermediate_size": hidden}
    rope: Config = {}
    if attention and attention["rope"]:
        rope = {
            "position_embedding_type": "rope",
            "rope_parameters": {"rope_type": "default", "rope_theta": attention["rope_theta"]},
        }
    return {
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        **write_common(config),
        **write_attention(config),
        **write_mamba2(config),
        **sizes,
        **rope,
        "layer_types": [kinds.get(name, "linear_attention") for name in mixers_of(config)],
        "attention_bias": bool(attention and attention["bias"]),
        "attention_multiplier": _scale(attention) if attention else 1.0,
        "embedding_multiplier": config["embedding_scale"],
        "residual_multiplier": config["residual_scale"],
        "logits_scaling": inverse(config["logit_scale"]),
    }


def _scale(attention: Config) -> float:
    return attention["head_dim"] ** -0.5 if attention["scale"] is None else attention["scale"]


def inverse(x: float) -> float:
    """The number of fewest digits whose inverse is exactly x."""
    short = (float(f"{1 / x:.{digits}g}") for digits in range(1, 18))
    return next((s for s in short if 1 / s == x), 1 / x)


FAMILY = Family("granitemoehybrid", "transformers", read, write, rules, ignored=("rotary_emb.inv_freq",))
