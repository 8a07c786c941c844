"""Trees of tensors in which axis 0 of every leaf is the batch.

A state is a NamedTuple (or a tuple of such) of tensors. Because every leaf is batch-first, all that serving and
training do with states is written once, here, for every mixer and model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

State = Any  # a Tensor, None, or a (named) tuple of States
_Class = TypeVar("_Class", bound=type)


def exportable(cls: _Class) -> _Class:
    """Class decorator for a state that is a NamedTuple: torch.export can then save programs that take or return it.

    The name in the saved program is `module.class`, so a program is read back where that module can be imported.
    """
    torch.serialization.add_safe_globals([cls])  # a program holds the example state it was made with
    _pytree._register_namedtuple(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls


def _rebuild(like: tuple, parts: Sequence) -> tuple:
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def map_state(fn: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply `fn` to each leaf (with the matching leaves of `others`); None leaves stay None."""
    _check(state)
    for other in others:
        if _check(other) != _check(state) or (isinstance(state, tuple) and len(other) != len(state)):
            raise ValueError(f"state: trees differ in shape: {type(state).__name__} and {type(other).__name__}")
    if state is None:
        return None
    if isinstance(state, Tensor):
        return fn(state, *others)
    return _rebuild(state, [map_state(fn, part, *(o[i] for o in others)) for i, part in enumerate(state)])


def _check(state: State) -> str:
    """What kind of node this is; anything but a tensor, None or a tuple raises."""
    if state is None or isinstance(state, Tensor):
        return "none" if state is None else "tensor"
    if not isinstance(state, tuple):
        raise TypeError(f"state: want tensors in (named) tuples, got {type(state).__name__}")
    return "tuple"


def leaves(state: State, prefix: str = "") -> list[tuple[str, Tensor]]:
    """(name, tensor) of each leaf, e.g. ("layers.0.conv", ...), in a fixed order."""
    _check(state)
    if state is None:
        return []
    if isinstance(state, Tensor):
        return [(prefix or "state", state)]
    names = getattr(state, "_fields", None) or [str(i) for i in range(len(state))]
    return [leaf for name, part in zip(names, state) for leaf in leaves(part, f"{prefix}.{name}" if prefix else name)]


def batch_size(state: State) -> int:
    """Number of rows, on which all leaves have to agree."""
    sizes = {t.shape[0] for _, t in leaves(state)}
    if not sizes:
        raise ValueError("state: holds no tensors, so it has no batch size")
    if len(sizes) != 1:
        raise ValueError(f"state: leaves disagree on the batch size: {sorted(sizes)}")
    return sizes.pop()


def select(state: State, rows: Tensor | Sequence[int] | slice) -> State:
    """The given rows of the batch, in the given order (repeats allowed)."""
    if isinstance(rows, slice):
        return map_state(lambda t: t[rows], state)
    index = torch.as_tensor(rows, dtype=torch.int64)
    return map_state(lambda t: t.index_select(0, index.to(t.device)), state)


def expand(state: State, copies: int) -> State:
    """Each row `copies` times, side by side: row b becomes rows b*copies ... b*copies + copies - 1 (a fork)."""
    return map_state(lambda t: t.repeat_interleave(copies, 0), state)


def merge(states: Sequence[State]) -> State:
    """Put the rows of several states into one batch. Caches of different lengths are padded on the left with zeros."""
    if not states:
        raise ValueError("states: want at least one state to merge")

    def cat(*parts: Tensor) -> Tensor:
        if parts[0].ndim > 1 and len({p.shape[1] for p in parts}) > 1:
            longest = max(p.shape[1] for p in parts)
            parts = tuple(torch.cat([p.new_zeros(p.shape[0], longest - p.shape[1], *p.shape[2:]), p], 1) for p in parts)
        return torch.cat(parts)

    return map_state(cat, states[0], *states[1:])


def clone(state: State) -> State:
    """A copy that keeps its own memory: `extend` and `step` consume the state they are given."""
    return map_state(torch.clone, state)


def detach(state: State) -> State:
    """Cut the graph, for truncated backpropagation through time."""
    return map_state(torch.detach, state)


def to(state: State, *args, **kwargs) -> State:
    """As `Tensor.to` on each leaf. A real dtype applies to floating leaves, and to complex ones as that of their parts
    (half precision leaves those as they are); integers keep their dtype."""
    dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
    others = [a for a in args if not isinstance(a, torch.dtype)]
    options = {k: v for k, v in kwargs.items() if k != "dtype"}
    partner: dict[Any, torch.dtype] = {torch.float32: torch.complex64, torch.float64: torch.complex128}
    complex_dtype = partner.get(dtype)

    def move(t: Tensor) -> Tensor:
        if others or options:
            t = t.to(*others, **options)
        wanted = dtype if t.is_floating_point() else complex_dtype if t.is_complex() else None
        return t if wanted is None else t.to(wanted)

    return map_state(move, state)


def nbytes(state: State) -> int:
    """Bytes held by all leaves."""
    return sum(t.numel() * t.element_size() for _, t in leaves(state))


def save(state: State, path: str | os.PathLike) -> None:
    """Write a state as one safetensors file."""
    from safetensors.torch import save_file

    stored = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in leaves(state)}
    save_file(stored, os.fspath(path))


def load(path: str | os.PathLike, like: State) -> State:
    """Read a state written by `save`. `like` is a state of the same model (e.g. `model.init_state(1)`); it gives the
    structure, dtypes and device. Batch and cache length may differ; anything else that differs raises."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(os.fspath(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: is truncated or not a safetensors file ({error})") from error
    want = dict(leaves(like))
    if stored.keys() != want.keys():
        missing, extra = sorted(want.keys() - stored.keys()), sorted(stored.keys() - want.keys())
        raise ValueError(
            f"{path}: not a state of this model: missing {missing or 'none'}, unexpected {extra or 'none'}"
        )
    for name, t in want.items():
        got = stored[name]
        if got.dtype != t.dtype or got.ndim != t.ndim or got.shape[2:] != t.shape[2:]:
            raise ValueError(
                f"{path}: {name}: want {t.dtype} {tuple(t.shape)} (batch and cache length free), "
                f"got {got.dtype} {tuple(got.shape)}"
            )
    parts = iter([stored[name].to(t.device) for name, t in want.items()])
    return map_state(lambda _: next(parts), like)
