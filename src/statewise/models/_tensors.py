"""Folders of tensors: one safetensors file, or shards with an index. Nothing is read before it is asked for.

The files are mapped into memory, so a tensor costs nothing until somebody looks at its numbers, and a model that takes
the tensors as they are is not held twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._files import write_atomically

WEIGHTS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_SHARD = 5 * 10**9  # bytes
_MAX_JSON = 64 * 2**20  # bytes: the largest index files that exist have a few
_SHOWN = 20  # problems in one error
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class Entry(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Tensors(Mapping[str, Tensor]):
    """Tensors by name. `entries` has every shape and dtype; `folder[name]` reads one tensor."""

    def __init__(self, source: str, entries: dict[str, Entry], read: Callable[[str], Tensor]) -> None:
        self.source, self.entries, self._read = source, entries, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of sensible size."""
    size = path.stat().st_size
    if size > _MAX_JSON:
        raise ValueError(f"{path}: want at most {_MAX_JSON >> 20} MiB of JSON, got {size >> 20} MiB")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: want a JSON object, got {type(found).__name__}")
    return found


# ---- reading -------------------------------------------------------------------------------------------------------


def open_tensors(directory: Path, *, unsafe_pickle: bool = False) -> Tensors:
    """The tensors of a folder: model.safetensors, the shards of its index, or (only if asked) pytorch_model.bin.

    Raises:
        FileNotFoundError: no weights, or only pickled ones and `unsafe_pickle` is False.
        ValueError: a file that is cut short or is not what its name says; an index that does not fit its shards;
            numbers that are not floating.
    """
    if (directory / WEIGHTS).is_file():
        return _open_safetensors(os.fspath(directory / WEIGHTS), [directory / WEIGHTS])
    if (directory / INDEX).is_file():
        return _open_shards(directory)
    if unsafe_pickle and (directory / PICKLE).is_file():
        return _open_pickle(directory / PICKLE)
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    hint = f"; {pickled[0]} is a pickle, which could run code, and is not loaded" if pickled else ""
    if PICKLE in pickled and not unsafe_pickle:
        hint += " unless you trust it and ask for it (unsafe_pickle)"
    raise FileNotFoundError(f"{directory}: holds no {WEIGHTS}{hint}")


def _open_shards(directory: Path) -> Tensors:
    index = directory / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{index}: want 'weight_map', an object from tensor names to file names")
    files = sorted(set(where.values()))
    for file in files:
        # Only files beside the index: a name must not lead out of the folder.
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: want plain names of .safetensors files in 'weight_map', got {file!r}")
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: of {len(files)} shards, {len(missing)} are missing: {', '.join(missing)}")
    found = _open_safetensors(os.fspath(index), [directory / file for file in files])
    stray = [*(n for n in where if n not in found.entries), *(n for n in found.entries if n not in where)]
    if stray:
        raise ValueError(f"{index}: does not list what its shards hold: {', '.join(stray[:_SHOWN])}")
    return found


def _open_safetensors(source: str, files: list[Path]) -> Tensors:
    from safetensors import SafetensorError, safe_open

    entries: dict[str, Entry] = {}
    handles: dict[str, Any] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
            slices = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: is truncated or not a safetensors file ({error})") from error
        for name, part in slices:
            if name in entries:
                raise ValueError(f"{file}: holds {name}, which another shard holds too")
            if part.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{file}: {name}: want {', '.join(_DTYPES)}, got {part.get_dtype()}; quantised weights cannot be "
                    "read"
                )
            entries[name] = Entry(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
            handles[name] = handle

    def read(name: str) -> Tensor:
        try:
            return handles[name].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{source}: {name}: cannot be read ({error})") from error

    return Tensors(source, entries, read)


def _open_pickle(path: Path) -> Tensors:
    import pickle

    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file older than PyTorch 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: holds more than tensors, so it is not loaded ({reason})") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: is truncated or not a PyTorch file ({str(error).splitlines()[0]})") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ValueError(f"{path}: want a state dict, tensors by name")
    tensors = {str(name): t.detach() for name, t in loaded.items()}
    for name, t in tensors.items():
        if t.dtype not in _DTYPES.values() or t.layout != torch.strided:
            raise ValueError(f"{path}: {name}: want a dense floating tensor, got {t.dtype} {t.layout}")
    entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return Tensors(os.fspath(path), entries, tensors.__getitem__)


# ---- into a model --------------------------------------------------------------------------------------------------


def is_finite(t: Tensor) -> bool:
    """No NaN and no infinity, found without a temporary of the tensor's size."""
    if not t.numel():
        return True
    low, high = t.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def raise_problems(source: str, problems: list[str]) -> None:
    """One ValueError that lists what is wrong, if anything is."""
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{source}: does not fit this model:\n  {shown}{more}")


def mismatches(found: Mapping[str, Entry], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unexpected or of another shape, by names and shapes alone."""
    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    problems += [
        f"{name}: want shape {wanted[name]}, got {entry.shape}"
        for name, entry in found.items()
        if name in wanted and entry.shape != wanted[name]
    ]
    return problems


def fill(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Give every parameter of a model on the meta device its value; the tensors become the parameters."""
    model.load_state_dict(tensors, assign=True)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise RuntimeError(f"{source}: gives no value to {', '.join(left)}")


# ---- writing -------------------------------------------------------------------------------------------------------


def write_tensors(
    directory: Path,
    entries: Mapping[str, Entry],
    read: Callable[[str], Tensor],
    *,
    max_shard: int = MAX_SHARD,
    wrote: Callable[[int], None] = lambda _: None,
) -> None:
    """Write model.safetensors, or shards of at most `max_shard` bytes each (one tensor at least) with an index.

    Args:
        read: gives a tensor by name; the tensors of one shard are held at a time.
        wrote: called with the bytes of each finished file.
    """
    from safetensors.torch import save_file

    shards = list(_shards(entries, max_shard)) or [[]]
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: read(name).detach().cpu().contiguous() for name in names}
        write_atomically(directory / file, lambda path, t=tensors: save_file(t, path, metadata={"format": "pt"}))  # type: ignore[misc]
        where |= dict.fromkeys(names, file)
        wrote(sum(entries[name].nbytes for name in names))
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in entries.values())
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
        write_atomically(directory / INDEX, lambda path: Path(path).write_text(index, encoding="utf-8"))


def _shards(entries: Mapping[str, Entry], limit: int) -> Iterable[list[str]]:
    names: list[str] = []
    size = 0
    for name, entry in entries.items():
        if names and size + entry.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += entry.nbytes
    if names:
        yield names


def stale_files(directory: Path) -> list[Path]:
    """Weight files of a checkpoint that another one is written over."""
    return [p for p in directory.iterdir() if p.name in (INDEX, PICKLE, WEIGHTS) or p.match("model-*-of-*.safetensors")]
