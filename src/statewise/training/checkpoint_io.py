"""Checkpoints as one safetensors file: tensors as tensors, all the rest as JSON in the header. No pickle anywhere.

Being one file makes a checkpoint atomic: it is written beside its place, flushed to the disk, and renamed. Whatever
happens on the way (a full disk, kill -9, a power cut), what had the name before is still there and whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import write_atomically

_HEADER = "statewise.checkpoint"
_PLAIN = (str, int, float, bool, type(None))


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which file and why."""


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list):
        return [_encode(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [_encode(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _encode(v, f"{path}/{k}", tensors) for k, v in value.items()}
        if all(type(k) in _PLAIN for k in value):
            return {"$dict": [[k, _encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    raise TypeError(f"checkpoint: {path or 'the top'} is a {type(value).__name__}, which has no form in JSON")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_decode(v, tensors) for v in value["$tuple"])
    if "$dict" in value:
        return {k: _decode(v, tensors) for k, v in value["$dict"]}
    return {k: _decode(v, tensors) for k, v in value.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _storable(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What safetensors takes: own memory and contiguous. Tied weights are stored once; the second name is an alias."""
    stored: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    owner: dict[int, str] = {}
    for name, t in tensors.items():
        t = t.detach().cpu()
        first = owner.get(t.untyped_storage().data_ptr()) if t.numel() else None
        if first is None:
            stored[name] = t.contiguous()
            if t.numel():
                owner[t.untyped_storage().data_ptr()] = name
        elif _same(stored[first], t):
            alias[name] = first
        else:
            stored[name] = t.clone(memory_format=torch.contiguous_format)
    return stored, alias


def is_no_space(error: BaseException) -> bool:
    """Whether the disk (or a quota) is full, also as libraries in other languages report it."""
    text = str(error)
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in known or any(os.strerror(n) in text for n in known)


def save_checkpoint(checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values.

    Raises:
        TypeError: a value with no form in JSON; the message says where.
        CheckpointError: the file cannot be written, e.g. on a full disk. What was at `path` is untouched.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    tree = _encode(checkpoint, "", tensors)
    stored, alias = _storable(tensors)
    header = {_HEADER: json.dumps({"version": 1, "tree": tree, "alias": alias})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(stored, temporary, metadata=header))
    except (OSError, SafetensorError) as error:
        if is_no_space(error):
            size = sum(t.numel() * t.element_size() for t in stored.values())
            free = shutil.disk_usage(path.parent).free
            raise CheckpointError(
                f"cannot save {path}: no space left ({size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free on the disk)"
            ) from error
        raise CheckpointError(f"cannot save {path}: {error}") from error


def load_checkpoint(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote. Nothing in the file is executed.

    Raises:
        CheckpointError: no such file, cut short, another format (such as a pickle), or NaN in the weights.
    """
    path = Path(path)
    try:
        with safe_open(str(path), "pt", device=str(device)) as f:
            header = (f.metadata() or {}).get(_HEADER)
            if header is None:
                raise CheckpointError(f"{path} is a safetensors file but not a training checkpoint of statewise")
            content = json.loads(header)
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}): it was cut short or is of another format"
        ) from error
    tensors |= {name: tensors[first] for name, first in content["alias"].items()}
    for name, t in tensors.items():
        if name.startswith("/state_dict/") and t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise CheckpointError(f"{path}: the weight {name.removeprefix('/state_dict/')} holds NaN or infinity")
    return _decode(content["tree"], tensors)


class SafeCheckpointIO(CheckpointIO):
    """Lightning plug-in: checkpoints through `save_checkpoint` and `load_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options: SafeCheckpointIO writes local files and takes none")
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load_checkpoint(path, "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
