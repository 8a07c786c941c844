"""Mixers made of mixers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..segments import Segments, reverse
from .base import SequenceMixer, check_input
from .layers import Linear


class Bidirectional(SequenceMixer):
    """One mixer runs over each document from its start, another from its end; their outputs are merged.

    Args:
        d_model: width D of input and output.
        mixer: name of a registered mixer, or a dict of its name and options: {"name": "mamba2", "d_state": 64}.
        options: further options of that mixer.
        merge: "add", or "concat" for a linear map from both outputs, 2 D to D.
        tied: use one module for both directions.

    Time is turned around within each document, so padding stays where it is, and a token sees the whole of its own
    document and nothing else. It has no state: a later token changes every earlier output. It also has no matrix of
    `HasMixing`: each direction has values and an output map of its own, so their sum is not one matrix times one value.

    Source: Schuster and Paliwal 1997; for state space models Goel et al. 2022 (arXiv 2202.09729).
    """

    def __init__(
        self,
        d_model: int,
        mixer: str | dict[str, Any] = "mamba2",
        *,
        options: dict[str, Any] | None = None,
        merge: Literal["add", "concat"] = "add",
        tied: bool = False,
    ):
        super().__init__()
        if merge not in ("add", "concat"):
            raise ValueError(f"Bidirectional: merge: want 'add' or 'concat', got {merge!r}")
        name, chosen = _named(mixer, options)
        self.d_model, self.merge, self.tied = d_model, merge, tied
        self.forward_mixer = _create(name, d_model, chosen)
        # One module under two names would be saved twice.
        self.backward_mixer = None if tied else _create(name, d_model, chosen)
        self.out_proj = Linear(2 * d_model, d_model, bias=False) if merge == "concat" else None

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        check_input(self, x, self.d_model)
        back = self.forward_mixer if self.backward_mixer is None else self.backward_mixer
        ahead = self.forward_mixer(x, seg)
        behind = reverse(back(reverse(x, seg), seg), seg)
        if self.out_proj is None:
            return ahead + behind
        return self.out_proj(torch.cat([ahead, behind], -1))


def _named(mixer: str | dict[str, Any], options: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Name and options, from a name or from a dict that holds both."""
    if isinstance(mixer, str):
        return mixer, dict(options or {})
    if not isinstance(mixer, dict) or not isinstance(mixer.get("name"), str):
        raise TypeError(f"Bidirectional: mixer: want a name or a dict with a 'name', got {mixer!r}")
    given = {k: v for k, v in mixer.items() if k != "name"}
    twice = sorted(given.keys() & (options or {}).keys())
    if twice:
        raise ValueError(f"Bidirectional: options: {', '.join(twice)} is given in mixer as well; want it once")
    return mixer["name"], {**given, **(options or {})}


def _create(name: str, d_model: int, options: dict[str, Any]) -> SequenceMixer:
    from . import create

    return create(name, d_model, **options)
