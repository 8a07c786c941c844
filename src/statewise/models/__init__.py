"""Models by name: `create_model("mamba2-130m")`, `list_models("mamba*")`, `load("path/or/hub-name")`."""

from __future__ import annotations

import fnmatch
import os
from typing import Any

import torch

from .._names import check_options, unknown
from ._registry import ARCHITECTURES, PRESETS, Card, Preset, architecture_class
from ._weights import build, read_config, resolve_directory

__all__ = ["Card", "Preset", "create_model", "list_models", "load", "model_card", "parameter_count"]


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(unknown("model", name, PRESETS))
    return PRESETS[name]


def create_model(name: str, **overrides: Any) -> Any:
    """A new model with random weights.

    Args:
        name: one of `list_models()`.
        overrides: constructor arguments that replace the preset's, e.g. `n_layer=2`.
    """
    preset = _preset(name)
    cls = architecture_class(preset.architecture)
    check_options(name, cls, overrides)
    return cls(**{**preset.config, **overrides})


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern such as "mamba2-*"; a plain word matches anywhere."""
    if not any(c in pattern for c in "*?["):
        pattern = f"*{pattern}*"
    return [name for name in PRESETS if fnmatch.fnmatchcase(name, pattern)]


def model_card(name: str) -> Card:
    """Paper, year, licence of the published weights and published parameter count."""
    return _preset(name).card


def parameter_count(name: str, **overrides: Any) -> int:
    """Number of parameters, counted on the meta device: no memory is used."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **overrides).parameters())


def load(
    name_or_directory: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The model of a directory written by `save_pretrained` (a run directory is one), or of a Hub repository."""
    directory = resolve_directory(name_or_directory)
    config = read_config(directory)
    if config["architecture"] not in ARCHITECTURES:
        raise ValueError(f"{directory}: {unknown('architecture', config['architecture'], ARCHITECTURES)}")
    return build(architecture_class(config["architecture"]), config, directory, device, dtype)
