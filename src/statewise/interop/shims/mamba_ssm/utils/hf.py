"""Configuration and weights of a checkpoint, from a directory or from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ... import _settings
from ..._missing import missing

__all__ = ["load_config_hf", "load_state_dict_hf"]

__getattr__ = missing(__name__)

_CONFIG, _SAFE, _PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The content of config.json."""
    path = _find(model_name, _CONFIG)
    if path is None:
        raise FileNotFoundError(f"{model_name}: holds no {_CONFIG}")
    return json.loads(path.read_text(encoding="utf-8"))


def load_state_dict_hf(model_name: str, device=None, dtype=None) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors; of pytorch_model.bin only if `install_shims(allow_pickle=True)` says so.

    A pickle is read with weights_only=True.
    """
    from safetensors.torch import load_file

    if (path := _find(model_name, _SAFE)) is not None:
        tensors = load_file(path, device=str(device or "cpu"))
    elif not _settings.allow_pickle:
        raise FileNotFoundError(
            f"{model_name}: holds no {_SAFE}, and {_PICKLE} is a pickle, which could run code; if you trust it, "
            "install_shims(allow_pickle=True) or python -m statewise.shim --allow-pickle reads it"
        )
    elif (path := _find(model_name, _PICKLE)) is not None:
        tensors = torch.load(path, map_location=device or "cpu", weights_only=True, mmap=True)
    else:
        raise FileNotFoundError(f"{model_name}: holds neither {_SAFE} nor {_PICKLE}")
    return {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}


def _find(model_name: str, file: str) -> Path | None:
    directory = Path(model_name)
    if directory.is_dir():
        return directory / file if (directory / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model_name, file))
    except EntryNotFoundError:
        return None
