"""transformers `nemotron_h`: every layer is one of Mamba-2, attention, an MLP with squared ReLU, or experts."""

from __future__ import annotations

from typing import Any

from ..family import Config, Family, Inexpressible, first, has, shortest
from ..fields import MAX_LAYERS, Fields, expansion
from ..rules import Rule, Stacked, same, within
from ._parts import ATTENTION, MAMBA2, read_attention, write_attention

MLP = [
    Rule("fc1.weight", "up_proj.weight"),
    Rule("fc1.bias", "up_proj.bias"),
    Rule("fc2.weight", "down_proj.weight"),
    Rule("fc2.bias", "down_proj.bias"),
]
# Their words for a layer, those of older files, and the letters of `hybrid_override_pattern`.
KINDS = ("mamba2", "attention", "mlp", "sigmoid_moe")
WORDS = dict(zip(("linear_attention", "full_attention", "mlp", "moe"), KINDS))
OLD_WORDS = WORDS | {"mamba": "mamba2", "attention": "attention"}
LETTERS = dict(zip("M*-E", KINDS))
ACTIVATIONS = {"relu2": "relu_squared", "relu": "relu", "silu": "silu", "gelu": "gelu"}


def rules(config: Config) -> list[Rule]:
    table = [
        Rule("embedding.weight", "backbone.embeddings.weight"),
        Rule("norm_f.weight", "backbone.norm_f.weight"),
        *same("lm_head.weight"),
    ]
    for i, layer in enumerate(config["layers"]):
        ours, theirs = f"layers.{i}", f"backbone.layers.{i}"
        if layer["mixer"] is not None:
            table += [Rule(f"{ours}.norm.weight", f"{theirs}.norm.weight")]
            table += within(f"{ours}.mixer", f"{theirs}.mixer", _mixer(layer["mixer"]["name"]))
        if layer["mlp"] is not None:
            table += [Rule(f"{ours}.norm2.weight", f"{theirs}.norm.weight")]
            table += within(f"{ours}.mlp", f"{theirs}.mixer", _part(layer["mlp"]))
    return table


def _mixer(name: str) -> list[Rule]:
    return MAMBA2 if name == "mamba2" else ATTENTION


def _part(mlp: Config) -> list[Rule]:
    if mlp["name"] == "mlp":
        return MLP
    up, down = (tuple(f"experts.{e}.{n}_proj.weight" for e in range(mlp["n_experts"])) for n in ("up", "down"))
    around = [
        Rule(f"{ours}.{end}", f"{theirs}_latent_proj.{end}")
        for ours, theirs in (("down", "fc1"), ("up", "fc2"))
        for end in ("weight", "bias")
    ]
    return [
        Rule("router.weight", "gate.weight"),
        Rule("correction", "gate.e_score_correction_bias"),
        Rule("fc1", up, Stacked()),
        Rule("fc2", down, Stacked()),
        *around,
        *within("shared", "shared_experts", MLP),
    ]


def read(fields: Fields) -> Config:
    fields.only("mamba_hidden_act", "silu", default="silu")
    fields.only("sliding_window", None)
    fields.only("num_nextn_predict_layers", 0, default=0)
    kinds = _kinds(fields)
    parts = {"mlp": _mlp(fields)} | ({"sigmoid_moe": _experts(fields)} if "sigmoid_moe" in kinds else {})
    mixers = {"mamba2": _mamba2(fields), "attention": read_attention(fields, rope=False)}
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": fields.integer("hidden_size"),
        "n_layer": len(kinds),
        "mixer": shortest([mixers.get(kind) for kind in kinds] or [None]),
        "mlp": shortest([parts.get(kind) for kind in kinds] or [None]),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "residual_in_fp32": False,
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5, above=0),
    }


def _kinds(fields: Fields) -> list[str]:
    """What each layer is: from a list of words, or in older files from a row of letters."""
    name = "layer_types" if "layer_types" in fields else "layers_block_type"
    if name in fields:
        words = fields.get(name)
        if not isinstance(words, list) or len(words) > MAX_LAYERS or not all(word in OLD_WORDS for word in words):
            fields.fail(name, f"up to {MAX_LAYERS} of {', '.join(map(repr, OLD_WORDS))}")
        return [OLD_WORDS[word] for word in words]
    letters = fields.get("hybrid_override_pattern")
    if not isinstance(letters, str) or len(letters) > MAX_LAYERS or not set(letters) <= set(LETTERS):
        fields.fail("hybrid_override_pattern", f"up to {MAX_LAYERS} of the letters {''.join(LETTERS)}")
    return [LETTERS[letter] for letter in letters]


def _mamba2(fields: Fields) -> dict[str, Any]:
    heads, head_dim = fields.integer("mamba_num_heads", 128), fields.integer("mamba_head_dim", 64)
    low = fields.number("time_step_min", 0.001)
    return {
        "name": "mamba2",
        "d_state": fields.integer("ssm_state_size", 128),
        "expand": expansion(heads * head_dim, fields.integer("hidden_size")),
        "head_dim": head_dim,
        "n_groups": fields.integer("n_groups", 8),
        "d_conv": fields.integer("conv_kernel", 4),
        # transformers clamps at the smallest initial step, not at `time_step_limit`.
        "dt_limit": (low, None) if low > 0 else None,
        "bias": fields.flag("use_bias", False),
        "conv_bias": fields.flag("use_conv_bias", True),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5, above=0),
    }


def _mlp(fields: Fields) -> dict[str, Any]:
    return {
        "name": "mlp",
        "hidden": fields.integer("intermediate_size"),
        "activation": ACTIVATIONS[fields.only("mlp_hidden_act", *ACTIVATIONS, default="relu2")],
        "bias": fields.flag("mlp_bias", False),
    }


def _experts(fields: Fields) -> dict[str, Any]:
    count = fields.integer("n_routed_experts", 8, most=MAX_LAYERS)
    latent = fields.integer("moe_latent_size", 0, least=0)
    return {
        "name": "sigmoid_moe",
        "hidden": fields.integer("moe_intermediate_size", 7688),
        "n_experts": count,
        "top_k": fields.integer("num_experts_per_tok", 2, most=count),
        "groups": fields.integer("n_group", 1),
        "top_groups": fields.integer("topk_group", 1),
        "renormalise": fields.flag("norm_topk_prob", True),
        "scale": fields.number("routed_scaling_factor", 1.0),
        "latent": latent or None,
        "shared_hidden": fields.integer("moe_shared_expert_intermediate_size", 7688),
        "activation": ACTIVATIONS[fields.only("mlp_hidden_act", *ACTIVATIONS, default="relu2")],
        "bias": fields.flag("mlp_bias", False),
    }


def write(config: Config) -> Config:
    kinds = []
    for i, layer in enumerate(config["layers"]):
        names = [part["name"] for part in (layer["mixer"], layer["mlp"]) if part is not None]
        if len(names) != 1 or names[0] not in KINDS:
            raise Inexpressible(f"layers.{i}: want one of {', '.join(KINDS)}, got {' and '.join(names)}")
        kinds += names
    words = {kind: word for word, kind in WORDS.items()}
    own: Config = {}
    if has(config, "mixer", "attention"):
        own |= {**write_attention(config), "head_dim": first(config, "mixer", "attention")["head_dim"]}
    if has(config, "mixer", "mamba2"):
        own |= _write_mamba2(first(config, "mixer", "mamba2"), config["d_model"])
    if has(config, "mlp", "mlp"):
        own |= _write_mlp(first(config, "mlp", "mlp")) | {"intermediate_size": first(config, "mlp", "mlp")["hidden"]}
    if has(config, "mlp", "sigmoid_moe"):
        own |= _write_experts(first(config, "mlp", "sigmoid_moe"))
    return {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "num_hidden_layers": len(kinds),
        "layers_block_type": [words[kind] for kind in kinds],
        "intermediate_size": 1,
        **own,
        "layer_norm_epsilon": config["norm_eps"],
        "tie_word_embeddings": config["tie_embeddings"],
    }


def _write_mamba2(mixer: Config, d_model: int) -> Config:
    if mixer["dt_limit"] is None:
        raise Inexpressible("dt_limit: transformers clamps the step size at time_step_min, which is above 0")
    return {
        "ssm_state_size": mixer["d_state"],
        "mamba_num_heads": int(mixer["expand"] * d_model) // mixer["head_dim"],
        "mamba_head_dim": mixer["head_dim"],
        "n_groups": mixer["n_groups"],
        "conv_kernel": mixer["d_conv"],
        "time_step_min": mixer["dt_limit"][0],
        "use_bias": mixer["bias"],
        "use_conv_bias": mixer["conv_bias"],
    }


def _write_mlp(part: Config) -> Config:
    words = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {"mlp_hidden_act": words.get(part["activation"]), "mlp_bias": part["bias"]}


def _write_experts(part: Config) -> Config:
    return _write_mlp(part) | {
        "n_routed_experts": part["n_experts"],
        "num_experts_per_tok": part["top_k"],
        "n_group": part["groups"],
        "topk_group": part["top_groups"],
        "norm_topk_prob": part["renormalise"],
        "routed_scaling_factor": part["scale"],
        "moe_intermediate_size": part["hidden"],
        "moe_latent_size": part["latent"],
        "moe_shared_expert_intermediate_size": part["shared_hidden"],
    }


FAMILY = Family("nemotron_h", "transformers", read, write, rules, head=("lm_head.weight", "backbone.embeddings.weight"))
