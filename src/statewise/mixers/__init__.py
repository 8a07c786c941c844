"""Sequence mixers: (B, L, D) -> (B, L, D) under one contract (see `statewise.mixers.base`).

Every mixer is `Mixer(d_model, **options)`. `create("mamba2", 256, d_state=64)` builds one by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .._names import check_options, unknown
from .base import Causal, CausalMixer, HasImpulse, HasMixing, HasRate, Mixing, SequenceMixer

# Registry name -> (module, class). A mixer's card is its docstring: first line, and "Source:" at the end.
_MIXERS: dict[str, tuple[str, str]] = {
    "attention": ("attention", "Attention"),
    "bidirectional_attention": ("attention", "BidirectionalAttention"),
    "lstm": ("lstm", "LSTM"),
    "linear_attention": ("linear_attention", "LinearAttention"),
    "normalized_attention": ("linear_attention", "NormalizedAttention"),
    "qlstm": ("qlstm", "QLSTM"),
    "mamba": ("mamba", "Mamba"),
    "mamba2": ("mamba2", "Mamba2"),
    "rglru": ("rglru", "RGLRU"),
    "s4": ("s4", "S4"),
    "bidirectional_s4": ("s4", "BidirectionalS4"),
    "dss": ("dss", "DSS"),
    "dlr": ("dss", "DLR"),
    "gss": ("gss", "GSS"),
    "liquid_s4": ("liquid_s4", "LiquidS4"),
    "lru": ("lru", "LRU"),
    "s4d": ("s4d", "S4D"),
    "bidirectional_s4d": ("s4d", "BidirectionalS4D"),
    "s4ptd": ("ptd", "S4PTD"),
    "s5": ("s5", "S5"),
    "s5ptd": ("ptd", "S5PTD"),
    "bidirectional_s5": ("s5", "BidirectionalS5"),
    "parallel": ("compose", "Parallel"),
    "bidirectional": ("compose", "Bidirectional"),
}
_CLASSES = {cls: module for module, cls in _MIXERS.values()}

__all__ = [
    "DLR",
    "DSS",
    "GSS",
    "LRU",
    "LSTM",
    "QLSTM",
    "RGLRU",
    "S4",
    "S4D",
    "S4PTD",
    "S5",
    "S5PTD",
    "Attention",
    "Bidirectional",
    "BidirectionalAttention",
    "BidirectionalS4",
    "BidirectionalS4D",
    "BidirectionalS5",
    "Causal",
    "CausalMixer",
    "HasImpulse",
    "HasMixing",
    "HasRate",
    "LinearAttention",
    "LiquidS4",
    "Mamba",
    "Mamba2",
    "Mixing",
    "NormalizedAttention",
    "Parallel",
    "SequenceMixer",
    "create",
    "mixer_class",
    "names",
    "scale_rate",
]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def names() -> list[str]:
    """The registered names."""
    return sorted(_MIXERS)


def mixer_class(name: str) -> type[SequenceMixer]:
    """The class registered under `name`."""
    if name not in _MIXERS:
        raise ValueError(unknown("mixer", name, _MIXERS))
    module, cls = _MIXERS[name]
    return getattr(import_module(f"{__name__}.{module}"), cls)


def create(name: str, d_model: int, **options: Any) -> SequenceMixer:
    """Build a mixer by name; an unknown name or option raises with the nearest that exists."""
    cls = mixer_class(name)
    check_options(name, cls, options)
    return cls(d_model, **options)


def scale_rate(module: Any, factor: float) -> None:
    """Multiply the `rate` of every mixer in a module: 2 for an input that is sampled half as often as before.

    Raises:
        ValueError: a mixer that has no rate, by name (see `HasRate`), or a factor that is not positive. No mixer is
            changed then.
    """
    from .compose import rated

    if not factor > 0:
        raise ValueError(f"factor: want a positive number, got {factor}")
    for mixer in dict.fromkeys(rated(module)):  # a mixer may stand in several places
        mixer.rate *= factor
