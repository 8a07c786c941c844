"""The model of a run directory, or of one of its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def load_run(path: str | os.PathLike) -> Any:
    """The model in eval mode.

    Args:
        path: a directory with config.json and model.safetensors (a finished run, or what `save_pretrained` wrote), or
            the path of one checkpoint of a run.

    Raises:
        ValueError: neither; the message says what is there.
    """
    from ..models import load

    path = Path(path)
    if path.is_file():
        return _from_checkpoint(path)
    if not path.is_dir():
        raise ValueError(f"there is no run directory {path}")
    if not (path / "model.safetensors").is_file():
        saved = sorted((path / "checkpoints").glob("step-*.safetensors"))
        if saved:
            raise ValueError(
                f"{path} holds no finished model yet; go on with `statewise run --resume {path}`, "
                f"or use the checkpoint {saved[-1]}"
            )
        raise ValueError(f"{path} holds no model.safetensors, so there is no model to load")
    try:
        return load(path).eval()
    except (OSError, TypeError) as error:
        raise ValueError(str(error)) from error


def _from_checkpoint(path: Path) -> Any:
    import json

    from ..models._registry import architecture_class
    from ..models._weights import constructor_options
    from ..training.checkpoint_io import CheckpointError, load_checkpoint

    config_file = path.parent.parent / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{path}: want a checkpoint inside a run directory; there is no {config_file}")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    model = architecture_class(config["architecture"])(**constructor_options(config))
    try:
        weights = load_checkpoint(path)["state_dict"]
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    return model.eval()
