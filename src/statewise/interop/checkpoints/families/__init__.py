"""The families of checkpoints that can be read and written, one file each."""

from __future__ import annotations

from importlib import import_module

from ..family import Family

# Name -> module, imported on first use. A model that several can say is written in the first of its layout.
MODULES = {
    "mamba_ssm": "mamba_ssm",
    "mamba": "mamba",
    "falcon_mamba": "falcon_mamba",
    "mamba2": "mamba2",
    "bamba": "bamba",
    "granitemoehybrid": "granitemoehybrid",
    "jamba": "jamba",
    "zamba2": "zamba2",
    "falcon_h1": "falcon_h1",
    "nemotron_h": "nemotron_h",
    "recurrent_gemma": "recurrent_gemma",
}


def names() -> list[str]:
    """The names of all families."""
    return list(MODULES)


def family(name: str) -> Family:
    """The family of this name."""
    return import_module(f"{__name__}.{MODULES[name]}").FAMILY
