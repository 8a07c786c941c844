"""transformers `zamba2`: Mamba-2 with shared blocks of attention and MLP."""

from __future__ import annotations

from ..family import Config, Family, Inexpressible
from ..fields import Fields, expansion
from ..rules import Form, Rule, Same, Swapped, same, within
from ._parts import MAMBA2

BLOCK = [
    Rule("norm.weight", "input_layernorm.weight"),
    Rule("norm2.weight", "pre_ff_layernorm.weight"),
    *(Rule(f"{c}_proj.shared.weight", f"self_attn.{c}_proj.weight") for c in "qkv"),
    Rule("out_proj.weight", "self_attn.o_proj.weight"),
    Rule("fc1.shared.weight", "feed_forward.gate_up_proj.weight", Swapped()),
    Rule("fc1.shared.bias", "feed_forward.gate_up_proj.bias", Swapped()),
    Rule("fc2.weight", "feed_forward.down_proj.weight"),
    Rule("fc2.bias", "feed_forward.down_proj.bias"),
]
# What one use adds: where ours stand, where theirs, and how the upper of the two maps is laid out.
ADDITIONS: list[tuple[str, str, Form]] = [
    *((f"{c}_proj.own", f"self_attn.linear_{c}_adapter_list", Same()) for c in "qkv"),
    ("fc1.own", "feed_forward.gate_up_proj_adapter_list", Swapped()),
]


def rules(config: Config) -> list[Rule]:
    table = [
        Rule("embedding.weight", "model.embed_tokens.weight"),
        Rule("norm_f.weight", "model.final_layernorm.weight"),
        *same("lm_head.weight"),
    ]
    places, blocks = config["shared_at"], config["n_shared"]
    for i in range(config["n_layer"]):
        # A layer that listens to a shared block has the rest of itself one level further down.
        theirs = f"model.layers.{i}.mamba_decoder" if i in places else f"model.layers.{i}"
        table += within(f"layers.{i}.mixer", f"{theirs}.mamba", MAMBA2)
        table += [
            Rule(f"layers.{i}.norm.weight", f"{theirs}.input_layernorm.weight"),
            Rule(f"layers.{i}.from_shared.weight", f"model.layers.{i}.linear.weight"),
        ]
    for block in range(blocks):
        # Kept where the block is first used; additions are numbered over the uses of all blocks.
        home = f"model.layers.{places[block]}.shared_transformer"
        table += within(f"shared.{block}", home, BLOCK)
        for own, use in enumerate(range(block, len(places), blocks)):
            for ours, theirs, form in ADDITIONS:
                pair = [Rule("down.weight", "0.weight"), Rule("up.weight", "1.weight", form)]
                table += within(f"shared.{block}.{ours}.{own}", f"{home}.{theirs}.{use}", pair)
    return table


def read(fields: Fields) -> Config:
    fields.only("hidden_act", "gelu", default="gelu")
    fields.only("use_conv_bias", True, default=True)
    fields.only("use_long_context", False, default=False)
    width, layers = fields.integer("hidden_size"), fields.layers("num_hidden_layers")
    heads = fields.integer("n_mamba_heads", 8)
    inner = int(fields.number("mamba_expand", 2, above=0) * width)
    if inner % heads:
        fields.fail("n_mamba_heads", f"a divisor of mamba_expand * hidden_size = {inner}")
    kinds = fields.choices("layers_block_type", ("mamba", "linear_attention", "hybrid"), layers)
    attention_heads = fields.integer("num_attention_heads", 32)
    rank = fields.integer("adapter_rank", 128)
    theta, part = fields.rope()
    if part != 1:
        fields.fail("rope_parameters", "a partial_rotary_factor of 1, if there is one")
    low = fields.number("time_step_min", 0.001)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": width,
        "n_layer": layers,
        "shared_at": [i for i, kind in enumerate(kinds) if kind == "hybrid"],
        "n_shared": fields.integer("num_mem_blocks", 1),
        "mixer": {
            "name": "mamba2",
            "d_state": fields.integer("mamba_d_state", 64),
            "expand": expansion(inner, width),
            "head_dim": inner // heads,
            "n_groups": fields.integer("mamba_ngroups", 1),
            "d_conv": fields.integer("mamba_d_conv", 4),
            "chunk_size": None,
            "bias": fields.flag("add_bias_linear", False),
            # The smallest initial step is also the smallest step that is ever taken.
            "dt_limit": (low, None) if low > 0 else None,
        },
        "n_heads": attention_heads,
        "n_kv_heads": fields.integer("num_key_value_heads", attention_heads),
        "d_intermediate": fields.integer("intermediate_size", 4 * width),
        "rank": rank,
        "attention_rank": rank if fields.flag("use_shared_attention_adapter", False) else 0,
        "rope": fields.flag("use_mem_rope", False),
        "rope_theta": theta,
        "mlp_bias": fields.flag("add_bias_linear", False),
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
        "norm_eps": fields.number("rms_norm_eps", 1e-5, above=0),
    }


def write(config: Config) -> Config:
    mixer, places = config["mixer"], config["shared_at"]
    inner = int(mixer["expand"] * config["d_model"])
    if mixer["name"] != "mamba2" or mixer["dt_limit"] is None or mixer["expand"] != int(mixer["expand"]):
        raise Inexpressible("mixer: want mamba2 with a dt_limit and a whole number for expand")
    if not config["rank"] or config["attention_rank"] not in (0, config["rank"]):
        raise Inexpressible("rank: want at least 1, and attention_rank 0 or the same")
    if not config["tie_embeddings"] and len(places) > config["n_shared"]:
        raise Inexpressible("tie_embeddings: transformers shares blocks only where it ties the embeddings too")
    return {
        "model_type": "zamba2",
        "architectures": ["Zamba2ForCausalLM"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "layers_block_type": ["hybrid" if i in places else "linear_attention" for i in range(config["n_layer"])],
        "num_mem_blocks": config["n_shared"],
        "mamba_d_state": mixer["d_state"],
        "mamba_d_conv": mixer["d_conv"],
        "mamba_expand": int(mixer["expand"]),
        "mamba_ngroups": mixer["n_groups"],
        "n_mamba_heads": inner // mixer["head_dim"],
        "time_step_min": mixer["dt_limit"][0],
        "use_conv_bias": mixer["conv_bias"],
        "add_bias_linear": mixer["bias"],
        "intermediate_size": config["d_intermediate"],
        "hidden_act": "gelu",
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"],
        "use_shared_attention_adapter": config["attention_rank"] > 0,
        "adapter_rank": config["rank"],
        "use_mem_rope": config["rope"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "rms_norm_eps": config["norm_eps"],
        "tie_word_embeddings": config["tie_embeddings"],
    }


FAMILY = Family("zamba2", "transformers", read, write, rules, architecture="zamba2")
