"""Mixers made of mixers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..segments import Segments, reverse
from ..state import State
from .base import CausalMixer, HasRate, SequenceMixer, check_input
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
        name, chosen = _named("Bidirectional", mixer, options)
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


class Parallel(CausalMixer):
    """Several causal mixers run side by side on one input; the sum of their outputs.

    Branch i adds out_scales[i] * mixer_i(in_scales[i] * x).

    Args:
        d_model: width D of input and output.
        mixers: for each branch the name of a registered causal mixer, or a dict of its name and options.
        in_scales, out_scales: one factor per branch; None: all 1.

    The state is the tuple of the branches' states. Each branch has values and an output map of its own, so their sum
    is not one matrix times one value: look at `branches[i].mixing(x)`.

    Source: heads of attention and of a state space side by side: Hymba (Dong et al. 2024, arXiv 2411.13676) and
    Falcon-H1 (arXiv 2507.22448, section 2), whose muP factors the scales are.
    """

    def __init__(
        self,
        d_model: int,
        mixers: Sequence[str | Mapping[str, Any]] = ("mamba2", "attention"),
        *,
        in_scales: Sequence[float] | None = None,
        out_scales: Sequence[float] | None = None,
    ):
        super().__init__()
        if isinstance(mixers, (str, Mapping)) or not mixers:
            raise ValueError(f"Parallel: mixers: want a list of at least one mixer, got {mixers!r}")
        self.d_model = d_model
        self.branches = nn.ModuleList()
        for mixer in mixers:
            name, options = _named("Parallel", mixer)
            if not issubclass(_class(name), CausalMixer):
                raise ValueError(f"Parallel: mixers: want causal mixers, and {name!r} is not")
            self.branches.append(_create(name, d_model, options))
        self.in_scales = self._scales("in_scales", in_scales)
        self.out_scales = self._scales("out_scales", out_scales)

    def _scales(self, name: str, scales: Sequence[float] | None) -> tuple[float, ...]:
        scales = (1.0,) * len(self.branches) if scales is None else tuple(float(s) for s in scales)
        if len(scales) != len(self.branches):
            raise ValueError(f"Parallel: {name}: want one factor for each of {len(self.branches)} mixers, got {scales}")
        return scales

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> tuple[State, ...]:
        branches = cast("list[CausalMixer]", list(self.branches))
        return tuple(b.init_state(batch, capacity=capacity, device=device, dtype=dtype) for b in branches)

    def _run(
        self, x: Tensor, state: tuple[State, ...] | None, seg: Segments | None
    ) -> tuple[Tensor, tuple[State, ...]]:
        check_input(self, x, self.d_model)
        outs, states = [], []
        for i, branch in enumerate(cast("list[CausalMixer]", list(self.branches))):
            y, new = branch._run(_scaled(x, self.in_scales[i]), None if state is None else state[i], seg)
            outs.append(_scaled(y, self.out_scales[i]))
            states.append(new)
        return sum(outs[1:], outs[0]), tuple(states)


def rated(module: nn.Module) -> list[HasRate]:
    """The mixers in a module, through those that are made of mixers.

    Raises:
        ValueError: one of them has no rate.
    """
    if isinstance(module, HasRate):
        return [module]
    if isinstance(module, SequenceMixer) and not isinstance(module, (Bidirectional, Parallel)):
        raise ValueError(
            f"rate: {type(module).__name__} offers none, so it cannot read another sampling rate; want mixers such as "
            "S4, S4D or S5"
        )
    return [mixer for child in module.children() for mixer in rated(child)]


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _named(
    what: str, mixer: str | Mapping[str, Any], options: dict[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Name and options, from a name or from a dict that holds both."""
    if isinstance(mixer, str):
        return mixer, dict(options or {})
    if not isinstance(mixer, Mapping) or not isinstance(mixer.get("name"), str):
        raise TypeError(f"{what}: mixer: want a name or a dict with a 'name', got {mixer!r}")
    given = {k: v for k, v in mixer.items() if k != "name"}
    twice = sorted(given.keys() & (options or {}).keys())
    if twice:
        raise ValueError(f"{what}: options: {', '.join(twice)} is given in mixer as well; want it once")
    return mixer["name"], {**given, **(options or {})}


def _class(name: str) -> type[SequenceMixer]:
    from . import mixer_class

    return mixer_class(name)


def _create(name: str, d_model: int, options: dict[str, Any]) -> SequenceMixer:
    from . import create

    return create(name, d_model, **options)
