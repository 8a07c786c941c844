"""Every law of every mixer and block, by type, for a few sets of options each."""

from __future__ import annotations

from functools import partial

import pytest

from statewise import mixers
from statewise.blocks import GatedMLP, MoE, ResidualBlock
from statewise.testing import module_laws

D = 8

# Each registered mixer has at least one entry (a test below sees to it).
OPTIONS: dict[str, list[dict]] = {
    "attention": [
        {"n_heads": 2},
        {"n_heads": 4, "n_kv_heads": 2, "window": 4},
        {"rope": False, "bias": True},
        {"n_heads": 2, "rope_dim": 2, "scale": 0.7, "out_bias": True},
        {"n_heads": 2, "n_kv_heads": 1, "d_conv": 3},
    ],
    "bidirectional_attention": [{"n_heads": 2}, {"n_heads": 4, "rope": False, "bias": False, "block": 3}],
    "lstm": [{}],
    "linear_attention": [
        {"n_heads": 2},
        {"n_heads": 2, "key_dim": 3, "head_dim": 5, "feature_map": "taylor", "d_conv": 3},
    ],
    "normalized_attention": [{}, {"n_heads": 2, "key_dim": 3, "bias": False, "d_conv": 2}],
    "qlstm": [{}, {"expand": 1.5, "d_conv": 1, "reverse_gate": False}],
    "mamba": [
        {"d_state": 4},
        {"d_state": 4, "coefficient_norm": "rms"},
        {"d_state": 4, "coefficient_norm": "unit"},
        {"d_state": 3, "d_conv": 1, "expand": 1, "bias": True, "conv_bias": False},
    ],
    "mamba2": [
        {"d_state": 4, "head_dim": 4},
        {"d_state": 3, "head_dim": 4, "n_groups": 2, "chunk_size": 5, "dt_limit": (0.001, 0.1)},
        {
            "d_state": 3,
            "head_dim": 3,
            "expand": 1.5,
            "n_groups": 2,
            "norm_before_gate": True,
            "bias": True,
            "dt_limit": (0.01, None),
            "scales": [0.5, 2.0, 0.7, 1.3, 0.9],
        },
    ],
    "dss": [
        {"d_state": 3, "l_norm": 16},
        {"d_state": 4, "kernel": "exp", "init": "lin", "dt_tie": False, "glu": False},
    ],
    "dlr": [{"d_state": 3}, {"d_state": 4, "init": "rand", "activation": "none", "glu": False}],
    "gss": [{"d_state": 4}, {"d_state": 3, "d_ssm": 5, "expand": 1}],
    "liquid_s4": [{"d_state": 4}, {"d_state": 4, "kernel": "kb", "degree": 3, "init": "lin", "n_ssm": 2}],
    "lru": [{"d_state": 5}, {"d_state": 4, "r_min": 0.5, "r_max": 0.99, "max_phase": 0.3, "activation": "none"}],
    "rglru": [{}, {"d_rnn": 12, "n_blocks": 3, "d_conv": 1, "a_range": (0.5, 0.9)}],
    "s4": [{"d_state": 4}, {"d_state": 4, "init": "legt", "n_ssm": 2, "dt_transform": "softplus", "dt_max": 1.0}],
    "bidirectional_s4": [
        {"d_state": 4},
        {"d_state": 4, "init": "fout", "n_ssm": 1, "activation": "none", "glu": False},
    ],
    "bidirectional_s4d": [{"d_state": 4}, {"d_state": 4, "init": "lin", "n_ssm": 2, "train_b": True}],
    "s4d": [{"d_state": 4}, {"d_state": 4, "init": "lin", "discretization": "bilinear", "n_ssm": 2, "train_b": True}],
    "s4ptd": [{"d_state": 4}, {"d_state": 8, "gamma": 100.0, "discretization": "bilinear", "n_ssm": 1}],
    "s5ptd": [{"d_state": 4}, {"d_state": 8, "blocks": 2, "gamma": 50.0, "seed": 1, "clip_eigs": True}],
    "s5": [{"d_state": 4}, {"d_state": 8, "blocks": 2, "discretization": "bilinear", "activation": "full_glu"}],
    "bidirectional_s5": [{"d_state": 4}, {"d_state": 4, "activation": "gelu", "c_init": "complex_normal"}],
    "parallel": [
        {
            "mixers": [{"name": "mamba2", "d_state": 4, "head_dim": 4}, {"name": "attention", "n_heads": 2}],
            "in_scales": [0.5, 2.0],
            "out_scales": [1.5, 1.0],
        },
    ],
    "bidirectional": [
        {"mixer": "mamba2", "options": {"d_state": 4, "head_dim": 4}},
        {"mixer": {"name": "s4d", "d_state": 4}, "merge": "concat"},
        {"mixer": "attention", "options": {"n_heads": 2}, "tied": True},
    ],
}


def mamba2(**options):
    return mixers.create("mamba2", D, d_state=4, head_dim=4, **options)


BLOCKS = {
    "residual": lambda: ResidualBlock(D, mamba2()),
    "residual, with a mixture of experts": lambda: ResidualBlock(
        D, mamba2(), MoE(D, 5, n_experts=4, top_k=2, shared_hidden=3), scale=0.5
    ),
    "residual, with an MLP": lambda: ResidualBlock(D, mixers.create("attention", D, n_heads=2), GatedMLP(D, 16)),
}


def _all():
    for name, sets in OPTIONS.items():
        for options in sets:
            build = partial(mixers.create, name, D, **options)
            for law in module_laws(build, d_model=D):
                yield pytest.param(law, id=f"{name}-{options}-{law.name}")
    for name, build in BLOCKS.items():
        for law in module_laws(build, d_model=D):
            yield pytest.param(law, id=f"{name}-{law.name}")


@pytest.mark.parametrize("law", list(_all()))
def test_law(law):
    law.check()


def test_every_mixer_is_here():
    assert sorted(OPTIONS) == mixers.names()
