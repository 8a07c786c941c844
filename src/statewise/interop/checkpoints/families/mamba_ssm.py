"""Checkpoints of the `mamba_ssm` package: Mamba, Mamba-2, and hybrids with attention and gated MLPs."""

from __future__ import annotations

from ...._names import unknown
from ..family import Config, Family, Inexpressible, first, has, shortest
from ..fields import Fields, expansion
from ..rules import Divided, Insert, Reshaped, Rule, same, within
from ._parts import MAMBA, MAMBA2, mixers_of, time_step_limit

# Its `MHA` has queries, keys and values in one projection.
ATTENTION = [
    Rule(("q_proj.weight", "k_proj.weight", "v_proj.weight"), "in_proj.weight", Divided()),
    Rule(("q_proj.bias", "k_proj.bias", "v_proj.bias"), "in_proj.bias", Divided()),
    Rule("conv1d.weight", "conv1d.weight", Insert(1)),
    *same("conv1d.bias", "out_proj.weight", "out_proj.bias"),
]
EPS = 1e-5  # of all its norms; no field says it
# What only says how a model begins or which kernel runs it.
_SSM = ("layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "conv_init", "A_init_range")
_RUN = ("use_fast_path", "use_mem_eff_path", "chunk_size", "sequence_parallel", "process_group", "layer_idx")


def rules(config: Config) -> list[Rule]:
    table = [
        Rule("embedding.weight", "backbone.embedding.weight"),
        Rule("norm_f.weight", "backbone.norm_f.weight"),
        *same("lm_head.weight"),
    ]
    for i, (mixer, layer) in enumerate(zip(mixers_of(config), config["layers"])):
        parts = {"attention": ATTENTION, "mamba": MAMBA, "mamba2": MAMBA2}[mixer]
        if layer["mixer"].get("skip_per_channel"):
            parts = [rule for rule in parts if rule.ours != "D"] + [Rule("D", "D", Reshaped((-1,)))]
        table += within(f"layers.{i}", f"backbone.layers.{i}", same("norm.weight", "norm2.weight"))
        table += within(f"layers.{i}.mixer", f"backbone.layers.{i}.mixer", parts)
        table += within(f"layers.{i}.mlp", f"backbone.layers.{i}.mlp", same("fc1.weight", "fc2.weight"))
    return table


def read(fields: Fields) -> Config:
    fields.only("rms_norm", True, default=True)
    n_layer = fields.layers("n_layer")
    ssm = fields.below("ssm_cfg")
    layer = ssm.only("layer", "Mamba1", "Mamba2", default="Mamba1")
    width = fields.integer("d_model")
    mixer = (_read_mamba if layer == "Mamba1" else _read_mamba2)(ssm, width)
    where = set(fields.integers("attn_layer_idx", [], most=n_layer - 1))
    attention = _read_attention(fields.below("attn_cfg"), width) if where else None
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": width,
        "n_layer": n_layer,
        "mixer": shortest([attention if i in where else mixer for i in range(n_layer)] or [mixer]),
        "d_intermediate": fields.integer("d_intermediate", 0, least=0),
        "tie_embeddings": fields.flag("tie_embeddings", True),
        "residual_in_fp32": fields.flag("residual_in_fp32", True),
        "pad_vocab_to": fields.integer("pad_vocab_size_multiple", 8),
        "norm_eps": EPS,
    }


def _known(fields: Fields, *names: str) -> None:
    for name in fields:
        if name not in names:
            raise ValueError(f"{fields.source}: {unknown('field', name, names)}")


def _read_mamba(ssm: Fields, width: int) -> Config:
    _known(ssm, "d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias", *_SSM, *_RUN)
    rank = ssm.get("dt_rank", "auto")
    return {
        "name": "mamba",
        "d_state": ssm.integer("d_state", 16),
        "expand": expansion(int(ssm.number("expand", 2, above=0) * width), width),
        "d_conv": ssm.integer("d_conv", 4),
        "dt_rank": None if rank == "auto" else ssm.integer("dt_rank"),
        "bias": ssm.flag("bias", False),
        "conv_bias": ssm.flag("conv_bias", True),
    }


def _read_mamba2(ssm: Fields, width: int) -> Config:
    own = ("d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups", "D_has_hdim", "rmsnorm", "norm_before_gate")
    _known(ssm, *own, "dt_limit", "bias", "conv_bias", *_SSM, *_RUN)
    inner = int(ssm.number("expand", 2, above=0) * width)
    ssm.only("d_ssm", None, inner)
    return {
        "name": "mamba2",
        "d_state": ssm.integer("d_state", 128),
        "expand": expansion(inner, width),
        "head_dim": ssm.integer("headdim", 64),
        "n_groups": ssm.integer("ngroups", 1),
        "d_conv": ssm.integer("d_conv", 4),
        "dt_limit": ssm.time_step_limit("dt_limit"),
        "skip_per_channel": ssm.flag("D_has_hdim", False),
        "rmsnorm": ssm.flag("rmsnorm", True),
        "norm_before_gate": ssm.flag("norm_before_gate", False),
        "norm_eps": EPS,
        "bias": ssm.flag("bias", False),
        "conv_bias": ssm.flag("conv_bias", True),
    }


def _read_attention(attn: Fields, width: int) -> Config:
    own = ("num_heads", "num_heads_kv", "head_dim", "mlp_dim", "qkv_proj_bias", "out_proj_bias", "softmax_scale")
    _known(attn, *own, "causal", "d_conv", "rotary_emb_dim", "rotary_emb_base", "rotary_emb_interleaved", *_RUN)
    attn.only("causal", True, default=False)
    attn.only("mlp_dim", 0, default=0)
    attn.only("rotary_emb_interleaved", False, default=False)
    heads = attn.integer("num_heads")
    turned = attn.integer("rotary_emb_dim", 0, least=0)
    rope = {"rope_dim": turned, "rope_theta": attn.number("rotary_emb_base", 10000.0, above=0)} if turned else {}
    return {
        "name": "attention",
        "n_heads": heads,
        "n_kv_heads": attn.integer("num_heads_kv", heads),
        "head_dim": attn.integer("head_dim", width // heads),
        "rope": turned > 0,
        **rope,
        "scale": attn.number("softmax_scale", above=0) if "softmax_scale" in attn else None,
        "bias": attn.flag("qkv_proj_bias", True),
        "out_bias": attn.flag("out_proj_bias", True),
        "d_conv": attn.integer("d_conv", 0, least=0),
    }


def write(config: Config) -> Config:
    names = mixers_of(config)
    tokens, multiple = _vocabulary(config["tokens"], config["vocab_size"])
    hidden = {0 if layer["mlp"] is None else layer["mlp"].get("hidden", -1) for layer in config["layers"]}
    if len(hidden) > 1:
        raise Inexpressible("feed-forward parts differ from layer to layer")
    return {
        "d_model": config["d_model"],
        "d_intermediate": max(hidden, default=0),
        "n_layer": len(names),
        "vocab_size": tokens,
        "ssm_cfg": _write_mamba2(config) if has(config, "mixer", "mamba2") else _write_mamba(config),
        "attn_layer_idx": [i for i, name in enumerate(names) if name == "attention"],
        "attn_cfg": _write_attention(config) if "attention" in names else {},
        "rms_norm": True,
        "residual_in_fp32": config["residual_in_fp32"],
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": config["tie_embeddings"],
    }


def _vocabulary(tokens: int, rows: int) -> tuple[int, int]:
    """A number of tokens and a multiple that it is rounded up to, which give this many rows."""
    for multiple in (1, 8, 16, 32, 64, 128):
        if -(-tokens // multiple) * multiple == rows:
            return tokens, multiple
    return rows, 1


def _write_mamba(config: Config) -> Config:
    if not has(config, "mixer", "mamba"):
        return {}
    mixer = first(config, "mixer", "mamba")
    return {"layer": "Mamba1"} | {n: mixer[n] for n in ("d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias")}


def _write_mamba2(config: Config) -> Config:
    mixer = first(config, "mixer", "mamba2")
    same_names = ("d_state", "d_conv", "expand", "rmsnorm", "norm_before_gate", "bias", "conv_bias")
    limit = time_step_limit(mixer["dt_limit"])
    return {
        "layer": "Mamba2",
        **{name: mixer[name] for name in same_names},
        "headdim": mixer["head_dim"],
        "ngroups": mixer["n_groups"],
        "D_has_hdim": mixer["skip_per_channel"],
        **({"dt_limit": limit["time_step_limit"]} if limit else {}),
    }


def _write_attention(config: Config) -> Config:
    mixer = first(config, "mixer", "attention")
    return {
        "causal": True,
        "num_heads": mixer["n_heads"],
        "num_heads_kv": mixer["n_kv_heads"],
        "head_dim": mixer["head_dim"],
        "rotary_emb_dim": mixer["rope_dim"] if mixer["rope"] else 0,
        "rotary_emb_base": mixer["rope_theta"],
        "softmax_scale": mixer["scale"],
        "qkv_proj_bias": mixer["bias"],
        "out_proj_bias": mixer["bias"] if mixer["out_bias"] is None else mixer["out_bias"],
        "d_conv": mixer["d_conv"],
    }


FAMILY = Family(
    "mamba_ssm",
    "mamba_ssm",
    read,
    write,
    rules,
    head=("lm_head.weight", "backbone.embedding.weight"),
    keeps_tied_head=True,
    ignored=("rotary_emb.inv_freq",),
)
