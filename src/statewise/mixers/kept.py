"""What a step makes of parameters before it looks at its input, kept from one step to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._tracing import untraced

_Made = TypeVar("_Made")
_PLAIN = (bool, int, float, str, type(None))


class _Kept(NamedTuple):
    settings: dict[str, Any]
    copies: list[Tensor]
    made: Any


_store: WeakKeyDictionary[nn.Module, dict[str, _Kept]] = WeakKeyDictionary()


def kept(*names: str) -> Callable[[Callable[[Any], _Made]], Callable[[Any], _Made]]:
    """For a method without arguments, a function of the module's own tensors and settings alone, not of its children.

    Without gradients, on a CPU, its result is kept for as long as all of these have the values from which it was made.
    Values are compared: PyTorch tells of changes made in place, but not of those through `.data` or shared memory.
    Whoever calls the method must not write to what it returns.

    Args:
        names: the tensors that count, if not all of the module's own.
    """

    def wrap(method: Callable[[Any], _Made]) -> Callable[[Any], _Made]:
        @wraps(method)
        def run(self: Any) -> _Made:
            tensors = [getattr(self, name) for name in names] if names else _own(self)
            if (
                torch.is_grad_enabled()
                or torch.is_autocast_enabled("cpu")
                or not untraced()
                or "parametrizations" in self._modules  # then some of its tensors are those of children
                or not all(t.is_cpu for t in tensors)
            ):
                return method(self)
            settings = {name: value for name, value in vars(self).items() if isinstance(value, _PLAIN)}
            mine = _store.setdefault(self, {})
            # A subclass may have another method of this name, and call this one.
            found = mine.get(method.__qualname__)
            if found is None or found.settings != settings or not _same(found.copies, tensors):
                made = tree_map_only(Tensor, partial(_apart, {_memory(t) for t in tensors}), method(self))
                found = _Kept(settings, [t.detach().clone() for t in tensors], made)
                mine[method.__qualname__] = found
            return found.made

        return run

    return wrap


def _own(module: nn.Module) -> list[Tensor]:
    others = [t for t in vars(module).values() if isinstance(t, Tensor)]  # as pruning and hooks leave them
    return [t for t in (*module._parameters.values(), *module._buffers.values(), *others) if t is not None]


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _apart(memories: set[int], t: Tensor) -> Tensor:
    """A result that is a view of a parameter would change with it, unseen."""
    return t.clone() if _memory(t) in memories else t


def _same(copies: list[Tensor], tensors: list[Tensor]) -> bool:
    return len(copies) == len(tensors) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(copies, tensors)
    )
