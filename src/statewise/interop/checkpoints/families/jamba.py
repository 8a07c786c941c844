"""transformers `jamba`: Mamba with normed coefficients, attention and experts at regular layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..family import Config, Family, Inexpressible, first, has, shortest
from ..fields import MAX_LAYERS, Fields, expansion
from ..rules import Joined, Rule, Stacked, same, within
from ._parts import (
    GATED,
    MAMBA,
    MAMBA_NORMS,
    mixers_of,
    of_two,
    read_attention,
    write_attention,
    write_common,
)
from .bamba import MODEL, NORMS


def rules(config: Config) -> list[Rule]:
    table = list(MODEL)
    for i, (mixer, layer) in enumerate(zip(mixers_of(config), config["layers"])):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table += within(ours, theirs, NORMS)
        table += of_two(ours, theirs, mixer, [*MAMBA, *MAMBA_NORMS])
        mlp = layer["mlp"]
        table += within(
            f"{ours}.mlp", f"{theirs}.feed_forward", _experts(mlp["n_experts"]) if mlp["name"] == "moe" else GATED
        )
    return table


def _experts(count: int) -> list[Rule]:
    both = tuple(f"experts.{e}.{name}_proj.weight" for e in range(count) for name in ("up", "gate"))
    down = tuple(f"experts.{e}.down_proj.weight" for e in range(count))
    return [*same("router.weight"), Rule("fc1", both, Stacked(Joined())), Rule("fc2", down, Stacked())]


def read(fields: Fields) -> Config:
    fields.only("hidden_act", "silu", default="silu")
    width, n_layer = fields.integer("hidden_size"), fields.layers("num_hidden_layers")
    eps, hidden = fields.number("rms_norm_eps", 1e-6, above=0), fields.integer("intermediate_size")
    experts = fields.integer("num_experts", 16, most=MAX_LAYERS)
    rank = fields.get("mamba_dt_rank", "auto")
    mamba: dict[str, Any] = {
        "name": "mamba",
        "d_state": fields.integer("mamba_d_state", 16),
        "expand": expansion(int(fields.number("mamba_expand", 2, above=0) * width), width),
        "d_conv": fields.integer("mamba_d_conv", 4),
        "dt_rank": None if rank == "auto" else fields.integer("mamba_dt_rank"),
        "bias": fields.flag("mamba_proj_bias", False),
        "conv_bias": fields.flag("mamba_conv_bias", True),
        "coefficient_norm": "rms",
        "norm_eps": eps,
    }
    attention = read_attention(fields, rope=False)
    dense = {"name": "gated", "hidden": hidden, "multiple_of": 1}
    moe = {
        "name": "moe",
        "hidden": hidden,
        "n_experts": experts,
        "top_k": fields.integer("num_experts_per_tok", 2, most=max(experts, 2)),
        "renormalise": False,
    }
    attends = _regular(fields, "attn", 8, 4, n_layer)
    routes = _regular(fields, "expert", 2, 1, n_layer)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": width,
        "n_layer": n_layer,
        "mixer": shortest([attention if here else mamba for here in attends] or [mamba]),
        "mlp": shortest([moe if here and experts > 1 else dense for here in routes] or [dense]),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "residual_in_fp32": False,
        "norm_eps": eps,
    }


def _regular(fields: Fields, what: str, period: int, offset: int, n_layer: int) -> list[bool]:
    period = fields.integer(f"{what}_layer_period", period)
    offset = fields.integer(f"{what}_layer_offset", offset, least=0, most=period - 1)
    return [i % period == offset for i in range(n_layer)]


def write(config: Config) -> Config:
    mamba = first(config, "mixer", "mamba")
    experts = first(config, "mlp", "moe") if has(config, "mlp", "moe") else None
    attends = _period("attention", [name == "attention" for name in mixers_of(config)])
    routes = _period("experts", [(layer["mlp"] or {}).get("name") == "moe" for layer in config["layers"]])
    return {
        "model_type": "jamba",
        "architectures": ["JambaForCausalLM"],
        **write_common(config),
        **write_attention(config),
        "intermediate_size": (experts or first(config, "mlp", "gated"))["hidden"],
        "num_experts": experts["n_experts"] if experts else 1,
        "num_experts_per_tok": experts["top_k"] if experts else 1,
        "attn_layer_period": attends[0],
        "attn_layer_offset": attends[1],
        "expert_layer_period": routes[0],
        "expert_layer_offset": routes[1],
        "mamba_d_state": mamba["d_state"],
        "mamba_expand": mamba["expand"],
        "mamba_d_conv": mamba["d_conv"],
        "mamba_dt_rank": mamba["dt_rank"],
        "mamba_proj_bias": mamba["bias"],
        "mamba_conv_bias": mamba["conv_bias"],
    }


def _period(what: str, here: Sequence[bool]) -> tuple[int, int]:
    """(period, offset) with i % period == offset exactly where something is; beyond the last layer if nowhere."""
    n = len(here)
    for period in range(1, n + 2):
        offset = next((i for i, found in enumerate(here) if found), n)
        if offset < period and list(here) == [i % period == offset for i in range(n)]:
            return period, offset
    raise Inexpressible(f"layers with {what} are not at regular distances")


FAMILY = Family("jamba", "transformers", read, write, rules)
