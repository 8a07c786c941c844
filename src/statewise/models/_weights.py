"""Saving and loading: config.json + model.safetensors. Nothing in a checkpoint is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .. import _version
from .._files import write_atomically
from .._names import check_options
from ._tensors import (
    INDEX,
    MAX_SHARD,
    WEIGHTS,
    Entry,
    Tensors,
    fill,
    is_finite,
    mismatches,
    open_tensors,
    raise_problems,
    read_json,
    write_tensors,
)

CONFIG = "config.json"
HUB_FILES = (CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors")


def read_config(directory: Path) -> dict[str, Any]:
    """The checked content of config.json."""
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: holds no {CONFIG}; want a directory written by save_pretrained")
    config = read_json(path)
    if not isinstance(config.get("architecture"), str):
        raise ValueError(f"{path}: want an object with 'architecture', e.g. \"language\"")
    return config


def constructor_options(config: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the constructor in a config.json. `statewise.hf` writes them as one entry, "options",
    because transformers keeps entries of its own beside them."""
    if isinstance(config.get("options"), dict):
        return dict(config["options"])
    return {k: v for k, v in config.items() if k not in ("architecture", "statewise_version", "model_type")}


def load_state(model: nn.Module, found: Tensors) -> None:
    """Put tensors into a model on the meta device; every problem is named in one error."""
    problems = mismatches(found.entries, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    tensors = {name: found[name] for name in found}
    problems += [f"{name}: holds NaN or infinity" for name, t in tensors.items() if not is_finite(t)]
    raise_problems(found.source, problems)
    fill(model, tensors, found.source)


class Pretrained(nn.Module):
    """`save_pretrained` and `from_pretrained` for a model whose `config` holds its constructor's keyword arguments."""

    architecture: ClassVar[str]
    config: dict[str, Any]

    def file_config(self) -> dict[str, Any]:
        """What config.json holds. By "model_type" transformers knows the directory, after `import statewise.hf`."""
        about = {"model_type": "statewise", "architecture": self.architecture}
        return {**about, "statewise_version": _version.__version__, **self.config}

    def save_pretrained(self, directory: str | os.PathLike, *, max_shard: int = MAX_SHARD) -> None:
        """Write config.json and the weights, each file atomically; above `max_shard` bytes, weights are in shards."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        tensors = self.state_dict()
        entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        write_tensors(target, entries, tensors.__getitem__, max_shard=max_shard)
        text = json.dumps(self.file_config(), indent=2) + "\n"
        write_atomically(target / CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(
        cls,
        name_or_directory: str | os.PathLike,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Pretrained:
        """Build the model of a directory, or of a Hugging Face Hub repository, written by `save_pretrained`."""
        directory = resolve_directory(name_or_directory)
        config = read_config(directory)
        if config["architecture"] != cls.architecture:
            raise ValueError(
                f"{directory}: holds a {config['architecture']!r} model, not {cls.architecture!r}; use statewise.load"
            )
        return build(cls, config, directory, device, dtype)


def resolve_directory(name_or_directory: str | os.PathLike, files: Sequence[str] = HUB_FILES) -> Path:
    """A local directory as it is; of what looks like `owner/name`, `files` (names or patterns) are fetched from the
    Hub."""
    path = Path(name_or_directory)
    if path.is_dir():
        return path
    name = os.fspath(name_or_directory)
    if path.exists():
        raise NotADirectoryError(f"{name}: want a directory with {CONFIG} and {WEIGHTS}, got a file")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such directory (and not a Hub name of the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(f"{name}: neither a local directory nor to be had from the Hub: {error}") from error


def build(cls: type, config: dict[str, Any], directory: Path, device, dtype) -> Any:
    """Construct on the meta device, then give every parameter its stored value: no double memory."""
    options = constructor_options(config)
    check_options(f"{directory / CONFIG}", cls, options)
    with torch.device("meta"):
        try:
            model = cls(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{directory / CONFIG}: {error}") from error
    load_state(model, open_tensors(directory))
    return model.to(device=device, dtype=dtype).eval()
