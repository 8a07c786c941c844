"""Seeing what a mixer does: as a dynamical system, a matrix, a kernel, a spectrum, and by its memory.

Each view is a function of a built mixer or model that returns plain tensors, and each has a `plot_...` that makes a
figure of them. Nothing here changes what it looks at.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Name -> the file that has it.
_PLACES = {
    "Dense": "system",
    "HeadSystem": "system",
    "ImpulseResponse": "responses",
    "Linearised": "linearised",
    "Memory": "gradients",
    "MixedSystem": "system",
    "MixingMatrices": "matrices",
    "Spectrum": "spectra",
    "StateNorms": "gradients",
    "System": "system",
    "TransferFunction": "responses",
    "impulse_response": "responses",
    "linearise": "linearised",
    "memory": "gradients",
    "mixer_input": "inputs",
    "mixing_matrices": "matrices",
    "plot_impulse": "plots",
    "plot_influence": "plots",
    "plot_matrices": "plots",
    "plot_memory": "plots",
    "plot_spectrum": "plots",
    "plot_states": "plots",
    "plot_transfer": "plots",
    "save": "plots",
    "sequence_mixers": "inputs",
    "spectrum": "spectra",
    "state_norms": "gradients",
    "taylor_dsf": "dsf",
    "to_dsf": "dsf",
    "transfer_function": "responses",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
