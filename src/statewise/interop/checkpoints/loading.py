"""Reading a checkpoint of any known kind, tensor by tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import models
from ..._names import unknown
from ...models import _weights
from ...models._tensors import PICKLE, Tensors, fill, is_finite, mismatches, open_tensors, raise_problems, read_json
from . import families
from .describe import build_on_meta, complete
from .family import Family
from .fields import Fields
from .rules import bind, to_ours

CONFIG = _weights.CONFIG


class Checkpoint(NamedTuple):
    """A checkpoint that fits its configuration: nothing but names and shapes has been read."""

    model: Any  # on the meta device
    tensors: Tensors  # under our names, in our layout; read when asked for
    family: Family | None  # None: our own format
    config: dict[str, Any]  # config.json as it is


def load(
    name_or_directory: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    unsafe_pickle: bool = False,
) -> Any:
    """The model of a checkpoint: of ours (a run directory is one), of `mamba_ssm`, or of a family in transformers.

    What it is, config.json says. Weights are safetensors, in one file or in shards; they are mapped into memory and
    read tensor by tensor, so a model is never held twice. Nothing in a checkpoint is executed.

    Args:
        name_or_directory: a local folder, or the name owner/name of a repository on the Hugging Face Hub.
        device: where to put the model; None: CPU.
        dtype: of the parameters; None: as stored.
        unsafe_pickle: also read pytorch_model.bin, a pickle, where there are no safetensors. PyTorch then restricts
            what it may hold to tensors (`weights_only`), but use it only for files that you trust.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: no such folder or repository, or no config.json or weights in it.
        ValueError: an unknown family; a configuration with a value that cannot be served; weights that are missing, not
            expected, of another shape, not finite, cut short or not what they seem. All that is wrong with the weights
            is in one error, and no model is made.
    """
    directory = resolve(name_or_directory, unsafe_pickle=unsafe_pickle)
    if "architecture" in read_config(directory):
        return models.load(directory, device=device, dtype=dtype)
    found = open_checkpoint(directory, unsafe_pickle=unsafe_pickle)
    tensors, problems = {}, []
    for name in found.tensors:
        t = found.tensors[name]
        if not is_finite(t):
            problems.append(f"{name}: holds NaN or infinity")
        # Moved one by one: the stored tensor can go before the next is read.
        tensors[name] = t.to(device=device, dtype=dtype)
    raise_problems(found.tensors.source, problems)
    fill(found.model, tensors, found.tensors.source)
    return found.model.eval()


def resolve(name_or_directory: str | os.PathLike, *, unsafe_pickle: bool = False, also: tuple[str, ...] = ()) -> Path:
    """The folder of a checkpoint; from the Hub, its safetensors (and the files named in `also`) are fetched."""
    directory = _weights.resolve_directory(name_or_directory, (*_weights.HUB_FILES, *also))
    local = Path(name_or_directory).is_dir()
    if unsafe_pickle and not local and not any(directory.glob("*.safetensors")):
        return _weights.resolve_directory(name_or_directory, (CONFIG, PICKLE, *also))
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory}: holds no {CONFIG}; want a folder with a checkpoint")
    return read_json(directory / CONFIG)


def recognise(config: dict[str, Any], source: str) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: none; the message lists what is close.
    """
    name = config.get("model_type")
    if name is None and "d_model" in config and "n_layer" in config:
        name = "mamba_ssm"
    if not isinstance(name, str):
        raise ValueError(
            f"{source}: want 'architecture' (a model of statewise), 'model_type' (of transformers) or 'd_model' and "
            f"'n_layer' (of mamba_ssm), got {', '.join(map(repr, list(config)[:8])) or 'nothing'}"
        )
    if name not in families.names():
        raise ValueError(f"{source}: {unknown('model family', name, families.names())}")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{source}: quantization_config: quantised weights cannot be read; want the original ones")
    return families.family(name)


def open_checkpoint(directory: Path, *, unsafe_pickle: bool = False) -> Checkpoint:
    """Recognise a checkpoint and tie its tensors to a model on the meta device.

    Raises:
        ValueError, FileNotFoundError: as `load`, for all that shows in names and shapes.
    """
    source = os.fspath(directory / CONFIG)
    config = read_config(directory)
    if "architecture" in config:
        return _open_own(directory)
    family = recognise(config, source)
    model = build_on_meta(family.architecture, family.read(Fields(config, source)), source)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    bound = bind(family.rules(complete(model)), shapes)
    wanted = {name: shape for b in bound for name, shape in b.theirs.items()}
    found = open_tensors(directory, unsafe_pickle=unsafe_pickle)
    head, embedding = family.head
    tied = head not in wanted
    present = {
        name: entry
        for name, entry in found.entries.items()
        if not name.endswith(family.ignored or ("\0",)) and not (tied and name == head)
    }
    problems = mismatches(present, wanted)
    if tied and head in found.entries and not _equal(found, head, embedding):
        problems.append(f"{head}: the configuration ties it to {embedding}, but it holds other numbers")
    raise_problems(f"{found.source}: as a {family.name} checkpoint", problems)
    return Checkpoint(model, to_ours(found, bound), family, config)


def _open_own(directory: Path) -> Checkpoint:
    config = _weights.read_config(directory)
    name = config["architecture"]
    if name not in models.ARCHITECTURES:
        raise ValueError(f"{directory}: {unknown('architecture', name, models.ARCHITECTURES)}")
    model = build_on_meta(name, _weights.constructor_options(config), os.fspath(directory / CONFIG))
    found = open_tensors(directory)
    raise_problems(found.source, mismatches(found.entries, {n: tuple(t.shape) for n, t in model.state_dict().items()}))
    return Checkpoint(model, found, None, config)


def _equal(found: Tensors, a: str, b: str) -> bool:
    return b in found.entries and found.entries[a] == found.entries[b] and torch.equal(found[a], found[b])
