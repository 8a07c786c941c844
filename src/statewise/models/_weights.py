"""Saving and loading: config.json + model.safetensors. Nothing in a checkpoint is executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .. import _version
from .._files import write_atomically
from .._names import check_options

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read_config(directory: Path) -> dict[str, Any]:
    """The checked content of config.json."""
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: holds no {CONFIG}; want a directory written by save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{path}: want an object with 'architecture', e.g. \"language\"")
    return config


def constructor_options(config: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the constructor in a config.json. `statewise.hf` writes them as one entry, "options",
    because transformers keeps entries of its own beside them."""
    if isinstance(config.get("options"), dict):
        return dict(config["options"])
    return {k: v for k, v in config.items() if k not in ("architecture", "statewise_version", "model_type")}


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors; pickled weights are refused."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / WEIGHTS
    if not path.is_file():
        pickled = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        hint = f"; {pickled[0]} is a pickle, which could run code, and is not loaded" if pickled else ""
        raise FileNotFoundError(f"{directory}: holds no {WEIGHTS}{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is truncated or not a safetensors file ({error})") from error


def load_state(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Put `tensors` into `model` (which may be on the meta device); every problem is named in one error."""
    expected = model.state_dict()
    problems = [f"missing {name} {tuple(t.shape)}" for name, t in expected.items() if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name, t in tensors.items():
        if name in expected and t.shape != expected[name].shape:
            problems.append(f"{name}: want shape {tuple(expected[name].shape)}, got {tuple(t.shape)}")
        elif t.is_floating_point() and not bool(torch.isfinite(t).all()):
            problems.append(f"{name}: holds NaN or infinity")
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{source}: does not fit this model:\n  {shown}")
    model.load_state_dict(tensors, assign=True)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise RuntimeError(f"{source}: gives no value to {', '.join(left)}")


class Pretrained(nn.Module):
    """`save_pretrained` and `from_pretrained` for a model whose `config` holds its constructor's keyword arguments."""

    architecture: ClassVar[str]
    config: dict[str, Any]

    def file_config(self) -> dict[str, Any]:
        """What config.json holds. By "model_type" transformers knows the directory, after `import statewise.hf`."""
        about = {"model_type": "statewise", "architecture": self.architecture}
        return {**about, "statewise_version": _version.__version__, **self.config}

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors, each atomically."""
        from safetensors.torch import save_file

        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        config = self.file_config()
        write_atomically(target / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2) + "\n"
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


def resolve_directory(name_or_directory: str | os.PathLike) -> Path:
    """A local directory as it is; anything that looks like `owner/name` is fetched from the Hub."""
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
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
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
    load_state(model, read_tensors(directory), os.fspath(directory / WEIGHTS))
    return model.to(device=device, dtype=dtype).eval()
