"""What a step makes of parameters before it looks at its input, kept from one step to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._tracing import untraced

_Made = TypeVar("_Made")
_PLAIN = (bool, int, float, str, type(None))


class _Kept(NamedTuple):
    settings: dict[str, Any]
    copies: list[Tensor]
    made: Any


_store: WeakKeyDictionary[nn.Module, dict[str, _Kept]] = WeakKeyDictionary()


def kept(method: Callable[[Any], _Made]) -> Callable[[Any], _Made]:
    """A method without arguments, a function of the module's own parameters, buffers and settings alone.

    Without gradients, on a CPU, its result is kept for as long as all of these have the values from which it was made.
    Values are compared: PyTorch tells of changes made in place, but not of those through `.data` or shared memory.
    """

    @wraps(method)
    def run(self: Any) -> _Made:
        tensors = [t for table in (self._parameters, self._buffers) for t in table.values() if t is not None]
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not untraced()
            or "parametrizations" in self._modules  # parameters of parts, then
            or not all(t.is_cpu for t in tensors)
        ):
            return method(self)
        settings = {name: value for name, value in vars(self).items() if isinstance(value, _PLAIN)}
        mine = _store.setdefault(self, {})
        found = mine.get(method.__qualname__)
        if found is None or found.settings != settings or not _same(found.copies, tensors):
            found = mine[method.__qualname__] = _Kept(settings, [t.detach().clone() for t in tensors], method(self))
        return found.made

    return run


def _same(copies: list[Tensor], tensors: list[Tensor]) -> bool:
    return len(copies) == len(tensors) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(copies, tensors)
    )
