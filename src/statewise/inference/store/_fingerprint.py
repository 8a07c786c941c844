"""Which model a state belongs to: a hash of its configuration and of every weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Model -> (what its weights looked like from outside, fingerprint). Entries go with their models.
_known: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def raw(t: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it lies in the CPU's memory in order."""
    t = t.detach().cpu().contiguous()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else memoryview(b"")


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of the bytes of each tensor, on as many threads as PyTorch uses (hashing releases Python's lock)."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        hashes = pool.map(lambda t: hashlib.sha256(raw(t)).hexdigest(), tensors.values())
        return dict(zip(tensors, hashes))


def _configuration(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    name = getattr(model, "architecture", None) or type(model).__name__
    return json.dumps([name, config if isinstance(config, Mapping) else None], sort_keys=True, default=str)


def _outside(tensors: Mapping[str, Tensor]) -> Any:
    """What changes when a weight is replaced, moved, or written to: a look at each tensor's head, not its numbers."""
    try:
        return [(name, t.data_ptr(), t._version, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    except RuntimeError:  # tensors made in inference mode do not count what is written to them
        return None


def fingerprint(model: nn.Module) -> str:
    """64 hex digits: SHA-256 over architecture, configuration, and name, dtype, shape and bytes of every weight.

    Equal for a model that was saved and loaded again, on any device; different after any change of a weight or a dtype.
    Computed once for a model (a second or so per gigabyte); after that only PyTorch's counters of writes are looked at.
    They do not see what is written through `weight.data`, which PyTorch hides from itself too.
    """
    tensors = model.state_dict(keep_vars=True)  # the weights themselves: copies would not count writes
    outside = _outside(tensors)
    known = _known.get(model)
    if known is not None and outside is not None and known[0] == outside:
        return known[1]
    whole = hashlib.sha256(_configuration(model).encode())
    for (name, t), digest in zip(tensors.items(), digests(tensors).values()):
        whole.update(f"\n{name} {t.dtype} {tuple(t.shape)} {digest}".encode())
    _known[model] = outside, whole.hexdigest()
    return whole.hexdigest()


def describe(model: nn.Module) -> str:
    """A few words for people: architecture and number of parameters."""
    name = getattr(model, "architecture", None) or type(model).__name__
    return f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters"
