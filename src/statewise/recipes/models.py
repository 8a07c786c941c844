"""From the word after `--model` to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._names import unknown

ModelChoice = str | dict[str, Any] | list[Any]


def _entries(model: ModelChoice) -> list[Any]:
    if isinstance(model, str):
        return [part.strip() for part in model.split(",")]
    return [model] if isinstance(model, Mapping) else list(model)


def build_language_model(
    model: ModelChoice,
    vocab_size: int,
    *,
    d_model: int | None,
    n_layer: int | None,
    default_width: int,
    default_depth: int,
    small: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Any:
    """A language model.

    Args:
        model: a mixer's name; a dict {"name": mixer, **options}; a list of these, one per layer or a pattern that
            repeats ("mamba2,mamba2,attention" is short for a list of names); or the name of a preset.
        d_model, n_layer: None means the preset's own, or the defaults; for a list, a depth that it fits.
        small: options of a mixer that is given by name only, for models much smaller than the mixer's defaults.

    Raises:
        ValueError: unknown name (with the nearest), or a list that does not fit `n_layer`.
    """
    from .. import mixers
    from ..models import create_model
    from ..models._registry import PRESETS, architecture_class
    from ..models.language import CausalLM
    from ..models.language.stack import LanguageModel

    presets = [n for n, preset in PRESETS.items() if issubclass(architecture_class(preset.architecture), CausalLM)]
    entries = _entries(model)
    if len(entries) == 1 and isinstance(entries[0], str) and entries[0] in presets:
        sizes = {k: v for k, v in (("d_model", d_model), ("n_layer", n_layer)) if v is not None}
        return create_model(entries[0], vocab_size=vocab_size, **sizes, **options)
    specs: list[dict[str, Any]] = []
    for entry in entries:
        if isinstance(entry, str):
            if entry not in mixers.names():
                raise ValueError(unknown("model", entry, [*mixers.names(), *presets]))
            specs.append({"name": entry, **(small or {}).get(entry, {})})
        elif isinstance(entry, Mapping):
            specs.append(dict(entry))
        else:
            raise ValueError(f"model: want a name, a mapping with 'name', or a list of these, got {entry!r}")
    if n_layer is None:
        n_layer = -(-default_depth // len(specs)) * len(specs) if len(specs) <= default_depth else len(specs)
    width = default_width if d_model is None else d_model
    mixer: Any = _plain(specs)
    return LanguageModel(vocab_size, width, n_layer, mixer=mixer, **options)


def _plain(specs: Sequence[dict[str, Any]]) -> Any:
    short = [spec["name"] if set(spec) == {"name"} else spec for spec in specs]
    return short[0] if len(short) == 1 else short
