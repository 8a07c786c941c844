"""From one folder format to another, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..._files import write_atomically
from ..._names import unknown
from ...models._tensors import MAX_SHARD, PICKLE, Entry, Tensors, is_finite, read_json, stale_files, write_tensors
from . import families
from .describe import architecture_of, build_on_meta, complete, differences
from .family import Family
from .fields import Fields
from .loading import CONFIG, Checkpoint, open_checkpoint, resolve
from .rules import bind, to_theirs

Layout = Literal["statewise", "transformers", "mamba_ssm"]
LAYOUTS: tuple[str, ...] = ("statewise", "transformers", "mamba_ssm")
GENERATION = "generation_config.json"
# What a tokenizer and a generation loop read; copied as they are.
SIDE_FILES = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Converted(NamedTuple):
    """What was written."""

    directory: Path
    family: str  # "statewise", or the name of the family
    parameters: int
    nbytes: int


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: Layout,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    unsafe_pickle: bool = False,
    write_pickle: bool = False,
    max_shard: int = MAX_SHARD,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Write the checkpoint `source` in another format. Without `dtype` no bit of a weight changes.

    Args:
        source: a folder or Hub name that `load` reads.
        target: the folder to write. It is made whole elsewhere first: a failure leaves nothing behind.
        to: "statewise", "transformers" or "mamba_ssm".
        family: which family of transformers to write; None: that of the source, else the first that can say the model.
        dtype: of the written weights; None: as stored.
        overwrite: replace a checkpoint that is in `target`; other files there stay.
        unsafe_pickle: read a pytorch_model.bin, see `load`.
        write_pickle: with to="mamba_ssm", write pytorch_model.bin: the only file that mamba_ssm itself reads.
        max_shard: above this many bytes the weights are written in shards.
        progress: called with the bytes written and the bytes in all.

    Raises:
        FileExistsError: `target` is not empty and `overwrite` is False.
        ValueError: as `load`; or the format has no words for the model: the error lists what it cannot say.
    """
    if to not in LAYOUTS:
        raise ValueError(unknown("format", to, LAYOUTS))
    if write_pickle and to != "mamba_ssm":
        raise ValueError(f"write_pickle: want it with to='mamba_ssm' only, got to={to!r}")
    if max_shard < 1:
        raise ValueError(f"max_shard: want at least 1 byte, got {max_shard}")
    directory = resolve(source, unsafe_pickle=unsafe_pickle, also=SIDE_FILES)
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: is a file; want a folder")
    if target.is_dir() and target.resolve() == directory.resolve():
        raise ValueError(f"{target}: is the source; want another folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target}: is not empty; choose another folder, or ask to overwrite what is there")
    found = open_checkpoint(directory, unsafe_pickle=unsafe_pickle)
    chosen, config, tensors = _in_format(found, to, family)
    if dtype is not None:
        tensors = _cast(tensors, dtype)
    tensors = _checked(tensors)
    config |= _token_ids(directory, found.config) if to == "transformers" else {}
    if to == "transformers":
        config["dtype"] = str(_main_dtype(tensors)).removeprefix("torch.")

    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    try:
        _write_weights(work, tensors, max_shard, write_pickle, progress)
        _copy_side_files(directory, work, found.config, to)
        text = json.dumps(config, indent=2) + "\n"
        write_atomically(work / CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))
        _move(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    parameters = sum(p.numel() for p in found.model.parameters())
    return Converted(target, chosen, parameters, sum(entry.nbytes for entry in tensors.entries.values()))


def _in_format(found: Checkpoint, to: Layout, name: str | None) -> tuple[str, dict[str, Any], Tensors]:
    """Name of the family, config.json and tensors of a checkpoint in a format."""
    if to == "statewise":
        if name is not None:
            raise ValueError(f"family: want None with to='statewise', got {name!r}")
        return to, found.model.file_config(), found.tensors
    chosen, config = express(found.model, to, name or (found.family.name if found.family else None), name is None)
    shapes = {n: entry.shape for n, entry in found.tensors.entries.items()}
    tensors = to_theirs(found.tensors, bind(chosen.rules(complete(found.model)), shapes))
    head, embedding = chosen.head
    if chosen.keeps_tied_head and head not in tensors.entries:
        tensors = _with_copy(tensors, head, embedding)
    return chosen.name, config, tensors


def express(model: Any, layout: str, name: str | None = None, others: bool = True) -> tuple[Family, dict[str, Any]]:
    """A family of this layout that can say the model, and the config.json that says it.

    Args:
        name: the family to try first, if it is of this layout.
        others: try the others too.

    Raises:
        ValueError: none can; the message says for each what it has no words for.
    """
    if name is not None and name not in families.names():
        raise ValueError(unknown("model family", name, families.names()))
    order = [n for n in families.names() if others or n == name]
    order.sort(key=lambda n: n != name)
    reasons = []
    for candidate in map(families.family, order):
        if candidate.layout != layout:
            continue
        if candidate.architecture != architecture_of(model):
            reasons.append(f"{candidate.name}: is for the architecture {candidate.architecture!r}")
            continue
        try:
            config = candidate.write(complete(model))
            said = build_on_meta(candidate.architecture, candidate.read(Fields(config, candidate.name)), candidate.name)
            problems = differences(complete(model), complete(said))
        except ValueError as error:
            problems = [str(error)]
        if not problems:
            return candidate, config
        reasons.append(f"{candidate.name}: " + "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else ""))
    if not reasons:
        raise ValueError(f"family: {name!r} is not a format of {layout}")
    raise ValueError(f"no family of {layout} can say this model:\n  " + "\n  ".join(reasons))


def _with_copy(tensors: Tensors, name: str, of: str) -> Tensors:
    return Tensors(
        tensors.source,
        {**tensors.entries, name: tensors.entries[of]},
        lambda n: tensors[of].clone() if n == name else tensors[n],
    )


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    entries = {name: Entry(entry.shape, dtype) for name, entry in tensors.entries.items()}
    return Tensors(tensors.source, entries, lambda name: tensors[name].to(dtype))


def _checked(tensors: Tensors) -> Tensors:
    def read(name: str) -> torch.Tensor:
        t = tensors[name]
        if not is_finite(t):
            raise ValueError(f"{tensors.source}: {name}: holds NaN or infinity")
        return t

    return Tensors(tensors.source, tensors.entries, read)


def _main_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of most numbers."""
    sizes: dict[torch.dtype, int] = {}
    for entry in tensors.entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    return max(sizes, key=lambda d: sizes[d])


# ---- files -----------------------------------------------------------------------------------------------------------


def _write_weights(
    work: Path, tensors: Tensors, max_shard: int, write_pickle: bool, progress: Callable[[int, int], None]
) -> None:
    total = sum(entry.nbytes for entry in tensors.entries.values())
    done = 0

    def read(name: str) -> torch.Tensor:
        nonlocal done
        t = tensors[name]
        done += tensors.entries[name].nbytes
        progress(done, total)
        return t

    if write_pickle:
        torch.save({name: read(name).clone() for name in tensors}, work / PICKLE)
    else:
        write_tensors(work, tensors.entries, read, max_shard=max_shard)


def _token_ids(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Special tokens, which a model of ours does not know: from beside its weights."""
    beside = read_json(directory / GENERATION) if (directory / GENERATION).is_file() else {}
    return {name: place[name] for name in _TOKENS for place in (beside, config) if name in place}


def _copy_side_files(directory: Path, work: Path, config: dict[str, Any], to: Layout) -> None:
    for name in SIDE_FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, work / name)
    tokens = {name: config[name] for name in _TOKENS if config.get(name) is not None}
    if tokens and to != "transformers" and not (work / GENERATION).exists():
        (work / GENERATION).write_text(json.dumps(tokens, indent=2) + "\n", encoding="utf-8")


def _move(work: Path, target: Path) -> None:
    if not target.exists():
        os.replace(work, target)
        return
    # Without config.json a folder is no checkpoint: it goes first and comes last.
    (target / CONFIG).unlink(missing_ok=True)
    for path in stale_files(target):
        path.unlink()
    for path in sorted(work.iterdir(), key=lambda p: p.name == CONFIG):
        os.replace(path, target / path.name)
