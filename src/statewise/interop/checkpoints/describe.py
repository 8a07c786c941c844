"""A built model as data, with nothing left to defaults: what the families write their configurations from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...models._registry import ARCHITECTURES, architecture_class
from ...models.language import LanguageModel
from .family import Config
from .fields import expansion

# What decides how a model begins, how fast it runs or what half precision rounds, but not what it computes.
_NEUTRAL = frozenset(
    {"dt_min", "dt_max", "dt_floor", "dt_scale", "a_range", "chunk_size", "residual_in_fp32", "multiple_of", "tokens"}
)


def build_on_meta(architecture: str, arguments: Config, source: str) -> Any:
    """The model of these arguments without memory for its parameters."""
    try:
        with torch.device("meta"):
            return architecture_class(architecture)(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def architecture_of(model: nn.Module) -> str:
    """The registered name of a model's architecture."""
    name = getattr(model, "architecture", None)
    if name not in ARCHITECTURES:
        raise TypeError(f"want a model of statewise.models, got {type(model).__name__}")
    return name


def complete(model: Any) -> Config:
    """The configuration of a model with every default filled in.

    For a language model: the arguments of `LanguageModel`, without those that speak of layers; `vocab_size` counts the
    rows of the embedding, "tokens" those that are used; and "layers", for each layer
    {"mixer": {"name": ..., every option}, "mlp": the same or None}.
    Options that were left to the mixer (None) have the value that it chose. For other architectures: `model.config`.
    """
    if not isinstance(model, LanguageModel):
        config = {**_defaults(type(model)), **model.config}
        if "mixer" in config:  # one for all layers
            spec = config["mixer"] if isinstance(config["mixer"], dict) else {"name": config["mixer"]}
            config["mixer"] = _options(spec, model.layers[0].mixer, config["d_model"])
        return config
    config = {**_defaults(LanguageModel), **model.config}
    for name in ("mixer", "mlp", "n_layer", "pad_vocab_to", "d_intermediate"):
        del config[name]
    config["tokens"], config["vocab_size"] = model.vocab_size, len(model.embedding.weight)
    config["layers"] = [
        {
            "mixer": None if mixer is None else _options(mixer, block.mixer, config["d_model"]),
            "mlp": None if part is None else _options(part, block.mlp, config["d_model"]),
        }
        for mixer, part, block in zip(*model.specs(), model.blocks)
    ]
    return config


def _defaults(build: Callable) -> dict[str, Any]:
    parameters = inspect.signature(build).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _options(spec: dict[str, Any], module: Any, d_model: int) -> dict[str, Any]:
    options = {**_defaults(type(module)), **spec}
    for name, value in options.items():
        if value is None and not isinstance(chosen := getattr(module, name, None), nn.Module):
            options[name] = chosen
    if spec["name"] == "gated":
        options["hidden"] = module.fc2.in_features
    if spec["name"] == "parallel":
        named = [{"name": m} if isinstance(m, str) else dict(m) for m in options["mixers"]]
        options["mixers"] = [_options(m, branch, d_model) for m, branch in zip(named, module.branches)]
    if "expand" in options:
        options["expand"] = expansion(int(options["expand"] * d_model), d_model)
    return options


def differences(a: Config, b: Config) -> list[str]:
    """What two complete configurations compute differently, as "layers.3.mixer.d_state: 16, there 8"."""
    left, right = dict(_flat(a)), dict(_flat(b))
    differ = [n for n in dict.fromkeys([*left, *right]) if left.get(n) != right.get(n)]
    # Where one mixer stands for another, its options say nothing more.
    other = tuple(n.removesuffix("name") for n in differ if n.endswith(".name"))
    return [
        f"{n}: {left.get(n)!r}, there {right.get(n)!r}"
        for n in differ
        if _NEUTRAL.isdisjoint(n.split(".")) and (n.endswith(".name") or not n.startswith(other))
    ]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}.{i}" if prefix else str(i))
    else:
        yield prefix, value
