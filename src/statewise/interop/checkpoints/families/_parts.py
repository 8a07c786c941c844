"""Tables that several families share: our names below a mixer or a feed-forward part, and theirs."""

from __future__ import annotations

from ..rules import Insert, Joined, Rule, Swapped, same

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
