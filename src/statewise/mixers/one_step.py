"""Decoding by one call for many layers (`ops.decode`), and what must hold so that it means what the modules mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from .._tracing import transformed
from ..ops import decode
from ..segments import Segments
from ..state import State
from .base import CausalMixer
from .layers import GatedRMSNorm, Linear, RMSNorm, ShortConv, StepProjection

_KNOWN = (Linear, StepProjection, RMSNorm, GatedRMSNorm, ShortConv)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _parts(owner: nn.Module, norm: nn.Module | None) -> list[nn.Module]:
    return [*owner.children(), *(() if norm is None else (norm,))]


class _Lookup:
    """Something made from the parameters of modules, for as long as a new look-up would find the same."""

    def __init__(self, owner: nn.Module, norm: nn.Module | None, made: decode.Layer | None):
        self.norm, self.made = norm, made
        parts = _parts(owner, norm)
        self._tables: list[tuple[dict, str, Any]] = [(owner._modules, name, m) for name, m in owner._modules.items()]
        self._tables += [(m._parameters, name, p) for m in (owner, *parts) for name, p in m._parameters.items()]
        watched = [p for m in (owner, *parts) for p in m._parameters.values() if p is not None]
        self._addresses = [] if made is None else [(p, p.data_ptr()) for p in watched]
        self._hooks = [getattr(m, name) for m in parts for name in _HOOKS]
        self._hooks += [_module._global_forward_hooks, _module._global_forward_pre_hooks]

    def heard(self) -> bool:
        """Whether a hook listens to one of the parts."""
        return any(self._hooks)

    def holds(self) -> bool:
        for table, name, found in self._tables:
            if table.get(name) is not found:
                return False
        return all(p.data_ptr() == at for p, at in self._addresses)


_lookups: WeakKeyDictionary[nn.Module, dict[bool, _Lookup]] = WeakKeyDictionary()


class OneStep(CausalMixer):
    """A causal mixer with a kernel for one position of all of it.

    The kernel is taken only where nobody could tell but by the time: without gradients, and as long as every part is
    the module that the mixer made, not an adapter, a quantised or parametrised one, and no hook listens.
    """

    @abstractmethod
    def _layer(self, norm: decode.Norm | None) -> decode.Layer | None:
        """What `ops.decode.step` takes, or None."""

    def kernel(self, norm: nn.Module | None) -> decode.Layer | None:
        """The same as far as it still means this mixer, with `norm` x + mixer(norm(x))."""
        found = _lookups.setdefault(self, {})
        lookup = found.get(norm is not None)
        if lookup is None or (norm is not None and lookup.norm is not norm) or not lookup.holds():
            lookup = found[norm is not None] = self._look_up(norm)
        return None if lookup.heard() else lookup.made

    def _look_up(self, norm: nn.Module | None) -> _Lookup:
        made = None
        if all(type(m) in _KNOWN for m in _parts(self, norm)) and (
            norm is None or (isinstance(norm, RMSNorm) and norm.offset == 0)
        ):
            made = self._layer(None if norm is None else (norm.weight, norm.eps))
        return _Lookup(self, norm, made)


def one_step(
    parts: Sequence[tuple[OneStep, nn.Module | None]], x: Tensor, states: Sequence[State], seg: Segments | None
) -> tuple[Tensor, list[State]] | None:
    """x (B, 1, D) through mixers, or through x + mixer(norm(x)) where a norm is given, one after the other.

    None if x is more than one position, a state is missing, or no kernel serves.
    """
    if torch.compiler.is_compiling() or seg is not None or x.shape[1] != 1 or torch.is_grad_enabled():
        return None
    if transformed():
        return None
    if any(state is None for state in states):
        return None
    layers = []
    for mixer, norm in parts:
        layer = mixer.kernel(norm)
        if layer is None:
            return None
        layers.append(layer)
    result = decode.step(layers, x[:, 0], states)
    if result is None:
        return None
    y, new = result
    return y.unsqueeze(1), [type(old)(*state) for old, state in zip(states, new)]
