"""What parameter-efficient fine-tuning needs to know of our models: which projections there are, and their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._names import unknown
from ..mixers.base import SequenceMixer


def lora_targets(model: nn.Module, *wanted: str) -> list[str]:
    """Names for `target_modules` of a peft configuration.

    Args:
        model: one of ours, wrapped for transformers or not.
        wanted: which of them, e.g. "x_proj", "dt_proj"; none given: every projection of mixers and feed-forward layers.
            Routers of experts, embeddings and the output head are left out.

    Raises:
        ValueError: a wanted name that no module has (peft would skip it in silence).
    """
    core = getattr(model, "core", model)
    modules = dict(core.named_modules())
    # A name that something else has too says whose it is: "B" of a split projection is "x_proj.B".
    taken = {name.rpartition(".")[2] for name, module in modules.items() if not isinstance(module, nn.Linear)}
    found = set()
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and "router" not in name and name != "lm_head":
            parent, _, last = name.rpartition(".")
            whose = isinstance(modules[parent], SplitLinear) or last in taken
            found.add(f"{parent.rpartition('.')[2]}.{last}" if whose else last)
    for name in wanted:
        if name not in found:
            raise ValueError(unknown("projection", name, found))
    return sorted(wanted or found)


class SplitLinear(nn.Module):
    """A linear layer as several side by side, each with its rows of the weight, so that each can be adapted alone.

    Args:
        linear: the layer; its weight is cut, not kept.
        rows: rows of each part, by name, in order; they sum up to the rows of the weight.
    """

    def __init__(self, linear: nn.Linear, rows: dict[str, int]):
        super().__init__()
        self.kind = type(linear)
        if sum(rows.values()) != linear.out_features:
            raise ValueError(f"rows: want parts of {linear.out_features} rows, got {rows}")
        sizes = list(rows.values())
        weights = linear.weight.detach().split(sizes)
        biases = [None] * len(sizes) if linear.bias is None else linear.bias.detach().split(sizes)
        for name, weight, bias in zip(rows, weights, biases):
            # On the meta device a layer costs nothing to make.
            part = nn.Linear(linear.in_features, len(weight), bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.clone(), linear.weight.requires_grad)
            if bias is not None and linear.bias is not None:
                part.bias = nn.Parameter(bias.clone(), linear.bias.requires_grad)
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], -1)

    def join(self) -> nn.Linear:
        """The one layer again. Raises ValueError while a part carries an adapter."""
        parts: list[Any] = list(self.children())
        for name, part in self.named_children():
            if type(part) is not nn.Linear:
                raise ValueError(f"{name}: carries a {type(part).__name__}; merge adapters first (merge_and_unload)")
        first = parts[0]
        joined = nn.Linear(first.in_features, sum(p.out_features for p in parts), first.bias is not None, device="meta")
        joined.weight = nn.Parameter(torch.cat([p.weight.detach() for p in parts]), first.weight.requires_grad)
        if first.bias is not None:
            joined.bias = nn.Parameter(torch.cat([p.bias.detach() for p in parts]), first.bias.requires_grad)
        return joined


def _fused(model: nn.Module) -> Iterator[tuple[SequenceMixer, str, dict[str, int]]]:
    for module in model.modules():
        if isinstance(module, SequenceMixer):
            for name, rows in module.fused().items():
                yield module, name, rows


def split_projections(model: nn.Module, *names: str) -> nn.Module:
    """Split fused projections into their parts, in place: x_proj of Mamba becomes x_proj.dt, x_proj.B and x_proj.C.

    One low-rank update of a fused weight ties what it does to step sizes, inputs and outputs of the state; updates of
    parts are free of each other. Outputs stay what they were, up to the rounding of matrix products.

    Args:
        model: one of ours, wrapped for transformers or not; before adapters are added.
        names: which projections, e.g. "in_proj"; none given: all that are fused.

    Raises:
        ValueError: a name that no mixer of the model fuses; an adapter stands there already.
    """
    known = {name for _, name, _ in _fused(model)}
    for name in names:
        if name not in known:
            raise ValueError(unknown("fused projection", name, known))
    for mixer, name, rows in list(_fused(model)):
        layer = getattr(mixer, name)
        if (not names or name in names) and not isinstance(layer, SplitLinear):
            if not isinstance(layer, nn.Linear):
                raise ValueError(
                    f"{name}: want a plain linear layer, got {type(layer).__name__}; split before adapters"
                )
            setattr(mixer, name, SplitLinear(layer, rows))
    return model


def join_projections(model: nn.Module) -> nn.Module:
    """Undo `split_projections`, with merged updates inside, so that the model saves as it always did."""
    for mixer, name, _ in list(_fused(model)):
        layer = getattr(mixer, name)
        if isinstance(layer, SplitLinear):
            setattr(mixer, name, layer.join())
    return model
