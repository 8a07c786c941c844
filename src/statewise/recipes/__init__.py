"""Recipes: functions with typed keyword arguments that return a `Recipe`. No import of torch until one is called."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .._names import unknown
from .recipe import Recipe

if TYPE_CHECKING:
    from ._execute import execute

__all__ = ["DEFAULT", "Recipe", "execute", "get", "names"]

# Name -> "module:function"; the first line of the function's docstring is its line in `statewise list`.
_RECIPES: dict[str, str] = {
    "image.cifar": "images:cifar",
    "image.digits": "images:digits",
    "image.fashion_mnist": "images:fashion_mnist",
    "image.mnist": "images:mnist",
    "language.bytes": "language:language_bytes",
    "lra.image": "lra:image",
    "lra.listops": "lra:listops",
    "lra.pathfinder": "lra:pathfinder",
    "lra.pathx": "lra:pathx",
    "lra.retrieval": "lra:retrieval",
    "lra.text": "lra:text",
    "probes.mqar": "probes:mqar",
    "probes.selective_copying": "probes:selective_copying",
    "speech.commands": "speech:commands",
}
DEFAULT = "language.bytes"


def names() -> list[str]:
    return sorted(_RECIPES)


def get(name: str) -> Callable[..., Recipe]:
    """The function of a recipe.

    Raises:
        ValueError: no such recipe; the message has the nearest names.
    """
    if name not in _RECIPES:
        raise ValueError(unknown("recipe", name, _RECIPES))
    module, function = _RECIPES[name].split(":")
    return getattr(import_module(f"{__name__}.{module}"), function)


def __getattr__(name: str) -> Any:
    if name == "execute":
        return import_module(f"{__name__}._execute").execute
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
