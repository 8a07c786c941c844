"""Which models exist. A variant is a row of data: a configuration and a card, never one more flag."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ._cards import Card, Preset
from ._long_range import PRESETS as LONG_RANGE

# Architecture name (stored in config.json) -> "module:class", imported on first use.
ARCHITECTURES: dict[str, str] = {
    "language": "statewise.models.language.stack:LanguageModel",
    "zamba2": "statewise.models.language.zamba2:Zamba2",
    "sequence_classifier": "statewise.models.classification.sequence:SequenceClassifier",
}


def architecture_class(name: str) -> Any:
    module, cls = ARCHITECTURES[name].split(":")
    return getattr(import_module(module), cls)


def _mamba(layers: int, d_model: int, parameters: int) -> Preset:
    card = Card("arXiv 2312.00752", 2023, parameters, "Apache-2.0", "Mamba language model, GPT-NeoX tokens")
    config = {"vocab_size": 50277, "d_model": d_model, "n_layer": layers, "mixer": "mamba", "pad_vocab_to": 8}
    return Preset("language", card, config)


def _mamba2(layers: int, d_model: int, parameters: int) -> Preset:
    card = Card("arXiv 2405.21060", 2024, parameters, "Apache-2.0", "Mamba-2 language model, GPT-NeoX tokens")
    config = {"vocab_size": 50277, "d_model": d_model, "n_layer": layers, "mixer": "mamba2", "pad_vocab_to": 16}
    return Preset("language", card, config)


def _falcon_mamba() -> Preset:
    card = Card("arXiv 2410.05355", 2024, 7_272_665_088, "Falcon-Mamba 2.0", "Falcon Mamba, norms on dt, B and C")
    mixer = {"name": "mamba", "coefficient_norm": "unit"}
    config = {"vocab_size": 65024, "d_model": 4096, "n_layer": 64, "mixer": mixer, "tie_embeddings": False}
    return Preset("language", card, config)


def _codestral_mamba() -> Preset:
    card = Card("arXiv 2405.21060", 2024, 7_285_403_648, "Apache-2.0", "Codestral Mamba, a Mamba-2 for code")
    mixer = {"name": "mamba2", "n_groups": 8}
    config = {"vocab_size": 32768, "d_model": 4096, "n_layer": 64, "mixer": mixer, "tie_embeddings": False}
    return Preset("language", card, config)


def _jamba() -> Preset:
    card = Card("arXiv 2403.19887", 2024, 51_570_323_328, "Apache-2.0", "Jamba: Mamba, attention and 16 experts")
    mamba = {"name": "mamba", "coefficient_norm": "rms"}
    attention = {"name": "attention", "n_heads": 32, "n_kv_heads": 8, "rope": False}
    dense = {"name": "gated", "hidden": 14336}
    experts = {"name": "moe", "hidden": 14336, "n_experts": 16, "top_k": 2, "renormalise": False}
    config = {
        "vocab_size": 65536,
        "d_model": 4096,
        "n_layer": 32,
        "mixer": [*[mamba] * 4, attention, *[mamba] * 3],
        "mlp": [dense, experts],
        "tie_embeddings": False,
        "residual_in_fp32": False,
        "norm_eps": 1e-6,
    }
    return Preset("language", card, config)


def _recurrent_gemma(layers: int, d_model: int, heads: int, parameters: int) -> Preset:
    card = Card("arXiv 2404.07839", 2024, parameters, "Gemma", "RecurrentGemma (Griffin): RG-LRU and local attention")
    recurrent = {"name": "rglru", "n_blocks": heads}
    attention = {"name": "attention", "n_heads": heads, "n_kv_heads": 1, "window": 2048, "out_bias": True}
    attention["rope_dim"] = d_model // heads // 2
    config = {
        "vocab_size": 256000,
        "d_model": d_model,
        "n_layer": layers,
        "mixer": ([recurrent, recurrent, attention] * layers)[:layers],
        "mlp": {"name": "gated", "hidden": 3 * d_model, "bias": True, "activation": "gelu_tanh"},
        "norm_eps": 1e-6,
        "norm_offset": 1.0,
        # The square root of the width in bfloat16, as the published weights were trained.
        "embedding_scale": {2560: 50.5, 4096: 64.0}[d_model],
        "logit_cap": 30.0,
    }
    return Preset("language", card, config)


PRESETS: dict[str, Preset] = {
    "mamba-130m": _mamba(24, 768, 129_135_360),
    "mamba-370m": _mamba(48, 1024, 371_516_416),
    "mamba-790m": _mamba(48, 1536, 793_204_224),
    "mamba-1.4b": _mamba(48, 2048, 1_372_178_432),
    "mamba-2.8b": _mamba(64, 2560, 2_768_345_600),
    "mamba2-130m": _mamba2(24, 768, 128_989_632),
    "mamba2-370m": _mamba2(48, 1024, 368_346_624),
    "mamba2-780m": _mamba2(48, 1536, 780_161_280),
    "mamba2-1.3b": _mamba2(48, 2048, 1_343_757_312),
    "mamba2-2.7b": _mamba2(64, 2560, 2_702_599_680),
    "recurrentgemma-2b": _recurrent_gemma(26, 2560, 10, 2_682_862_080),
    "recurrentgemma-9b": _recurrent_gemma(38, 4096, 16, 8_579_977_216),
    "falcon-mamba-7b": _falcon_mamba(),
    "codestral-mamba-7b": _codestral_mamba(),
    "jamba-v0.1": _jamba(),
    **LONG_RANGE,
}
