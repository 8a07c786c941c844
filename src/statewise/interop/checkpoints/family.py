"""What there is to know about one family of checkpoints: two maps of configurations and a table of names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .fields import Fields
from .rules import Rule

Config = dict[str, Any]


class Inexpressible(ValueError):
    """A model has something for which a family's configuration has no words."""


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Args:
        name: the `model_type` of transformers, or "mamba_ssm".
        layout: whose folder format it is.
        read: checked fields of their config.json -> the arguments of our architecture's constructor. It must look at
            every field that changes what the model computes, and refuse values that cannot be served (`Fields.only`).
        write: the other way, from the complete configuration of a built model (`describe.complete`: nothing is left to
            defaults, each layer stands for itself). It need not check that their configuration can say it all: what it
            gives is read again and compared with the model, and every difference is an error. It raises
            `Inexpressible` where there is nothing sensible to write.
        rules: the table of names for a model of this complete configuration. Rules for names that the model does not
            have are left out by themselves.
        architecture: the name in `statewise.models` of what `read` gives arguments for.
        head: their names of output head and embedding. A head that is tied may be in the file or not; it must equal the
            embedding if it is.
        keeps_tied_head: a tied head is written all the same.
        ignored: ends of names in their files that hold nothing that a model is loaded from.
    """

    name: str
    layout: Literal["transformers", "mamba_ssm"]
    read: Callable[[Fields], Config]
    write: Callable[[Config], Config]
    rules: Callable[[Config], Sequence[Rule]]
    architecture: str = "language"
    head: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    keeps_tied_head: bool = False
    ignored: tuple[str, ...] = ()


def shortest(entries: Sequence[Any]) -> list[Any]:
    """The shortest pattern whose repetition is the whole list."""
    whole, n = list(entries), len(entries)
    return next(whole[:k] for k in range(1, n + 1) if n % k == 0 and whole == whole[:k] * (n // k))


def has(config: Config, part: Literal["mixer", "mlp"], name: str) -> bool:
    """Whether a layer has a mixer (or feed-forward part) of this name."""
    return any(layer[part] is not None and layer[part]["name"] == name for layer in config["layers"])


def first(config: Config, part: Literal["mixer", "mlp"], name: str) -> Config:
    """The options of the first layer whose mixer (or feed-forward part) has this name."""
    for layer in config["layers"]:
        if layer[part] is not None and layer[part]["name"] == name:
            return layer[part]
    raise Inexpressible(f"no layer has the {part} {name!r}")
