"""A model's verbs as programs over named tensors, for any batch and length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from ... import state as trees
from ...ops.attention import KVBuffer, KVState
from ...state import State
from . import _pairs, _portable

GRAPHS = ("forward", "extend", "step")
# Wider than any window: tells a cache of all tokens from one of a window.
_WIDE = 1 << 40


@dataclass(frozen=True)
class Port:
    """An input or output: its name, dtype as "float32", and shape, in which names stand for dynamic sizes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One verb as a program.

    Args:
        kind: one of GRAPHS.
        program: takes `tokens`, or `tokens` and the state as a dict of tensors; returns logits, or both.
        inputs, outputs: in the order in which the program takes and gives them.
    """

    kind: str
    program: ExportedProgram
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


# ---- states ----------------------------------------------------------------------------------------------------------


def start_state(model: Any, batch: int, capacity: int | None = None, slots: int = 1) -> State:
    """The state before the first token, as programs take it: zeros throughout.

    Args:
        capacity: number of tokens that every cache of attention holds. None: caches grow, and begin with `slots` slots
            that hold no token, since a program's sizes are 1 or more. The cache of a window has all of its slots.
    """
    if capacity is not None:
        return model.init_state(batch, capacity=capacity)
    return _fill(model.init_state(batch), model.init_state(1, capacity=_WIDE, device="meta"), slots)


def _fill(state: State, wide: State, slots: int) -> State:
    if isinstance(state, KVState):
        grows = wide.k.shape[1] == _WIDE
        held = slots if grows else wide.k.shape[1]
        k, v, live = (t.new_zeros(t.shape[0], held, *t.shape[2:]) for t in state[:3])
        return (KVState if grows else KVBuffer)(k, v, live, state.position)
    if isinstance(state, tuple):
        parts = [_fill(part, other, slots) for part, other in zip(state, wide)]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def flat(state: State) -> dict[str, Tensor]:
    """Name -> tensor, complex ones as pairs (..., 2)."""
    return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in trees.leaves(state)}


def unflat(tensors: dict[str, Tensor], like: State) -> State:
    """The inverse of `flat`; `like` gives the structure."""
    given = iter(tensors.values())

    def next_leaf(leaf: Tensor) -> Tensor:
        t = next(given)
        return torch.view_as_complex(t) if leaf.is_complex() else t

    return trees.map_state(next_leaf, like)


def _growing(state: State, prefix: str = "") -> Iterator[str]:
    """Names of the leaves whose second axis grows with every token."""
    if isinstance(state, KVState):
        yield from (f"{prefix}.{name}" for name in ("k", "v", "live"))
    elif isinstance(state, tuple):
        for name, part in zip(getattr(state, "_fields", None) or map(str, range(len(state))), state):
            yield from _growing(part, f"{prefix}.{name}" if prefix else name)


# ---- programs --------------------------------------------------------------------------------------------------------


class _Forward(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


class _Stateful(nn.Module):
    """`extend` or `step` with the state as a dict of tensors, so that a program knows no class of Statewise."""

    def __init__(self, model: Any, verb: str, like: State):
        super().__init__()
        self.model, self.verb, self.like = model, verb, like

    def forward(self, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits, new = getattr(self.model, self.verb)(tokens, unflat(state, self.like))
        return logits, flat(new)


def build(model: Any, kind: str, *, capacity: int | None = None, portable: bool = True) -> Graph:
    """Trace one verb.

    Args:
        model: a language model in float32 on the CPU, in eval mode.
        kind: "forward", "extend" or "step".
        capacity: number of tokens that caches of attention hold; None lets them grow.
        portable: plain PyTorch operators and real numbers only; else the operators of Statewise, which are faster.
    """
    tokens, batch, length = torch.zeros(2, 13, dtype=torch.int64), Dim("batch", min=1), Dim("length", min=1)
    of_tokens: dict[int, Any] = {0: batch, 1: length}
    if kind == "step":
        tokens, of_tokens = tokens[:, 0], {0: batch}
    module: nn.Module = _Forward(model)
    args: tuple[Any, ...] = (tokens,)
    shapes: tuple[Any, ...] = (of_tokens,)
    growing: set[str] = set()
    if kind != "forward":
        # Sizes of 1 are special to the tracer, so the example has caches of more slots.
        start = start_state(model, len(tokens), capacity, slots=5)
        growing, module, args = set(_growing(start)), _Stateful(model, kind, start), (tokens, flat(start))
        cache = Dim("cache", min=1)
        shapes = (of_tokens, {name: {0: batch, 1: cache} if name in growing else {0: batch} for name in args[1]})
    with torch.no_grad():
        program = torch.export.export(module, args, dynamic_shapes=shapes)
        if portable:
            program = _plain(program, args, shapes)
    for graph in (m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of the machine that exported
    return Graph(kind, program, *_ports(program, args, growing))


def _plain(program: ExportedProgram, args: tuple, shapes: tuple) -> ExportedProgram:
    """The program without operators of Statewise, complex numbers and kernels of one device."""
    program = program.run_decompositions(_portable.table())
    left = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("statewise.")})
    if left:
        raise NotImplementedError(
            f"export: {', '.join(left)} has no form in plain PyTorch yet; want form='kernels' of torch-export"
        )
    module = program.module(check_guards=False)
    if not _pairs.has_complex(module.graph):
        return program
    # What the tracer cannot prove about lengths (chunks times their size is not the length) becomes a check at run time
    # instead of a refusal.
    return torch.export.export(
        _pairs.without_complex(module),
        args,
        dynamic_shapes=shapes,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _ports(program: ExportedProgram, args: tuple, growing: set[str]) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of the program, in order."""
    users = set(program.graph_signature.user_inputs)
    inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in users]
    outputs = [n.meta["val"] for n in program.graph.output_node().args[0]]
    leaves = list(args[1]) if len(args) > 1 else []
    symbols = {str(size): name for size, name in zip(inputs[0].shape, ("batch", "length"))}
    for name, value in zip(leaves, inputs[1:]):
        if name in growing:
            symbols[str(value.shape[1])] = "cache"

    def port(name: str, value: Tensor) -> Port:
        sizes = (s if isinstance(s, int) else _renamed(str(s), symbols) for s in value.shape)
        return Port(name, str(value.dtype).removeprefix("torch."), tuple(sizes))

    return (
        tuple(map(port, ["tokens", *leaves], inputs)),
        tuple(map(port, ["logits", *leaves], outputs)),
    )


def _renamed(size: str, symbols: dict[str, str]) -> str:
    return re.sub(r"\b[su]\d+\b", lambda m: symbols.get(m[0], m[0]), size)
