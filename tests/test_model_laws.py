"""Every law of models over tokens: stacks of each causal mixer, and hybrids."""

from __future__ import annotations

from functools import partial

import pytest

from statewise.models.classification import SequenceClassifier
from statewise.models.language import LanguageModel, Zamba2
from statewise.testing import module_laws

VOCAB = 11
MAMBA = {"name": "mamba", "d_state": 4}
MAMBA2 = {"name": "mamba2", "d_state": 4, "head_dim": 4}
ATTENTION = {"name": "attention", "n_heads": 2, "window": 5}

MODELS = {
    "mamba": partial(LanguageModel, VOCAB, 8, 2, mixer=MAMBA),
    "mamba2": partial(LanguageModel, VOCAB, 8, 2, mixer=MAMBA2, pad_vocab_to=8),
    "s4d": partial(LanguageModel, VOCAB, 8, 1, mixer={"name": "s4d", "d_state": 4}),
    "s5": partial(LanguageModel, VOCAB, 8, 1, mixer={"name": "s5", "d_state": 4}, tie_embeddings=False),
    "moe": partial(
        LanguageModel,
        VOCAB,
        8,
        2,
        mixer=[MAMBA2, ATTENTION],
        residual_scale=0.5,
        logit_scale=0.25,
        mlp=[{"name": "moe", "hidden": 5, "n_experts": 3, "top_k": 2, "renormalise": False}, None],
    ),
    "hybrid": partial(LanguageModel, VOCAB, 8, 3, mixer=[MAMBA2, MAMBA, ATTENTION], d_intermediate=12),
    # Parts alone, mixers side by side, and every factor, offset and cap at once.
    "parts": partial(
        LanguageModel, VOCAB, 8, 2,
        mixer=[{"name": "parallel", "mixers": [MAMBA2, {"name": "rglru"}], "out_scales": [0.5, 2.0]}, None],
        mlp=[
            {"name": "gated", "hidden": 6, "multiple_of": 1, "activation": "gelu_tanh", "gate_scale": 0.7},
            {"name": "sigmoid_moe", "hidden": 5, "n_experts": 4, "top_k": 2, "groups": 2, "latent": 4, "bias": True},
        ],
        norm_offset=1.0, embedding_scale=2.0, logit_scale=0.5, logit_cap=3.0,
    ),
    "zamba2": partial(
        Zamba2, VOCAB, 8, 2, shared_at=[0, 1], mixer=MAMBA2, n_heads=4, d_intermediate=5, rank=2,
        attention_rank=2, rope=True,
    ),
    # A label for each position.
    "classifier": partial(
        SequenceClassifier, 5, 8, 2, vocab_size=VOCAB, pool="none", norm="batch", prenorm=False,
        mixer=[{"name": "bidirectional_s5", "d_state": 4}, {"name": "bidirectional_attention", "n_heads": 2}],
        mlp=[None, {"name": "mlp", "hidden": 6, "activation": "gelu"}],
    ),
    "classifier, layer norm": partial(
        SequenceClassifier, 5, 8, 1, vocab_size=VOCAB, pool="none", mixer={"name": "s4d", "d_state": 4}, positions=True,
        token_bias=True, head="mlp",
    ),
}  # fmt: skip


def _all():
    for name, build in MODELS.items():
        for law in module_laws(build, vocab=VOCAB):
            yield pytest.param(law, id=f"{name}-{law.name}")


@pytest.mark.parametrize("law", list(_all()))
def test_law(law):
    law.check()
