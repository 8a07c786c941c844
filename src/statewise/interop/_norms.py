"""The norms in the modeling files of transformers, on `statewise.ops`.

They are not marked as replaceable, and are worth it: written out in single operations they take as long as the scans.
A class is found by its name, and replaced only if a trial with random numbers gives what its own `forward` gives.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.norm import rms_norm
from ._hooks import fast
from .shims.mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

_NAME = re.compile(r"\w+RMSNorm(Gated)?$")


def classes(module: ModuleType) -> Iterator[type[nn.Module]]:
    """The root-mean-square norms that a modeling file defines, by their names."""
    for name, value in vars(module).items():
        if _NAME.match(name) and isinstance(value, type) and value.__module__ == module.__name__:
            yield value


def op(norm: type[nn.Module]) -> str:
    return "gated_rms_norm" if norm.__name__.endswith("Gated") else "rms_norm"


def replacement(norm: type[nn.Module]) -> Callable[..., Tensor] | None:
    """A `forward` for the class, or None if what it computes is not what its name says."""
    make = _gated if norm.__name__.endswith("Gated") else _plain
    ours = make(norm.forward)
    try:
        return ours if _same(norm, ours) else None
    except Exception:  # other arguments, other attributes: a class that is not known
        return None


def _kept(x: Tensor, weight: Tensor) -> bool:
    """Whether the result has the dtype of x in transformers too."""
    return torch.promote_types(weight.dtype, x.dtype) == x.dtype


def _plain(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not (fast("mamba_ssm", hidden_states, self.weight) and _kept(hidden_states, self.weight)):
            return original(self, hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _gated(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        if not (fast("mamba_ssm", hidden_states, gate, self.weight) and _kept(hidden_states, self.weight)):
            return original(self, hidden_states, gate)
        width = hidden_states.shape[-1]
        size = self.group_size if hasattr(self, "group_size") else width // self.n_groups
        first = getattr(self, "norm_before_gate", False)
        return rmsnorm_fn(hidden_states, self.weight, None, gate, self.variance_epsilon, size, first)

    return forward


def _same(norm: type[nn.Module], ours: Callable[..., Tensor]) -> bool:
    """Whether both ways give the same numbers, for every way in which the class can be built."""
    arguments = inspect.signature(norm).parameters
    sizes = {"hidden_size": 8, "group_size": 4, "n_groups": 2}
    given = {name: size for name, size in sizes.items() if name in arguments}
    orders: list[dict[str, bool]] = [{}]
    if "norm_before_gate" in arguments:
        orders = [{"norm_before_gate": True}, {"norm_before_gate": False}]
    generator = torch.Generator().manual_seed(0)
    x, gate, weight = (torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (2, 3, 8), (8,)))
    inputs = (x, gate) if norm.__name__.endswith("Gated") else (x,)
    with torch.no_grad():
        for order in orders:
            module: Any = norm(**given, **order)
            module.weight.copy_(weight)
            want, got = module(*inputs), ours(module, *inputs)
            if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-5, atol=1e-6):
                return False
    return True
